"""Scratch memory does not grow with seqlen_q x seqlen_k."""

import sys
from pathlib import Path

import pytest
import sizes
from options import OPTIONS

from mha_fast import _core

linux = sys.platform.startswith("linux")
pytestmark = pytest.mark.skipif(not linux, reason="needs /proc")

PER_THREAD = 8 * 2**20  # bytes, from the requirements
THREADS = 2

# Not ru_maxrss, which a process takes over from the one that started it.
MEMORY = """
import numpy as np, mha_fast
def entry(name):
    with open("/proc/self/status") as status:
        return 1024 * int(next(x for x in status if x.startswith(name)).split()[1])
def peak():
    return entry("VmHWM")
def resident():
    return entry("VmRSS")
"""

SETUP = f"""{MEMORY}
n, rng = 16384, np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 8, n, 64), dtype=np.float32) for _ in range(3))
out = np.zeros_like(q)
out[...] = 1
mask = np.ones((n, n), bool) if MASK else None
if MASK:
    for i in range(n):
        mask[i, i + 1:] = False
mha_fast.attention(q[:, :, :300], k[:, :, :300], v[:, :, :300])
"""

CALL = """
before = peak()
mha_fast.attention(q, k, v, mask, threads=2, out=out)
print(peak() - before)
"""

STATS = """
before = peak()
stats = mha_fast.attention_stats(q, k, v, mask, threads=2, top=8)
print(peak() - before - 3 * sum(x.nbytes for x in stats))
"""

NAIVE = """
before = peak()
s = q[0, 0, :4096] @ k[0, 0, :4096].T
print(peak() - before)
"""


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "bool mask"])
def test_long_sequences_take_little_memory_beside_out(output_of, mask):
    extra = int(output_of(f"MASK = {mask}\n{SETUP}{CALL}", timeout=120))
    assert extra < THREADS * PER_THREAD


def test_statistics_are_streamed(output_of):
    """Beside their arrays, which are converted once."""
    extra = int(output_of(f"MASK = False\n{SETUP}{STATS}", timeout=120))
    assert extra < THREADS * PER_THREAD


# A peak of its own for each option. Half of the bytes of the scores are above the limit.
EVERY_OPTION = f"""{MEMORY}
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from options import OPTIONS, PLAIN
rng = np.random.default_rng(0)
q, k, v, out = (rng.standard_normal((2, 1, ROWS, 16), dtype=np.float32) for _ in range(4))
k, v = (np.resize(x, (2, 1, 25_000_000 // ROWS, 16)) for x in (k, v))
mha_fast.attention(q[:, :, :300], k[:, :, :300], v[:, :, :300])
for name, option in {{"plain": PLAIN, **OPTIONS}}.items():
    options = option(q, k, v)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = peak()
    mha_fast.attention(q, k, v, threads=2, out=out, **options)
    print(peak() - before, name)
"""


@pytest.mark.parametrize("rows", [50, 5000])
def test_no_option_takes_memory_for_every_query_and_key(output_of, rows):
    fixed = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what was large is given back when it is free
    lines = output_of(f"ROWS = {rows}\n{EVERY_OPTION}", **fixed).splitlines()
    assert len(lines) == 1 + len(OPTIONS)
    assert not [x for x in lines if int(x.split()[0]) >= THREADS * PER_THREAD]


FEW_ROWS = f"""{MEMORY}
q = np.ones((1, 60, 64), np.float32)
k, v = (np.ones((1, 2**18, 64), np.float32) for _ in range(2))
mha_fast.attention(q, k[:, :300], v[:, :300])
before = peak()
mha_fast.attention(q, k, v, threads=2)
print(peak() - before)
"""


def test_few_rows_and_many_keys_take_little_memory(output_of):
    """Also where the keys are split among the threads."""
    assert int(output_of(FEW_ROWS)) < THREADS * PER_THREAD


MANY_THREADS = f"""{MEMORY}
import resource
threads = 64
q, k = np.ones((200 * TILE, 8), np.float32), np.ones((260 * {sizes.KEY_BLOCK}, 8), np.float32)
v = np.broadcast_to(np.float32(1), (len(k), 400))
def call(tiles):
    mha_fast.attention(q[: tiles * TILE], k, v, window=(0, 0), q_offset=0, threads=threads)
call(threads)       # an even share for each; starts them
limit = entry("VmSize") + threads * {PER_THREAD}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
call(200)
"""


@pytest.mark.parametrize("isa", _core.isa_names())
def test_many_threads_split_keys_within_their_memory(output_of, isa):
    """Partial results grow with the threads, not with their square. One malloc arena, because
    each reserves addresses."""
    script = f"TILE = {sizes.TILE[isa]}\n{MANY_THREADS}"
    assert output_of(script, MHA_FAST_ISA=isa, MALLOC_ARENA_MAX="1") == ""


def test_peak_before_the_call_hides_nothing(output_of):
    """The peak counts only growth past the arrays, if those are the peak so far."""
    script = "print(peak() - resident())"
    assert int(output_of(f"MASK = True\n{SETUP}{script}")) < THREADS * PER_THREAD


def test_canary_stored_scores_are_caught(output_of):
    assert int(output_of(f"MASK = False\n{SETUP}{NAIVE}")) > THREADS * PER_THREAD


def test_canary_a_byte_for_every_query_and_key_is_caught(output_of):
    script = f"ROWS = 5000\n{EVERY_OPTION}".replace("mha_fast.attention(q, k, v,", "stored(")
    stored = "def stored(**more): np.zeros((5000, 5000), bool)[...] = True\n"
    fixed = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    lines = output_of(stored + script, **fixed).splitlines()
    assert min(int(x.split()[0]) for x in lines) > THREADS * PER_THREAD


LEAK = f"""{MEMORY}
q = np.ones((4, 50, 16), np.float32)
def calls():
    for i in range(3000):
        mha_fast.attention(q, q, q, return_lse=True, threads=1 + i % 4)
        mha_fast.attention(q, q, q, window=(3, 0), q_offset=i % 7)
        try:
            mha_fast.attention(q, q, q, np.ones((50, 3), bool))
        except ValueError:
            pass
calls()
before = resident()
calls()
print(resident() - before)
"""


def test_calls_and_errors_leak_nothing(output_of):
    assert int(output_of(LEAK)) < 2**20
