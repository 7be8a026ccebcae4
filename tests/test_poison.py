"""Masked means never read; a NaN that is seen always shows, in the rows that see it."""

import numpy as np
import oracle
import pytest
import sizes
from judge import assert_same
from options import INTERVALS, OPTIONS, PAIRS, pair_of
from sizes import KEY_BLOCK, qkv, random_mask

from mha_fast import attention, reference

POISONS = [np.nan, np.inf, -np.inf]
SEQLEN_Q, SEQLEN_K = 67, 2 * KEY_BLOCK + 9
SLOTS = [0, 40, KEY_BLOCK, KEY_BLOCK + 70, SEQLEN_K - 1]


def arrays(dtype=np.float32):
    return qkv(SEQLEN_Q, SEQLEN_K, 5, 9, dtype=dtype)


def seen(options):
    """Which keys each row sees: (2, 2, SEQLEN_Q, SEQLEN_K)."""
    return oracle.attention(*arrays(), wide=np.float64, **options).weights > 0


def hides(option, rows):
    """Is there a key that all, or some rows do not see?"""
    return rows(~seen(option(*arrays())), axis=-2).any()


HIDING = [name for name in OPTIONS if hides(OPTIONS[name], np.all)]
PARTLY = [name for name in OPTIONS if hides(OPTIONS[name], np.any)]


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_poison_in_slots_that_no_row_sees_changes_no_bit(isa, dtype, hiding, poison):
    assert_poison_is_not_read(OPTIONS[hiding](*arrays()), poison, dtype)


@pytest.mark.parametrize("names", [x for x in PAIRS if {*x} & {*PARTLY}], ids=" and ".join)
def test_poison_that_two_options_hide_changes_no_bit(isa, names):
    assert_poison_is_not_read(pair_of(names, *arrays()), np.nan, np.float32)


def assert_poison_is_not_read(options, poison, dtype):
    """Not in hidden keys, not in their values, not in both."""
    ask = options | {"return_lse": True, "return_weights": True}
    expected = attention(*arrays(dtype), **ask)
    hidden = ~seen(options).any(axis=-2)
    for name in ("k", "v", "kv"):
        q, k, v = arrays(dtype)
        for x, poisoned in ((k, "k" in name), (v, "v" in name)):
            x[hidden] = poison if poisoned else 0
        assert_same(attention(q, k, v, **ask), expected, f"results with poison in {name}")


@pytest.mark.parametrize("hiding", PARTLY)
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_poison_in_a_value_reaches_the_rows_that_see_it(isa, real, hiding, poison):
    q, k, v = arrays(real)
    options = OPTIONS[hiding](q, k, v)
    for slot in SLOTS:
        v = arrays(real)[2]
        expected = attention(q, k, v, return_lse=True, **options)
        v[:, :, slot, 4] = poison
        expected.out[..., 4][seen(options)[..., slot]] = poison
        result = attention(q, k, v, return_lse=True, **options)
        assert_same(result.lse, expected.lse)
        assert_equal_with_nan(result.out, expected.out)
        with np.errstate(invalid="ignore"):
            simple = reference.attention(q, k, v, **options)
        assert np.array_equal(np.isfinite(simple), np.isfinite(expected.out))


@pytest.mark.parametrize("hiding", PARTLY)
def test_nan_in_a_key_reaches_the_rows_that_see_it(isa, real, hiding):
    q, k, v = arrays(real)
    options = OPTIONS[hiding](q, k, v)
    for slot in SLOTS:
        k = arrays(real)[1]
        expected = attention(q, k, v, return_lse=True, **options)
        k[:, :, slot, 2] = np.nan
        rows = seen(options)[..., slot]
        expected.out[rows] = np.nan
        expected.lse[rows] = np.nan
        result = attention(q, k, v, return_lse=True, **options)
        assert_equal_with_nan(result.out, expected.out)
        assert_equal_with_nan(result.lse, expected.lse)


@pytest.mark.parametrize("row", [0, 1, 40, SEQLEN_Q - 1])
def test_nan_in_a_query_reaches_its_own_row(isa, dtype, row):
    q, k, v = qkv(SEQLEN_Q, SEQLEN_K, 5, 9, heads=4, kv_heads=2, dtype=dtype)
    expected = attention(q, k, v, return_lse=True)
    q[1, 2, row, 3] = np.nan
    expected.out[1, 2, row] = np.nan
    expected.lse[1, 2, row] = np.nan
    result = attention(q, k, v, return_lse=True)
    assert_equal_with_nan(result.out, expected.out)
    assert_equal_with_nan(result.lse, expected.lse)


def test_nan_in_a_query_that_sees_nothing_is_not_read(isa, real):
    q, k, v = qkv(5, 3, dtype=real)
    q[:, :, :2] = np.nan
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -np.inf).all()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30], ids=str)
@pytest.mark.parametrize("argument", ["mask", "bias"])
@pytest.mark.parametrize("hiding", INTERVALS)
def test_mask_slots_outside_the_interval_are_not_read(isa, real, argument, garbage, hiding):
    q, k, v = arrays(real)
    options = OPTIONS[hiding](q, k, v)
    mask = np.broadcast_to(sizes.random(SEQLEN_Q, SEQLEN_K), (2, 2, SEQLEN_Q, SEQLEN_K))
    expected = attention(q, k, v, return_lse=True, **options, **{argument: mask})
    mask = np.where(seen(options), mask, garbage).astype(np.float32)
    result = attention(q, k, v, return_lse=True, **options, **{argument: mask})
    assert_same(result, expected)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30], ids=str)
def test_bias_behind_the_mask_is_not_read(isa, real, garbage):
    q, k, v = qkv(SEQLEN_Q, SEQLEN_K, 5, dtype=real)
    mask = random_mask(SEQLEN_Q, SEQLEN_K)
    bias = sizes.random(SEQLEN_Q, SEQLEN_K)
    expected = attention(q, k, v, mask, bias=bias, return_lse=True)
    bias[~mask] = garbage
    assert_same(attention(q, k, v, mask, bias=bias, return_lse=True), expected)


@pytest.mark.parametrize("argument", ["mask", "bias"])
def test_nan_in_a_mask_slot_that_is_seen_shows(isa, real, argument):
    q, k, v = qkv(SEQLEN_Q, SEQLEN_K, 5, dtype=real)
    mask = np.zeros((SEQLEN_Q, SEQLEN_K), np.float32)
    expected = attention(q, k, v, causal=True, return_lse=True)
    mask[40, 300] = mask[41, SEQLEN_K - 1] = np.nan  # the second is hidden by causal
    expected.out[:, :, 40] = np.nan
    expected.lse[:, :, 40] = np.nan
    result = attention(q, k, v, causal=True, return_lse=True, **{argument: mask})
    assert_equal_with_nan(result.out, expected.out)
    assert_equal_with_nan(result.lse, expected.lse)


def test_score_of_minus_infinity_from_a_key_is_the_same_alone_and_in_a_tile(isa, real):
    q, k, v = qkv(5, 13, 4, batch=(), heads=1, dtype=real)
    q, k[0, 12], v[0, 12] = np.abs(q), -np.inf, np.nan
    together = attention(q, k, v, causal=True)
    alone = attention(q[:, 4:], k, v, causal=True)
    assert_equal_with_nan(together[:, 4:], alone)


def test_canary_a_leak_is_caught():
    q, k, v = qkv(3, 5)
    expected = attention(q, k, v)
    v[:, :, 4] = np.inf
    with pytest.raises(AssertionError, match="differ"):
        assert_same(attention(q, k, v), expected)


def assert_equal_with_nan(a, b):
    """Same bits, and NaN at the same places; a NaN's own bits are free."""
    nan = np.isnan(a)
    assert np.array_equal(nan, np.isnan(b))
    assert_same(np.where(nan, 0, a), np.where(nan, 0, b))
