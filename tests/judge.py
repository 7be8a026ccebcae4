"""The verdicts: the accuracy rule of the design, and equality to the bit.

FACTOR is the one literal tolerance of all tests.
"""

import ml_dtypes
import numpy as np
import oracle

FACTOR = 4


def compute_dtype(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def tolerance(score, compute):
    """FACTOR (1 + max|score|) eps, the maximum over the rows of each head."""
    most = score.max(axis=-1, keepdims=True, initial=0)
    return FACTOR * (1 + np.broadcast_to(most, score.shape)) * np.finfo(compute).eps


def out_bound(answer, compute):
    """Below the normal numbers exp2 falls to 0, which shows where a sink has the weight: a normal
    number for each of a thousand keys."""
    tiny = 2**10 * np.finfo(compute).smallest_normal
    return tolerance(answer.score, compute)[..., None] * answer.size + tiny


def lse_bound(answer, compute):
    """The rule for lse: an error of all scores moves it, so cancellation counts."""
    exact = np.where(answer.lse == -np.inf, 0, answer.lse)
    return tolerance(answer.gross, compute) + rounding(exact, compute)


def weights_bound(answer, compute):
    """The rule for weights, which are the sums of one value of 1; below the normal numbers
    exp2 falls to 0."""
    tiny = np.finfo(compute).smallest_normal
    return tolerance(answer.score, compute)[..., None] * answer.weights + tiny


def product_bound(x, weight, bias, compute):
    """|x| |W|^T + |bias|, each term rounded once for every step of its chain at most (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1)."""
    size = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    return (x.shape[-1] + 2) * np.finfo(compute).eps / 2 * size + np.finfo(compute).tiny


def rounding(x, dtype):
    """Half a unit in the last place of `x` in a storage dtype."""
    info = ml_dtypes.finfo(dtype)
    return np.abs(x) * float(info.eps) / 2 + float(info.smallest_subnormal) / 2


def assert_within(error, bound, what):
    """Every error is within its bound. NaN in either is a failure."""
    assert np.isfinite(bound).all(), f"{what}: the bound is not finite"
    bad = ~(error <= bound)
    if bad.any():
        at = np.unravel_index(np.argmax(bad), bad.shape)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} are wrong, the first at "
            f"{tuple(map(int, at))}: error {error[at]:.3g}, bound {bound[at]:.3g}"
        )


def assert_near(result, expected, size, what="results"):
    """Equal but for FACTOR roundings of numbers of that size; infinities are equal."""
    with np.errstate(invalid="ignore"):
        error = np.where(result == expected, 0, np.abs(result - expected))
    bound = FACTOR * np.finfo(compute_dtype(result.dtype)).eps * size
    assert_within(error, np.broadcast_to(bound, error.shape), what)


def assert_accurate(result, q, k, v, mask=None, *, out64=None, **options):
    """`result` is `out` or a named tuple: |out - out64| <= FACTOR (1 + max|score|) eps
    sum p|v|, and one rounding to the storage dtype."""
    out, lse, weights = parts(result)
    compute = compute_dtype(out.dtype)
    wide = np.longdouble if compute == np.float64 else np.float64
    answer = oracle.attention(q, k, v, mask, wide=wide, **options)
    exact = answer.out if out64 is None else out64
    assert out.dtype == np.result_type(q, k, v), f"out has dtype {out.dtype}"
    assert out.shape == exact.shape, f"out has shape {out.shape}, not {exact.shape}"
    bound = out_bound(answer, compute) + rounding(exact, out.dtype)
    assert_within(np.abs(out.astype(wide) - exact), bound, "out")
    if lse is not None:
        assert lse.dtype == compute and lse.shape == answer.lse.shape
        empty = answer.lse == -np.inf
        assert np.array_equal(lse == -np.inf, empty), "lse -inf in the wrong rows"
        error = np.abs(np.where(empty, 0, lse) - np.where(empty, 0, answer.lse))
        assert_within(error, lse_bound(answer, compute), "lse")
    if weights is not None:
        assert weights.dtype == compute and weights.shape == answer.weights.shape
        assert (weights[answer.weights == 0] == 0).all(), "weights of hidden keys"
        error = np.abs(weights - answer.weights)
        assert_within(error, weights_bound(answer, compute), "weights")


def parts(result):
    """out, lse and weights; None for what was not asked for."""
    if not isinstance(result, tuple):
        return result, None, None
    if not hasattr(result, "weights"):
        return (*result, None)
    return result.out, getattr(result, "lse", None), result.weights


def bits(x):
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def assert_same(a, b, what="results"):
    """The same dtype, shape and bits, or tuples of such. -0 differs from +0."""
    if isinstance(a, tuple):
        for name, x, y in zip(a._fields, a, b, strict=True):
            assert_same(x, y, f"{name} of {what}")
        return
    assert a.dtype == b.dtype, f"{what}: {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"{what}: {a.shape} and {b.shape}"
    differ = bits(a) != bits(b)
    if differ.any():
        at = np.unravel_index(np.argmax(differ), differ.shape)
        raise AssertionError(
            f"{what}: {differ.sum()} of {differ.size} differ, the first at "
            f"{tuple(map(int, at))}: {a[at]!r} and {b[at]!r}"
        )
