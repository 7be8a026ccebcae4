"""Threads, processes, signals and environment variables."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import threadpoolctl
from judge import assert_same
from sizes import qkv

import mha_fast
from mha_fast import _core, attention

needs_openmp = pytest.mark.skipif(not _core.openmp_version(), reason="this build is serial")

CASE = """
import numpy as np, mha_fast
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((8, 500, 64), dtype=np.float32) for _ in range(3))
"""


@needs_openmp
def test_thread_count_set_is_got(restored_threads):
    for count in (1, 2, 3, 8):
        mha_fast.set_num_threads(count)
        assert mha_fast.get_num_threads() == count


@needs_openmp
def test_none_goes_back_to_the_default(restored_threads):
    before = mha_fast.get_num_threads()
    mha_fast.set_num_threads(before + 3)
    mha_fast.set_num_threads(None)
    assert mha_fast.get_num_threads() == before


@needs_openmp
def test_limit_of_threadpoolctl_is_honoured(restored_threads):
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert mha_fast.get_num_threads() == 1
        mha_fast.set_num_threads(3)
        assert mha_fast.get_num_threads() == 1
    assert mha_fast.get_num_threads() == 3


def test_absurd_thread_counts_are_cut_to_the_work():
    q, k, v = qkv(13, 67)
    expected = attention(q, k, v, threads=1)
    for threads in (10**9, 2**62, 10**30):
        assert_same(attention(q, k, v, threads=threads), expected)


def test_concurrent_callers_get_their_serial_bits():
    cases = [qkv(10 + 7 * i, 50 + 31 * i, 3 + 5 * i, seed=i) for i in range(12)]
    expected = [attention(*case, causal=True, threads=1) for case in cases]
    barrier = threading.Barrier(len(cases))

    def call(i):
        barrier.wait(timeout=30)
        for repeat in range(10):
            threads = 1 + (i + repeat) % 3
            assert_same(attention(*cases[i], causal=True, threads=threads), expected[i])

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(call, range(len(cases))))


THREAD_COUNT = """
import os
def os_threads():
    return len(os.listdir("/proc/self/task"))
"""


@needs_openmp
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_small_calls_wake_no_thread_and_large_ones_do(output_of):
    script = """
before = os_threads()
mha_fast.attention(q[:, :5], k[:, :50], v[:, :50], threads=8)
print(os_threads() - before)
mha_fast.attention(q, k, v, threads=2)
print(os_threads() - before)
mha_fast.attention(q, k, v, threads=1)
print(os_threads() - before)
"""
    small, large, serial = output_of(CASE + THREAD_COUNT + script).split()
    assert small == "0"
    # One beside the caller, and one that does nothing where there are no more CPUs than threads.
    assert large in ("1", "2")
    assert serial == large


@needs_openmp
@needs_openmp
def test_calls_side_by_side_share_the_cores(output_of):
    script = f"""{CASE}
import os
from mha_fast import _core
cpus = len(os.sched_getaffinity(0))
print(_core.claim_threads(cpus) == cpus, _core.claim_threads(cpus))
alone = len(os.listdir("/proc/self/task"))
beside = mha_fast.attention(q, k, v, threads=cpus + 1)
print(len(os.listdir("/proc/self/task")) - alone)
print(_core.claim_threads(-cpus), _core.claim_threads(-1))
expected = mha_fast.attention(q, k, v, threads=cpus + 1)
print(len(os.listdir("/proc/self/task")) > alone, (beside == expected).all())
print(_core.claim_threads(cpus + 5) == cpus + 5)
"""
    cpus = len(os.sched_getaffinity(0))
    lines = output_of(script).splitlines()
    assert lines == ["True 1", "0", f"{-cpus} -1", "True True", "True"]


def test_gil_is_released_during_a_call():
    q, k, v = qkv(2000, 2000, 64, batch=(1,), heads=8)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    attention(q, k, v, threads=1)
    stop = time.perf_counter()
    done.set()
    ticker.join()
    assert sum(start < t < stop for t in ticks) > 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parent", ["cold", "warm", "from a thread"])
def test_forked_child_computes_the_same_bits(output_of, parent):
    script = """
import os, threading
if parent != "cold":
    mha_fast.attention(q, k, v, threads=4)
def fork():
    pid = os.fork()
    if pid == 0:
        child = mha_fast.attention(q, k, v, causal=True, threads=4)
        grandchild = os.fork()
        if grandchild == 0:
            mha_fast.attention(q, k, v, threads=2)
            os._exit(0)
        status = os.waitpid(grandchild, 0)[1]
        same = child.tobytes() == expected.tobytes()
        os._exit(0 if same and status == 0 else 1)
    print(os.waitpid(pid, 0)[1])
expected = mha_fast.attention(q, k, v, causal=True, threads=1)
if parent == "from a thread":
    caller = threading.Thread(target=fork)
    caller.start()
    caller.join()
else:
    fork()
after = mha_fast.attention(q, k, v, causal=True, threads=4)
print(after.tobytes() == expected.tobytes())
"""
    assert output_of(f"{CASE}parent = {parent!r}{script}").split() == ["0", "True"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_process_pools_compute_the_same_bits(tmp_path, method):
    script = tmp_path / "pool.py"
    script.write_text(f"""
{CASE}
import multiprocessing
def work(i):
    return mha_fast.attention(q, k, v, threads=2).tobytes()
if __name__ == "__main__":
    expected = work(0)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        print(all(x == expected for x in pool.map(work, range(4))))
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
q, k, v = (np.resize(x, (1, heads, n, 64)) for x in (q, k, v))
out = np.empty_like(q)
print("ready", flush=True)
start = time.monotonic()
try:
    mha_fast.attention(q, k, v, out=out, threads=threads, **options)
    print("finished", flush=True)
except KeyboardInterrupt:
    print(time.monotonic() - start, flush=True)
small = [x[:, :2, :300] for x in (q, k, v)]
print(np.isfinite(mha_fast.attention(*small)).all())
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("heads", [1, 8])
def test_ctrl_c_interrupts_a_long_call(threads, heads):
    """The call alone would take tens of seconds, at any speed of today's cores."""
    size = f"heads, n, threads, options = {heads}, {2**17 // heads}, {threads}, {{}}"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", f"{CASE}\n{size}\n{INTERRUPTED}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    elapsed, next_call = output.split()
    assert elapsed != "finished"
    assert float(elapsed) < 0.3 + 1
    assert next_call == "True"


# ---- Environment variables ----------------------------------------------------------

SHOW_THREADS = "import mha_fast; print(mha_fast.get_num_threads())"
SHOW_ISA = "from mha_fast import _core; print(_core.get_isa())"


@needs_openmp
def test_variables_set_the_number_of_threads(output_of):
    assert output_of(SHOW_THREADS, MHA_FAST_NUM_THREADS="5") == "5"
    assert output_of(SHOW_THREADS, OMP_NUM_THREADS="3") == "3"
    both = {"MHA_FAST_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}
    assert output_of(SHOW_THREADS, **both) == "5"
    assert output_of(SHOW_THREADS, MHA_FAST_NUM_THREADS="") == output_of(SHOW_THREADS)


@needs_openmp
def test_none_returns_to_the_variable(output_of):
    script = "import mha_fast as m; m.set_num_threads(2); m.set_num_threads(None)\n"
    assert output_of(script + SHOW_THREADS, MHA_FAST_NUM_THREADS="5") == "5"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", " ", "1e3", "\u00b2"])
def test_garbage_in_the_thread_variable_is_an_error_that_names_it(run_python, text):
    process = run_python(SHOW_THREADS, MHA_FAST_NUM_THREADS=text)
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: MHA_FAST_NUM_THREADS=")
    assert last.endswith("expected a positive integer")


@pytest.mark.parametrize("name", _core.isa_names())
def test_isa_variable_forces_an_isa(output_of, name):
    assert output_of(SHOW_ISA, MHA_FAST_ISA=name) == name


def test_empty_isa_variable_means_the_fastest(output_of):
    assert output_of(SHOW_ISA, MHA_FAST_ISA="") == _core.isa_names()[0]


@pytest.mark.parametrize("name", ["avx1024", "AVX2", " "])
def test_garbage_in_the_isa_variable_is_an_error_that_lists_usable_names(run_python, name):
    process = run_python("import mha_fast", MHA_FAST_ISA=name)
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    usable = ", ".join(_core.isa_names())
    assert last == f"ValueError: MHA_FAST_ISA={name!r} is not usable here; " + (f"usable: {usable}")
