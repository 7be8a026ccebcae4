"""Packed sequences and lists of them: the bits of a loop, the right errors."""

import itertools

import numpy as np
import pytest
import sizes
from judge import assert_accurate, assert_same
from sizes import KEY_BLOCK, random

from mha_fast import attention, attention_varlen, reference

ROWS = [3, 0, 67, 1, KEY_BLOCK + 1, 0, 24]
KEYS = [7, 5, 2 * KEY_BLOCK + 9, 1, 3, 0, 24]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (30, 5), "scale": -0.7},
    "scores": {"softcap": 1.5, "sinks": [0.0, 1, -1, 2], "alibi_slopes": [0.5, 0.1, 0, 1]},
    "dropout": {"dropout_p": 0.3, "seed": 5},
}


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def packed(dtype=np.float32, behind=0):
    rows, keys = np.cumsum([0, *ROWS]), np.cumsum([0, *KEYS])
    q = random(4, rows[-1] + behind, 17, dtype=dtype)
    k = random(2, keys[-1] + behind, 17, dtype=dtype, seed=1)
    v = random(2, keys[-1] + behind, 9, dtype=dtype, seed=2)
    return (q, k, v), rows, keys


def sequences(arrays, rows, keys):
    """The arrays of each sequence."""
    q, k, v = arrays
    for (a, b), (c, d) in zip(itertools.pairwise(rows), itertools.pairwise(keys), strict=True):
        yield slice(a, b), (q[:, a:b], k[:, c:d], v[:, c:d])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_packed_sequences_have_the_bits_of_a_loop(isa, dtype, options, threads):
    arrays, rows, keys = packed(dtype, behind=5)
    result = attention_varlen(*arrays, rows, keys, return_lse=True, threads=threads, **options)
    assert_same(attention_varlen(*arrays, rows, keys, **options), result.out)
    for at, alone in sequences(arrays, rows, keys):
        expected = attention(*alone, return_lse=True, **options)
        assert_same(result.out[:, at].copy(), expected.out)
        assert_same(result.lse[:, at].copy(), expected.lse)
        assert_accurate(expected, *alone, **options)
    assert (result.out[:, rows[-1] :] == 0).all() and (result.lse[:, rows[-1] :] == -np.inf).all()


def test_lists_of_arrays_have_the_bits_of_packed_ones(isa, options):
    arrays, rows, keys = packed()
    lists = zip(*(alone for _, alone in sequences(arrays, rows, keys)), strict=True)
    outs, lses = attention_varlen(*map(list, lists), return_lse=True, **options)
    result = attention_varlen(*arrays, rows, keys, return_lse=True, **options)
    assert_same(np.concatenate(outs, axis=1), result.out)
    assert_same(np.concatenate(lses, axis=1), result.lse)


def test_the_reference_does_the_same(options):
    arrays, rows, keys = packed(behind=3)
    simple = reference.attention_varlen(*arrays, rows, keys, return_lse=True, **options)
    result = attention_varlen(*arrays, rows, keys, return_lse=True, **options)
    assert simple.out.shape == result.out.shape and simple.lse.dtype == result.lse.dtype
    for at, alone in sequences(arrays, rows, keys):
        assert_accurate((simple.out[:, at], simple.lse[:, at]), *alone, **options)


def test_nothing_behind_the_last_sequence_is_read(isa):
    arrays, rows, keys = packed(behind=7)
    expected = attention_varlen(*arrays, rows, keys, causal=True)
    for x, end in zip(arrays, (rows[-1], keys[-1], keys[-1]), strict=True):
        x[:, end:] = np.nan
    assert_same(attention_varlen(*arrays, rows, keys, causal=True), expected)


def test_no_sequence_at_all_is_an_empty_result():
    x = random(2, 0, 4)
    assert attention_varlen(x, x, x, [0]).shape == (2, 0, 4)
    assert attention_varlen([], [], []) == []


X = random(2, 7, 4)
BAD = [
    (ValueError, ([0, 3, 2],), "cu_seqlens_q goes from 0 to 2, expected to begin at 0, never to"),
    (ValueError, ([0, 8],), "cu_seqlens_q goes from 0 to 8, .* to end at 7 at most"),
    (ValueError, ([1, 3],), "cu_seqlens_q goes from 1 to 3, expected to begin at 0"),
    (ValueError, ([0, 3], [0, 3, 4]), "cu_seqlens_k has 3 entries, expected 2 as in cu_seqlens_q"),
    (ValueError, (), "cu_seqlens_q is None, expected ints beside packed arrays"),
    (ValueError, (3,), r"cu_seqlens_q has shape \(\), expected \(sequences \+ 1,\)"),
    (TypeError, ([0.0, 3.0],), "cu_seqlens_q has dtype float64, expected ints"),
]


@pytest.mark.parametrize(("error", "bounds", "message"), BAD)
def test_bad_bounds_are_named(error, bounds, message):
    with pytest.raises(error, match=message):
        attention_varlen(X, X, X, *bounds)


def test_other_bad_arguments_are_named():
    with pytest.raises(TypeError, match="mask is no option of attention_varlen"):
        attention_varlen(X, X, X, [0, 7], mask=np.ones((7, 7), bool))
    with pytest.raises(ValueError, match="k and v have 1 and 2 sequences, expected 2 as in q"):
        attention_varlen([X, X], [X], [X, X])
    with pytest.raises(ValueError, match="are for packed arrays, found lists"):
        attention_varlen([X], [X], [X], [0, 7])
    with pytest.raises(TypeError, match="sequences have dtypes .*float32.*float64.*, expected one"):
        attention_varlen([X, X], [X, X.astype(float)], [X, X])
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 7, 4\), expected \(heads, total,"):
        attention_varlen(X[None], X, X, [0, 7])
    with pytest.raises(ValueError, match="k has head_dim 3, expected 4 as in q"):
        attention_varlen(X, X[..., :3], X, [0, 7])
    with pytest.raises(TypeError, match="return_lse is 1, expected True or False"):
        attention_varlen(X, X, X, [0, 7], return_lse=1)


def test_canary_a_sequence_that_sees_its_neighbour_is_caught():
    arrays, rows, keys = packed()
    whole = attention(*arrays)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(whole, attention_varlen(*arrays, rows, keys))


def test_sequences_of_every_size_are_accurate(isa, real):
    rows = np.cumsum([0, *sizes.PRIMES])
    x = random(2, rows[-1], 5, dtype=real)
    out = attention_varlen(x, x, x, rows, causal=True)
    for a, b in itertools.pairwise(rows):
        assert_accurate(out[:, a:b], x[:, a:b], x[:, a:b], x[:, a:b], causal=True)
