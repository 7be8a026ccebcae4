"""Attention weights: their values, and that asking for them changes nothing else."""

from functools import partial

import numpy as np
import pytest
from judge import assert_accurate, assert_same
from options import cut
from sizes import HEAD_DIMS, KEY_BLOCK, SEQLENS, on_every_isa, qkv

from mha_fast import attention, reference

SEQLEN_Q, SEQLEN_K = 67, 2 * KEY_BLOCK + 9
ALL = {"return_weights": True, "return_lse": True}


def arrays(dtype=np.float32):
    return qkv(SEQLEN_Q, SEQLEN_K, 17, 9, heads=4, kv_heads=2, dtype=dtype)


@pytest.mark.parametrize("i", range(len(SEQLENS)), ids=lambda i: str(SEQLENS[i]))
def test_weights_are_accurate_at_ugly_sizes(isa, real, i):
    head_dim = HEAD_DIMS[7 * i % len(HEAD_DIMS)]
    q, k, v = qkv(SEQLENS[i], SEQLENS[(7 * i + 5) % len(SEQLENS)], head_dim, 3, dtype=real)
    assert_accurate(attention(q, k, v, **ALL), q, k, v)


def test_asking_for_weights_changes_no_bit(isa, dtype, option):
    q, k, v = arrays(dtype)
    options = option(q, k, v)
    result = attention(q, k, v, **options, **ALL)
    assert_same(result.out, attention(q, k, v, **options))
    assert_same(result.lse, attention(q, k, v, **options, return_lse=True).lse)
    alone = attention(q, k, v, **options, return_weights=True)
    assert alone._fields == ("out", "weights")
    assert_same(alone.weights, result.weights)


def test_chosen_heads_and_rows_have_the_bits_of_all(isa, option):
    q, k, v = arrays()
    options = option(q, k, v)
    everything = attention(q, k, v, **options, **ALL).weights
    for heads in (None, [0], [3, 1], [-1, 0, 2], []):
        for rows in (None, [66], [-1, 0, 64], range(0, 67, 3), []):
            some = attention(q, k, v, **options, **ALL, weights_heads=heads, weights_rows=rows)
            expected = everything
            for axis, chosen in ((1, heads), (2, rows)):
                if chosen is not None:
                    expected = np.take(expected, np.asarray(chosen, int), axis)
            assert_same(some.weights, expected)


def test_weights_have_the_bits_of_one_thread_and_of_every_isa(option):
    q, k, v = (np.concatenate([x] * 4, axis=1) for x in arrays())
    options = option(q, k, v)
    expected = attention(q, k, v, **options, **ALL, threads=1)
    for threads in (1, 2, 3, 8):
        for name, result in on_every_isa(
            partial(attention, q, k, v, **options, **ALL, threads=threads)
        ):
            assert_same(result, expected, f"{name}, {threads} threads")


def test_rows_alone_have_the_weights_of_all(isa, real, option):
    q, k, v = arrays(real)
    options = option(q, k, v)
    together = attention(q, k, v, **options, **ALL)
    for i in range(0, SEQLEN_Q, 11):
        rows = slice(i, i + 1)
        alone = attention(q[:, :, rows], k, v, **cut(options, "q", rows, q, k, v), **ALL)
        assert_same(alone.weights, together.weights[:, :, rows])


def test_memory_that_held_nan_shows_in_no_result(isa, real, option):
    q, k, v = arrays(real)
    options = option(q, k, v)
    for heads, rows in ((None, None), ([3, 1], None), (None, [-1, 0, 64]), ([0], range(9, 60, 3))):
        chosen = {"weights_heads": heads, "weights_rows": rows}
        expected = attention(q, k, v, **options, **ALL, **chosen)
        assert all(np.isfinite(x).all() or x is expected.lse for x in expected)
        for _ in range(2):
            leave_nan_behind(expected)
            assert_same(attention(q, k, v, **options, **ALL, **chosen), expected)


def leave_nan_behind(arrays):
    """In memory that is free again and fits these arrays."""
    stale = [np.full_like(x, np.nan) for x in arrays]
    del stale


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_poison_that_no_row_sees_reaches_no_weight(isa, real, poison):
    q, k, v = arrays(real)
    hide = {"mask": np.arange(SEQLEN_K) % 3 > 0, "kv_lengths": KEY_BLOCK + 5}
    expected = attention(q, k, v, **hide, **ALL)
    k[:, :, ::3] = v[:, :, ::3] = poison
    k[:, :, KEY_BLOCK + 5 :] = v[:, :, KEY_BLOCK + 5 :] = poison
    assert_same(attention(q, k, v, **hide, **ALL), expected)


def test_a_nan_key_shows_in_the_rows_that_see_it_and_hidden_weights_stay_zero(isa, real):
    q, k, v = qkv(40, 40, 5, dtype=real)
    k[:, :, 20] = np.nan
    weights = attention(q, k, v, causal=True, **ALL).weights
    seen = np.tri(40, dtype=bool)
    assert np.isnan(weights[:, :, 20:][..., seen[20:]]).all()
    assert np.isfinite(weights[:, :, :20]).all()
    assert (weights[..., ~seen] == 0).all()
    twin = reference.attention(q, k, v, causal=True, **ALL).weights
    assert np.array_equal(np.isnan(twin), np.isnan(weights))


def test_two_dimensional_arrays_and_empty_axes_give_weights(isa):
    q, k, v = (x[0, 0] for x in qkv(5, 7, 3))
    assert attention(q, k, v, return_weights=True).weights.shape == (5, 7)
    assert attention(q[:0], k, v, return_weights=True).weights.shape == (0, 7)
    assert attention(q, k[:0], v[:0], return_weights=True).weights.shape == (5, 0)
    twin = reference.attention(q, k, v, return_weights=True, weights_rows=[-1])
    assert twin.weights.shape == (1, 7)


def test_canary_memory_that_is_free_again_is_used_again():
    x = np.zeros((2, 4, SEQLEN_Q, SEQLEN_K), np.float32)
    leave_nan_behind([x])
    with pytest.raises(AssertionError, match="differ"):
        assert_same(np.empty_like(x), x)


def test_canary_a_weight_of_a_hidden_key_is_caught():
    q, k, v = arrays()
    result = attention(q, k, v, causal=True, **ALL)
    result.weights[0, 0, 0, -1] = 1e-30
    with pytest.raises(AssertionError, match="hidden"):
        assert_accurate(result, q, k, v, causal=True)
    result = attention(q, k, v, **ALL)
    result.weights[1, 2, 3, 4] *= 1.0001
    with pytest.raises(AssertionError, match="weights: 1 of"):
        assert_accurate(result, q, k, v)
