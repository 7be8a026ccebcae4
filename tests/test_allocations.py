"""An allocation that fails is a MemoryError: nothing crashes or leaks, and the next call is right.

A library that is loaded before all others makes the n-th allocation of one module fail.
"""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from mha_fast import attention, linear

COMPILER = shutil.which("cc") or shutil.which("gcc")

needs_compiler = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="needs glibc and a C compiler"
)

LIBRARY = """
#include <stddef.h>
#include <stdint.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);

uintptr_t first, past;         /* the code whose allocations count */
long countdown;                /* to the one that fails */
void (*when_it_fails)(void);

static int fails(void *caller)
{
    if ((uintptr_t)caller - first >= past - first || __atomic_sub_fetch(&countdown, 1, 0))
        return 0;
    if (when_it_fails)
        when_it_fails();
    return 1;
}

void *malloc(size_t bytes)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(n, bytes);
}
"""

SETUP = """
import ctypes, sys, threading
import numpy as np, mha_fast
from mha_fast import AttentionState, attention, attention_stats, attention_vjp
from mha_fast import layer_norm_vjp, linear, pack, rotary

shim = ctypes.CDLL(LIBRARY)
countdown = ctypes.c_long.in_dll(shim, "countdown")

def watch(module):
    code = [line.split("-", 1) for line in open("/proc/self/maps") if module in line]
    ctypes.c_size_t.in_dll(shim, "past").value = int(code[-1][1].split()[0], 16)
    ctypes.c_size_t.in_dll(shim, "first").value = int(code[0][0], 16)

rng = np.random.default_rng(0)
def random(*shape):
    return rng.standard_normal(shape, dtype=np.float32)
"""

CALLS = """
few, many, keys = random(8, 64), random(8, 800, 64), random(100_000, 64)
more, halves = keys[:20_000], many.astype(np.float16)
x, weight, bias = random(1500, 512), random(1500, 512), random(1500)
CALLS = {
    "one thread": lambda: attention(few, keys, keys, threads=1),
    "two threads": lambda: attention(many, many, many, threads=2, return_lse=True),
    "split keys": lambda: attention(few, keys, keys, threads=2),
    "weights": lambda: attention(few, keys, keys, threads=2, return_weights=True),
    "state": lambda: AttentionState(few, threads=2).update(keys[:50_000], keys[:50_000]).result(),
    "linear": lambda: linear(x, weight, bias, threads=2),
    "packed": lambda: linear(halves.reshape(-1, 512), pack(weight), bias, threads=2),
    "gradients": lambda: attention_vjp(many, many, many, threads=2)[1](many)[:3],
    "gradients of one head": lambda: attention_vjp(few, more, more, threads=3)[1](few)[:3],
    "statistics": lambda: attention_stats(many, many, many, threads=2)[:4],
    "rotary": lambda: rotary(halves, x[:800, :32], x[:800, 32:64], threads=2),
    "norm": lambda: layer_norm_vjp(x, x[0], threads=2)[1](x)[:2],
}

def outcome_of(call, n):
    countdown.value = n
    try:
        result = call()
    except MemoryError:
        result = None
    reached = countdown.value <= 0
    countdown.value = 0
    return reached, result
"""

EVERY_ONE = """
def attempt(call, n, outcomes):
    # In a new thread, which has no scratch memory yet.
    outcomes += [*outcome_of(call, n), call()]

def same(a, b):
    return all(map(np.array_equal, a, b)) if isinstance(a, tuple) else np.array_equal(a, b)

expected = {name: call() for name, call in CALLS.items()}
watch(MODULE)
for name, call in list(CALLS.items())[:COUNT]:
    reached, n = True, 0
    while reached:
        n, outcomes = n + 1, []
        thread = threading.Thread(target=attempt, args=(call, n, outcomes))
        thread.start()
        thread.join()
        reached, result, later = outcomes
        assert reached == (result is None), f"{name}: the failure of allocation {n} is hidden"
        assert same(later, expected[name]), f"{name}: wrong after the failure of allocation {n}"
    print(n - 1)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    (folder / "fail.c").write_text(LIBRARY)
    built = folder / "fail.so"
    command = [COMPILER, "-O1", "-fPIC", "-shared", folder / "fail.c", "-o", built]
    subprocess.run(command, check=True)
    return str(built)


@pytest.fixture
def output_beside(library, output_of):
    """What a script prints in a process whose allocations can be made to fail."""

    def run(code, **values):
        values = "".join(f"{name} = {x!r}\n" for name, x in {"LIBRARY": library, **values}.items())
        return output_of(values + SETUP + code, timeout=300, LD_PRELOAD=library)

    return run


# Of NumPy's allocations only those of calls without its arithmetic: a ufunc that has no memory for
# its buffers crashes NumPy 2.4, which raises the error without the GIL.
OF_NUMPY = 5


@needs_compiler
@pytest.mark.parametrize(
    ("module", "count"), [("mha_fast/_core", None), ("numpy/_core/_multiarray_umath", OF_NUMPY)]
)
def test_every_failing_allocation_is_a_memory_error(output_beside, module, count):
    output = output_beside(CALLS + EVERY_ONE, MODULE=module, COUNT=count)
    assert all(int(n) for n in output.split()), "no allocation was made to fail"


@needs_compiler
def test_failing_allocations_leak_nothing(output_beside):
    script = """
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena ordblks smblks hblks hblkhd usmblks "
                "fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
def in_use():
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd

watch("mha_fast/_core")
def failures():
    for n in range(80):
        outcome_of(CALLS["split keys"], 1 + n % 4)
failures()
before = in_use()
failures()
print(in_use() - before)
"""
    assert int(output_beside(CALLS + script)) < 2**16


INTERRUPTED = """
import _thread, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell started us so
def interrupt():
    _thread.interrupt_main()
    time.sleep(1)
callback = ctypes.CFUNCTYPE(None)(interrupt)
q, k = random(1, 512, 64), random(1, 131072, 64)
attention(q[:, :64], k[:, :192], k[:, :192], threads=1)
ctypes.c_void_p.in_dll(shim, "when_it_fails").value = ctypes.cast(callback, ctypes.c_void_p).value
watch("mha_fast/_core")
countdown.value = 1
try:
    attention(q, k, k, threads=2)
except BaseException as error:
    print(repr(error))
"""


@needs_compiler
def test_ctrl_c_wins_over_a_thread_without_memory(output_beside):
    assert output_beside(INTERRUPTED) == "KeyboardInterrupt()"


NO_OBJECTS = """
import _testcapi
import numpy as np, mha_fast
q, mask = np.ones((8, 64), np.float32), np.ones((8, 8), bool)
out, bias = np.empty_like(q), np.ones(8, np.float32)
CALLS = [
    lambda: mha_fast.attention(q, q, q),
    lambda: mha_fast.attention(q, q, q, mask, bias=bias, window=[3, None], out=out),
    lambda: mha_fast.attention(q, q, q, return_lse=True, return_weights=True),
    lambda: mha_fast.linear(q, q, bias),
]
for call in CALLS:
    expected, failures = repr(call()), 0
    for n in range(300):
        _testcapi.set_nomemory(n, n + 1)
        try:
            call()
        except MemoryError:
            failures += 1
        finally:
            _testcapi.remove_mem_hooks()
        assert repr(call()) == expected
    print(failures)
"""


def test_no_memory_for_a_python_object_is_a_memory_error(output_of):
    pytest.importorskip("_testcapi", reason="needs CPython's test modules")
    assert all(int(n) for n in output_of(NO_OBJECTS).split())


@pytest.mark.parametrize("width", [2**46, 2**57 + 1, 2**58, 2**59 - 16])
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_rows_too_long_for_any_memory_are_a_memory_error(width, real):
    """Views of stride 0, whose sizes times those of a tile do not fit into an integer."""

    def wide(*shape):
        return np.broadcast_to(real(1), shape)

    with pytest.raises(MemoryError):
        attention(wide(1, width), wide(1, width), wide(1, 3))
    with pytest.raises(MemoryError):
        linear(wide(1, width), wide(2, width))


@needs_compiler
def test_canary_a_hidden_failure_is_found(output_beside):
    hidden = EVERY_ONE.replace("*outcome_of(call, n)", "True, call()")
    with pytest.raises(AssertionError, match="failure of allocation 1 is hidden"):
        output_beside(CALLS + hidden, MODULE="mha_fast/_core", COUNT=None)
