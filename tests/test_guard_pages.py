"""No byte beside an argument is touched: arguments lie against pages that kill who touches them.

The cases run in child processes, which name each before they run it.
"""

import ctypes
import mmap
import signal
import sys
from pathlib import Path
from random import Random

import numpy as np
import oracle
import pytest
import sizes
from judge import assert_same, compute_dtype
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided
from options import INTERVALS, OPTIONS, PAIRS, pair_of
from sizes import KEY_BLOCK, random
from test_layout import WRITEABLE, heads_after_sequence, misaligned

from mha_fast import (
    _core,
    attention,
    attention_stats,
    attention_vjp,
    layer_norm,
    linear,
    pack,
    rms_norm,
    rotary,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")

PAGE = mmap.PAGESIZE
SIDES = ("start", "end")
AXES = {row.argument: row.axes for row in OPTIONS.values()}
INTERVAL_ARGUMENTS = {x for n in INTERVALS for x in (OPTIONS[n].argument, *OPTIONS[n].beside)}
DIMS = range(1, 81)
KEYS = sorted({1, 2, 3} | sizes.around(*sizes.VECTOR.values(), 64, KEY_BLOCK, 2 * KEY_BLOCK))


# ---- In the child process ------------------------------------------------------------------------


def against_guard(x, side, seen):
    """The numbers of `x` with the same strides, and forbidden pages up to where `seen`, a view of
    `x`, starts, or from where it ends. Bytes between the numbers are NaN."""
    low, high = byte_bounds(x)
    edge = byte_bounds(seen)[SIDES.index(side)] - low
    start = PAGE + -edge % PAGE
    pages = (start + high - low) // PAGE + 2
    memory = np.frombuffer(mmap.mmap(-1, pages * PAGE), np.uint8)
    memory[...] = 255
    first = np.ndarray((), x.dtype, memory, start + x.ctypes.data - low)
    moved = as_strided(first, x.shape, x.strides)
    moved[...] = x
    forbidden = memory[: start + edge] if side == "start" else memory[start + edge :]
    address = ctypes.c_void_p(forbidden.ctypes.data)
    assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(forbidden.nbytes), 0) == 0
    return moved


def seen_part(name, x, keys):
    """What may be touched of an argument if only these keys are in the interval of a row."""
    if name in ("k", "v"):
        return x[..., keys, :]
    return x[..., keys] if AXES.get(name, "").endswith("k") and x.shape[-1] > 1 else x


def run_case(name, function, arrays, keys=slice(None), **options):
    print(function.__name__, name, flush=True)
    expected = function(**arrays, **options)
    for side in SIDES:
        print(side, function.__name__, name, flush=True)
        moved = {n: against_guard(x, side, seen_part(n, x, keys)) for n, x in arrays.items()}
        assert_same(function(**moved, **options), expected)


def row_counts(isa, dtype, draw):
    """One, and some around the full decode tile and the full prefill tile."""
    edges = {2, 3, 4, 5} | sizes.around(sizes.FEW[isa], sizes.tile(isa, dtype))
    return [1, *draw.sample(sorted(edges), 3)]


def keys_in_reach(options, rows, keys):
    """From the first to the last key that is in the interval of a row."""
    structure = {name: x for name, x in options.items() if name in INTERVAL_ARGUMENTS}
    reached = np.flatnonzero(oracle.visible(rows, keys, **structure).any(axis=-2))
    return slice(reached[0], reached[-1] + 1) if reached.size else slice(0)


def attention_cases(isa, dtype):
    """Every head_dim, dense and strided; the rest by chance."""
    draw = Random(0)
    for head_dim in DIMS:
        for rows in row_counts(isa, dtype, draw):
            keys, dim_v = draw.choice(KEYS), draw.choice(DIMS)
            names = draw.choice([*PAIRS, *zip(OPTIONS, OPTIONS, strict=True)])
            wide = draw.choice([dtype, *(r for r in sizes.REALS if r.itemsize >= dtype.itemsize)])
            q = random(2, rows, head_dim, dtype=wide)
            k = random(draw.choice([1, 2]), keys, head_dim, dtype=dtype, seed=1)
            v = random(len(k), keys, dim_v, dtype=dtype, seed=2)
            options = pair_of(names, q, k, v)
            arrays = {"q": q, "k": k, "v": v}
            for name in [n for n in AXES if isinstance(options.get(n), np.ndarray)]:
                x = options.pop(name)
                own = [x.dtype] if x.dtype != np.float32 else sizes.DTYPES
                arrays[name] = x.astype(draw.choice(own))
            arrays["out"] = np.full((2, rows, dim_v), np.nan, np.result_type(wide, dtype))
            options["return_weights"] = draw.random() < 0.2
            reach = keys_in_reach(options | arrays, rows, keys)
            for layout in (np.copy, draw.choice(WRITEABLE)):
                axes = 3 if layout is heads_after_sequence else 2
                moved = {n: layout(x) if x.ndim >= axes else x for n, x in arrays.items()}
                name = f"{layout.__name__} {names} {[x.shape for x in arrays.values()]} {wide}"
                run_case(name, attention, moved, reach, **options, return_lse=True)


def times_packed(x, panels, bias, outputs):
    bias = np.require(bias, compute_dtype(x.dtype), ["C", "ALIGNED"])
    return _core.linear_packed(x, panels, outputs, bias, None)


def linear_cases(isa, dtype):
    draw = Random(0)
    layouts = [layout for layout in WRITEABLE if layout is not heads_after_sequence]
    for width in DIMS:
        for rows in row_counts(isa, dtype, draw):
            outputs = draw.choice(KEYS)
            for layout in (np.copy, draw.choice(layouts)):
                arrays = {
                    "x": layout(random(rows, width, dtype=dtype)),
                    "weight": layout(random(outputs, width, dtype=dtype, seed=1)),
                    "bias": draw.choice([np.copy, misaligned])(random(outputs, dtype=dtype)),
                }
                run_case(f"{layout.__name__} {rows} x {width} x {outputs}", linear, arrays)
            arrays["panels"] = pack(arrays.pop("weight")).panels
            run_case(f"packed {rows} x {width} x {outputs}", times_packed, arrays, outputs=outputs)


def pulled(q, k, v, d_out, **options):
    """Gradients in a row."""
    found = attention_vjp(q, k, v, **options)[1](d_out)
    return np.concatenate([x.ravel() for x in found[:3]])


def measured(q, k, v, **options):
    """Statistics in a row."""
    return np.concatenate([x.ravel() for x in attention_stats(q, k, v, top=3, **options)])


def carried_on(q, k, v, o, sums):
    """A state after keys, and after another run, in a row."""
    state = _core.attend_from(_core.ask(q, k, v), (o, sums), None, False, None)
    nothing = _core.ask(q, k[..., :0, :], v[..., :0, :])
    done = _core.attend_from(nothing, state, (o, sums), True, None)
    return np.concatenate([x.ravel() for x in (*state, *done)])


def backward_cases(isa, dtype):
    """Gradients, statistics and states, of every third head_dim and of options by chance."""
    draw = Random(0)
    for head_dim in DIMS[::3]:
        for rows in row_counts(isa, dtype, draw):
            keys, dim_v = draw.choice(KEYS), draw.choice(DIMS)
            names = draw.choice([*PAIRS, *zip(OPTIONS, OPTIONS, strict=True)])
            q = random(2, rows, head_dim, dtype=dtype)
            k = random(draw.choice([1, 2]), keys, head_dim, dtype=dtype, seed=1)
            arrays = {"q": q, "k": k, "v": random(len(k), keys, dim_v, dtype=dtype, seed=2)}
            options = pair_of(names, *arrays.values())
            reach = keys_in_reach(options, rows, keys)
            d_out = random(2, rows, dim_v, dtype=dtype, seed=3)
            layout = draw.choice([x for x in WRITEABLE if x is not heads_after_sequence])
            for place in (np.copy, layout):
                moved = {n: place(x) for n, x in arrays.items()}
                name = f"{place.__name__} {names} {[x.shape for x in arrays.values()]}"
                run_case(name, pulled, moved | {"d_out": place(d_out)}, reach, **options)
                run_case(name, measured, moved, reach, **options)
            state = {"o": random(2, rows, dim_v, dtype=compute_dtype(dtype)),
                     "sums": abs(random(2, rows, 2, dtype=compute_dtype(dtype)))}  # fmt: skip
            run_case(name, carried_on, arrays | state)


def norm_of_sum(x, residual, weight):
    """A norm, and its sum, in a row."""
    return np.concatenate(rms_norm(x, weight, residual=residual))


def row_cases(isa, dtype):
    """Rotary and norms: functions of rows."""
    draw = Random(0)
    for width in DIMS:
        rows, pairs = draw.choice([1, 5, 63, 64, 65, 130]), draw.randint(0, width // 2)
        for layout in (np.copy, draw.choice(WRITEABLE)):
            x = layout(random(2, rows, width, dtype=dtype))
            tables = {name: random(rows, pairs, dtype=dtype) for name in ("cos", "sin")}
            name = f"{layout.__name__} {rows} x {width}, {pairs} pairs"
            for interleaved in (False, True):
                run_case(name, rotary, {"x": x} | tables, interleaved=interleaved)
        weight, bias = random(width, dtype=dtype), random(width, dtype=dtype, seed=1)
        run_case(name, layer_norm, {"x": x, "weight": weight, "bias": bias})
        run_case(name, norm_of_sum, {"x": x, "residual": x.copy(), "weight": weight})


# ---- In the test's process -----------------------------------------------------------------------


@pytest.fixture
def run_child(run_python):
    def run(code, **variables):
        folder = str(Path(__file__).parent)
        here = f"import sys; sys.path.insert(0, {folder!r}); from test_guard_pages import *\n"
        return run_python(here + code, timeout=300, **variables)

    return run


def assert_alive(process):
    last = process.stdout.splitlines()[-1:]
    assert process.returncode == 0, f"died of {process.returncode} at {last}: {process.stderr}"


CASES = [attention_cases, linear_cases, backward_cases, row_cases]


@pytest.mark.parametrize("cases", CASES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("isa", _core.isa_names())
def test_no_byte_beside_an_argument_is_touched(run_child, dtype, isa, cases):
    script = f"{cases.__name__}({isa!r}, np.dtype({dtype.name!r}))"
    assert_alive(run_child(script, MHA_FAST_ISA=isa))


def test_split_keys_are_not_read_past_their_end(run_child):
    script = f"""
q, k, v = sizes.qkv(3, 70 * {KEY_BLOCK} + 5, 67, batch=(), kv_heads=1)
run_case("split", attention, {{"q": q, "k": k, "v": v}}, threads=3)
"""
    assert_alive(run_child(script))


@pytest.mark.parametrize("side", SIDES)
def test_canary_a_byte_beside_an_array_kills(run_child, side):
    script = f"""
x = np.arange(5, dtype=np.uint8)
x = against_guard(x, {side!r}, x)
print(x)
as_strided(x[{SIDES.index(side)} * 4 :], (2,), (2 * {SIDES.index(side)} - 1,))[1]
"""
    process = run_child(script)
    assert process.returncode == -signal.SIGSEGV
    with pytest.raises(AssertionError, match=r"at \['\[0 1 2 3 4\]'\]"):
        assert_alive(process)


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_canary_a_read_of_one_number_too_many_is_named(run_child, argument):
    script = f"""
arrays = {{name: np.ones((2, 5, 7), np.float32) for name in "qkv"}}
less = arrays[{argument!r}][..., :-1]
arrays[{argument!r}] = against_guard(arrays[{argument!r}], "end", less)
print("guilty", flush=True)
attention(**arrays)
"""
    with pytest.raises(AssertionError, match="at .*guilty"):
        assert_alive(run_child(script))
