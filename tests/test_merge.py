"""Parts of the keys put together: exact, and deaf to those that weigh nothing."""

import numpy as np
import pytest
import sizes
from hypothesis import given, strategies
from judge import assert_accurate, assert_same
from sizes import qkv

import mha_fast
from mha_fast import attention, merge, reference

FUNCTIONS = pytest.mark.parametrize("function", [merge, reference.merge])
NAN = np.float32(np.nan)


def results_of(q, k, v, cuts):
    """Attention over the keys between each two of `cuts`."""
    parts = [slice(*pair) for pair in zip(cuts, cuts[1:], strict=False)]
    return [attention(q, k[..., p, :], v[..., p, :], return_lse=True) for p in parts]


def merged(results, function=merge):
    return function(*zip(*results, strict=True))


def one_row(*values, dtype=np.float32):
    """Parts of one row, head_dim_v 1."""
    return [np.full((1, 1), value, dtype) for value in values]


def lse_of(*values, dtype=np.float32):
    return [np.full(1, value, dtype) for value in values]


@FUNCTIONS
@pytest.mark.parametrize("cuts", [(0, 300), (0, 1, 300), (0, 100, 100, 257, 300)], ids=str)
def test_merged_parts_are_as_accurate_as_one_call(dtype, cuts, function):
    """Parts of 16-bit results are rounded before they meet, so these come as float32."""
    q, k, v = qkv(13, 300, 16, 5, heads=4, kv_heads=2, dtype=dtype)
    if dtype.itemsize < 4:
        q, k, v = (x.astype(np.float32) for x in (q, k, v))
    assert_accurate(merged(results_of(q, k, v, cuts), function), q, k, v)


@given(strategies.lists(strategies.integers(0, 67), max_size=9), strategies.integers(0, 2**32))
def test_any_parts_in_any_order_are_accurate(cuts, seed):
    q, k, v = qkv(3, 67, seed=seed)
    results = results_of(q, k, v, [0, *sorted(cuts), 67])
    np.random.default_rng(seed).shuffle(results)
    assert_accurate(merged(results), q, k, v)


@FUNCTIONS
def test_parts_that_saw_nothing_change_no_bit_of_one_that_did(dtype, function):
    q, k, v = qkv(13, 67, dtype=dtype)
    results = results_of(q, k, v, (0, 0, 67, 67))
    assert_same(merged(results, function), results[1])


@FUNCTIONS
def test_row_that_saw_nothing_anywhere_is_zero(function):
    out, lse = function(one_row(NAN, np.inf), lse_of(-np.inf, -np.inf))
    assert out == 0 and lse == -np.inf


@FUNCTIONS
@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf], ids=str)
def test_a_part_that_weighs_nothing_is_never_read(function, hidden):
    out, lse = function(one_row(hidden, 2, hidden), lse_of(-np.inf, 1, -np.inf))
    assert out == 2 and lse == 1


@FUNCTIONS
@pytest.mark.parametrize("weight", [0, -1e4, 30])
def test_a_nan_that_weighs_something_shows(function, weight):
    """Also where its weight is too small for a float."""
    assert np.isnan(function(one_row(NAN, 2), lse_of(weight, 0)).out)


@FUNCTIONS
def test_an_unknown_weight_makes_the_row_unknown(function):
    assert all(np.isnan(x) for x in function(one_row(1, 2), lse_of(NAN, 0)))


def test_shared_prefix_broadcasts_to_every_row_of_the_batch():
    q, k, v = qkv(5, 67, batch=(3,), heads=2)
    prefix = attention(q, k[:1, :, :20], v[:1, :, :20], return_lse=True)
    alone = [attention(q, k[:, :, 20:], v[:, :, 20:], return_lse=True)]
    k[1:, :, :20], v[1:, :, :20] = k[0, :, :20], v[0, :, :20]
    assert_accurate(merged([prefix, *alone]), q, k, v)
    outs, lses = zip(*results_of(q[0], k[0], v[0], (0, 20, 67)), strict=True)
    wide = merge([outs[0], np.stack([outs[1]] * 3)], lses)
    for out, lse in zip(*wide, strict=True):
        assert_same(mha_fast.AttentionResult(out, lse), merge(outs, lses))
    assert_same(merge(outs, [lses[0][None], lses[1]]).lse, merge(outs, lses).lse[None])


def test_one_stacked_array_is_a_sequence_of_parts():
    q, k, v = qkv(5, 40)
    outs, lses = zip(*results_of(q, k, v, (0, 20, 40)), strict=True)
    assert_same(merge(np.stack(outs), np.stack(lses)), merge(outs, lses))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [("ee", "e"), ("ef", "f"), ("fd", "d"), ("ff", "f")],
)
@FUNCTIONS
def test_dtype_is_that_of_the_outs(dtypes, expected, function):
    outs = [np.ones((2, 3), dtype) for dtype in dtypes]
    out, lse = function(outs, [np.zeros(2)] * 2)
    assert out.dtype == expected and lse.dtype == ("d" if expected == "d" else "f")
    assert (out == 1).all()


def test_float16_beside_bfloat16_is_float32():
    outs = [np.ones((1, 1), np.float16), np.ones((1, 1), sizes.BFLOAT16)]
    assert merge(outs, lse_of(0, 0)).out.dtype == np.float32


def test_huge_outs_do_not_overflow_on_the_way():
    huge = np.finfo(np.float32).max
    out, _ = merge(one_row(huge, huge, huge), lse_of(80, 80, 80))
    assert out == huge


F4 = np.zeros((4, 5, 8), np.float32)
ROWS = np.zeros((4, 5), np.float32)
ERRORS = [
    ([], [], ValueError, "outs has 0 parts, expected at least one"),
    ([F4, F4], [ROWS], ValueError, "lses has 1 parts, expected 2 as in outs"),
    ([F4, F4[..., :3]], [ROWS] * 2, ValueError, r"outs\[1\] has head_dim_v 3, expected 8"),
    ([F4, F4[:3]], [ROWS] * 2, ValueError, r"do not broadcast: found .*\(3, 5\).* expected"),
    ([F4], [ROWS[:, :2]], ValueError, r"found \(4, 5\), \(4, 2\), expected shapes \(\.\.\., heads"),
    ([F4.astype(int)], [ROWS], TypeError, r"outs\[0\] has dtype int64, expected float16"),
    ([F4], [ROWS > 0], TypeError, r"lses\[0\] has dtype bool, expected float16"),
    ([F4[0, 0]], [ROWS], ValueError, r"outs\[0\] has shape \(8,\), expected at least \(seqlen_q"),
    ([F4], [np.float32(0)], ValueError, r"lses\[0\] has shape \(\), expected at least \(seqlen_q"),
]


@pytest.mark.parametrize(("outs", "lses", "error", "message"), ERRORS)
def test_errors_name_argument_found_and_expected(outs, lses, error, message):
    with pytest.raises(error, match=message):
        merge(outs, lses)


def test_empty_axes_are_merged_like_any():
    out, lse = merge([F4[:, :0]] * 2, [ROWS[:, :0]] * 2)
    assert out.shape == (4, 0, 8) and lse.shape == (4, 0)


def test_canary_a_mean_of_the_parts_is_caught():
    q, k, v = qkv(5, 67)
    a, b = results_of(q, k, v, (0, 20, 67))
    with pytest.raises(AssertionError, match="out: .* are wrong"):
        assert_accurate((a.out + b.out) / 2, q, k, v)
