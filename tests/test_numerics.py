"""The accuracy rule under strain, lse identities, and the exponential by itself."""

import os

import judge
import numpy as np
import oracle
import pytest
import sizes
from judge import assert_accurate, assert_same
from sizes import KEY_BLOCK, qkv

from mha_fast import _core, attention

EXHAUSTIVE = os.environ.get("MHA_FAST_TEST_EXHAUSTIVE") == "1"
ULPS = 2  # the design's promise for exp2


@pytest.mark.parametrize("factor", [1, 4, 16])
@pytest.mark.parametrize("head_dim", [5, 64, 128])
def test_large_queries_and_keys_are_accurate(isa, dtype, factor, head_dim):
    q, k, v = qkv(67, KEY_BLOCK + 9, head_dim, batch=(1,), dtype=dtype)
    q, k = (q * factor).astype(dtype), (k * factor).astype(dtype)
    assert_accurate(attention(q, k, v, return_lse=True), q, k, v)


@pytest.mark.parametrize("power", [-30, -10, 3, 10, 30])
def test_extreme_scores_are_accurate(isa, real, power):
    q, k, v = qkv(13, KEY_BLOCK + 9, dtype=real)
    scale = 10.0**power
    assert_accurate(attention(q, k, v, scale=scale), q, k, v, scale=scale)
    if power > 3:  # the largest score takes all
        s = scale * (q.astype(np.longdouble) @ k.swapaxes(-1, -2))
        best = np.take_along_axis(v, s.argmax(axis=-1)[..., None], axis=-2)
        assert_same(attention(q, k, v, scale=scale), best)


@pytest.mark.parametrize("scale", [0, 0.0, -0.0, -1, 1e-30, -0.5, 3, np.float32(0.1)])
def test_any_finite_scale_is_accurate(isa, real, scale):
    q, k, v = qkv(13, KEY_BLOCK + 9, dtype=real)
    result = attention(q, k, v, scale=scale, return_lse=True)
    assert_accurate(result, q, k, v, scale=scale)


def test_negative_scale_equals_negated_queries(isa, real):
    q, k, v = qkv(13, KEY_BLOCK + 9, dtype=real)
    negated = attention(-q, k, v, scale=0.3, return_lse=True)
    assert_same(attention(q, k, v, scale=-0.3, return_lse=True), negated)


def test_values_of_one_sign_are_accurate(isa, real):
    q, k, v = qkv(67, 2 * KEY_BLOCK, 64, dtype=real)
    assert_accurate(attention(q, k, np.abs(v)), q, k, np.abs(v))
    assert_accurate(attention(q, k, np.ones_like(v)), q, k, np.ones_like(v))


@pytest.mark.parametrize("seqlen_q", [1, 33])
def test_long_rows_of_equal_scores_are_accurate(isa, seqlen_q):
    q, k, v = qkv(seqlen_q, 65_536, 3, batch=(), heads=1)
    assert_accurate(
        attention(q, k, np.abs(v), scale=0.0, return_lse=True), q, k, np.abs(v), scale=0.0
    )


def test_descending_and_ascending_scores_are_accurate(isa, real):
    """Each block has a new maximum, or none after the first."""
    q, k, v = qkv(3, 4 * KEY_BLOCK, 1, dtype=real)
    k[..., 0] = np.linspace(-50, 50, k.shape[-2])
    for scale in (1, -1):
        result = attention(np.ones_like(q), k, v, scale=scale, return_lse=True)
        assert_accurate(result, np.ones_like(q), k, v, scale=scale)


def test_subnormal_values_come_through(isa, real):
    q, k, v = qkv(5, 1, dtype=real)
    v = (v * sizes.smallest_normal(real) / 8).astype(real)
    assert_same(attention(q, k, v), np.broadcast_to(v, q.shape))


@pytest.mark.parametrize("storage", sizes.DTYPES[:2], ids=str)
@pytest.mark.parametrize("factor", [1, 4])
def test_sixteen_bits_err_at_most_twice_as_much_as_the_plain_formula(isa, storage, factor):
    q, k, v = qkv(67, 201, 64, dtype=storage)
    q = (q * factor).astype(storage)
    exact = oracle.attention(q, k, v).out
    error = np.abs(attention(q, k, v).astype(float) - exact).max()
    plain_error = np.abs(plain_formula(q, k, v).astype(float) - exact).max()
    one_rounding = judge.rounding(exact, storage).max()
    assert error <= 2 * plain_error + one_rounding


def plain_formula(q, k, v):
    """What NumPy users write, every array in the storage dtype."""

    def rounded(x):
        return x.astype(dtype).astype(np.float32)

    dtype, root = q.dtype, np.sqrt(np.float32(q.shape[-1]))
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    s = rounded(rounded(q @ k.swapaxes(-1, -2)) / root)
    p = rounded(np.exp(rounded(s - s.max(axis=-1, keepdims=True))))
    p = rounded(p / rounded(p.sum(axis=-1, keepdims=True)))
    return (p @ v).astype(dtype)


def test_lse_of_all_keys_is_the_logaddexp_of_parts(isa, real):
    q, k, v = qkv(13, 2 * KEY_BLOCK + 9, dtype=real)
    whole = attention(q, k, v, return_lse=True)
    parts = [
        attention(q, k[:, :, part], v[:, :, part], return_lse=True)
        for part in (slice(0, 101), slice(101, None))
    ]
    lse = np.logaddexp(*(part.lse.astype(np.longdouble) for part in parts))
    out = sum(part.out * np.exp(part.lse - lse)[..., None] for part in parts)
    answer = oracle.attention(q, k, v)
    bound = 2 * judge.lse_bound(answer, real)  # either side may err
    judge.assert_within(np.abs(whole.lse - lse), bound, "lse")
    bound = 2 * judge.out_bound(answer, real) + bound[..., None] * answer.size
    judge.assert_within(np.abs(whole.out - out), bound, "merged out")


def test_exponentials_of_scores_minus_lse_sum_to_one(isa, real):
    q, k, _ = qkv(13, KEY_BLOCK + 9, dtype=real)
    lse = attention(q, k, k, scale=1, return_lse=True).lse
    s = q.astype(np.longdouble) @ k.swapaxes(-1, -2).astype(np.longdouble)
    total = np.exp(s - lse[..., None]).sum(axis=-1)
    bound = judge.lse_bound(oracle.attention(q, k, k, scale=1), real)
    judge.assert_within(np.abs(total - 1), bound, "sum of weights - 1")


def test_constant_bias_moves_the_lse_and_nothing_else(isa, real):
    q, k, v = qkv(13, KEY_BLOCK + 9, dtype=real)
    bias = np.full((1, 1), 30, real)
    result = attention(q, k, v, bias=bias, return_lse=True)
    assert_accurate(result, q, k, v, bias=bias)
    moved = result.lse - attention(q, k, v, return_lse=True).lse
    bound = judge.lse_bound(oracle.attention(q, k, v, bias=bias), real)
    judge.assert_within(np.abs(moved - 30), 2 * bound, "moved lse")


# ---- The exponential ----------------------------------------------------------------


def bits_between(low, high, step):
    """Negative floats from `high` down to `low`, every `step`-th."""
    bits = np.array([high, low], np.float32).view(np.uint32)
    for start in range(int(bits[0]), int(bits[1]) + 1, step << 22):
        stop = min(start + (step << 22), int(bits[1]) + 1)
        yield np.arange(start, stop, step, dtype=np.uint32).view(np.float32)


def ulps(y, exact):
    """Error in units of the last place of the exact result."""
    return np.abs((y - exact) / np.spacing(exact.astype(y.dtype)).astype(exact.dtype))


SWEEPS = {  # from, to, every n-th float
    "normal range": (-0.0, -126, 61),
    "near zero": (-(2.0**-24), -(2.0**-20), 3),
    "dense": (-0.375, -0.5, 1),
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_exp2_of_float32_is_within_its_ulps_and_rises_by_one_at_most(isa, sweep):
    high, low, step = SWEEPS[sweep]
    step = 1 if EXHAUSTIVE else 17 * step if isa == "generic" and step > 1 else step
    previous = np.float32(1)
    for x in bits_between(low, high, step):
        y = _core.exp2(x)
        worst = ulps(y, np.exp2(x.astype(np.float64))).max()
        assert worst <= ULPS, f"{worst} ulp"
        # Towards -inf. Neighbours may swap: a Horner step rounds as coarsely as its result.
        assert (np.diff(y, prepend=previous) <= np.spacing(y)).all()
        previous = y[-1]


def test_exp2_of_float64_is_within_its_ulps_and_monotone(isa):
    rng = np.random.default_rng(0)
    n = 10_000 if isa == "generic" else 200_000
    far = -rng.uniform(0, 1022, n)
    near = -np.exp2(rng.uniform(-60, 0, n))
    ties = -np.arange(1022) - 0.5
    around = [ties, np.nextafter(ties, 0), np.nextafter(ties, -9999), np.round(ties)]
    x = np.sort(np.concatenate([far, near, *around]))[::-1].copy()
    y = _core.exp2(x)
    worst = ulps(y, np.exp2(x.astype(np.longdouble))).max()
    assert worst <= ULPS, f"{worst} ulp"
    assert (np.diff(y) <= 0).all()


def test_exp2_is_exact_at_zero_and_minus_infinity_and_keeps_nan(isa, real):
    y = _core.exp2(np.array([0, -0.0, -np.inf, np.nan, -1, -10, -100], real))
    expected = np.array([1, 1, 0, np.nan, 2.0**-1, 2.0**-10, 2.0**-100], real)
    assert np.array_equal(y, expected, equal_nan=True)
    assert not np.signbit(y[2])


def test_exp2_below_the_normal_numbers_falls_to_zero(isa, real):
    lowest = np.log2(sizes.smallest_normal(real))
    x = np.linspace(lowest, 4 * lowest, 10_001).astype(real)
    x = np.append(x, [sizes.lowest(real), -np.inf]).astype(real)
    y = _core.exp2(x)
    assert (np.diff(y) <= 0).all() and (y >= 0).all()
    assert (y[x < lowest - 1] == 0).all()


@pytest.mark.parametrize("length", sorted({0, 1, *sizes.around(4, 8, 16), 101}))
def test_exp2_of_any_length_has_the_bits_of_every_isa(real, length):
    x = (-np.abs(sizes.random(length, seed=4)) * 40).astype(real)
    (_, first), *others = sizes.on_every_isa(lambda: _core.exp2(x))
    for name, y in others:
        assert_same(y, first, name)
    assert first.shape == x.shape


TANH_ULPS = {"float32": 2.6, "float64": 3.1}  # as csrc/exp2.inc.h says


def tanh_error(z):
    """In units of the last place; z is 2 log2(e) x."""
    wide = np.float64 if z.dtype == np.float32 else np.longdouble
    exact = np.tanh(z.astype(wide) * np.log(wide(2)) / 2)
    return ulps(_core.tanh(z), exact).max()


@pytest.mark.parametrize("exponent", range(-24, 6))
def test_tanh_of_float32_is_within_its_ulps(isa, exponent):
    low, high = (np.float32(2.0**n).view(np.int32) for n in (exponent, exponent + 1))
    step = 1 if EXHAUSTIVE else 997 if isa == "generic" else 31
    for start in range(low, high, 2**22):
        z = np.arange(start, min(high, start + 2**22), step, np.int32).view(np.float32)
        assert max(tanh_error(z), tanh_error(-z)) <= TANH_ULPS["float32"]


def test_tanh_of_float64_is_within_its_ulps(isa):
    z = np.exp2(np.random.default_rng(0).uniform(-60, 6, 10_000 if isa == "generic" else 200_000))
    assert max(tanh_error(z), tanh_error(-z)) <= TANH_ULPS["float64"]


def test_tanh_at_its_ends_and_of_nan(isa, real):
    info = np.finfo(real)
    z = np.array([0, np.inf, -np.inf, np.nan, info.max, -info.max, 200, -200], real)
    expected = np.array([0, 1, -1, np.nan, 1, -1, 1, -1], real)
    assert np.array_equal(_core.tanh(z), expected, equal_nan=True)


def test_tanh_has_the_bits_of_every_isa(real):
    z = np.append(sizes.random(1001, dtype=real) * 10, [0, np.inf, -np.inf]).astype(real)
    (_, first), *others = sizes.on_every_isa(lambda: _core.tanh(z))
    for name, y in others:
        assert_same(y, first, name)
