"""Values at ugly sizes, head mapping, ranks, and the reference itself."""

import pickle

import judge
import numpy as np
import pytest
import sizes
from judge import assert_accurate, assert_same
from sizes import HEAD_DIMS, SEQLENS, qkv

from mha_fast import AttentionResult, attention, reference


def _ugly_sizes():
    """Each seqlen once as seqlen_q, once as seqlen_k; each head_dim likewise."""
    n, m = len(SEQLENS), len(HEAD_DIMS)
    for i in range(n):
        yield (
            SEQLENS[i],
            SEQLENS[(7 * i + 5) % n],
            HEAD_DIMS[7 * i % m],
            HEAD_DIMS[(5 * i + 2) % m],
        )


UGLY_SIZES = list(_ugly_sizes())


@pytest.mark.parametrize("size", UGLY_SIZES, ids=str)
def test_values_are_accurate_at_ugly_sizes(isa, real, size):
    q, k, v = qkv(*size, batch=(1,), heads=2, dtype=real)
    assert_accurate(attention(q, k, v, return_lse=True), q, k, v)


@pytest.mark.parametrize("size", UGLY_SIZES, ids=str)
def test_causal_values_are_accurate_at_ugly_sizes(isa, real, size):
    q, k, v = qkv(*size, batch=(), heads=2, kv_heads=1, dtype=real)
    result = attention(q, k, v, causal=True, return_lse=True)
    assert_accurate(result, q, k, v, causal=True)


@pytest.mark.parametrize("size", UGLY_SIZES[::2], ids=str)
def test_values_of_every_storage_dtype_are_accurate(isa, dtype, size):
    q, k, v = qkv(*size, batch=(), heads=1, dtype=dtype)
    assert_accurate(attention(q, k, v, return_lse=True), q, k, v)


@pytest.mark.parametrize("size", UGLY_SIZES[::3], ids=str)
def test_values_agree_with_the_reference_in_float64(isa, size):
    q, k, v = qkv(*size, kv_heads=1)
    wide = reference.attention(*(x.astype(np.float64) for x in (q, k, v)))
    assert_accurate(attention(q, k, v), q, k, v, out64=wide)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8])
def test_query_head_reads_the_kv_head_of_its_group(isa, real, group_size):
    q, k, v = qkv(13, 67, 8, 5, heads=2 * group_size, kv_heads=2, dtype=real)
    grouped = attention(q, k, v, causal=True)
    repeated = attention(q, k.repeat(group_size, axis=1), v.repeat(group_size, axis=1), causal=True)
    assert_same(grouped, repeated)
    assert_accurate(grouped, q, k, v, causal=True)


def test_canary_a_wrong_head_mapping_is_caught():
    q, k, v = qkv(5, 13, heads=4, kv_heads=2)
    tiled = attention(q, np.tile(k, (1, 2, 1, 1)), np.tile(v, (1, 2, 1, 1)))
    with pytest.raises(AssertionError, match="out: .* are wrong"):
        assert_accurate(tiled, q, k, v)


@pytest.mark.parametrize("head_dim_v", [0, 1, 5, 64, 101])
def test_head_dim_v_is_free_and_does_not_enter_the_scale(isa, head_dim_v):
    q, k, v = qkv(5, 13, 16, head_dim_v)
    assert_accurate(attention(q, k, v), q, k, v)


RANKS = [
    ((5, 3), (7, 3), (7, 4)),
    ((5, 3), (1, 7, 3), (7, 4)),
    ((4, 5, 3), (2, 7, 3), (2, 7, 4)),
    ((4, 5, 3), (7, 3), (1, 7, 4)),
    ((2, 4, 5, 3), (4, 7, 3), (2, 4, 7, 4)),
    ((4, 5, 3), (2, 4, 7, 3), (3, 1, 4, 7, 4)),
    ((3, 1, 4, 5, 3), (2, 1, 7, 3), (2, 1, 7, 4)),
    ((2, 1, 3, 4, 5, 3), (1, 2, 1, 2, 7, 3), (2, 2, 3, 2, 7, 4)),
]


@pytest.mark.parametrize("shapes", RANKS, ids=str)
@pytest.mark.parametrize("function", [attention, reference.attention])
def test_leading_axes_broadcast_as_in_numpy(function, shapes, real):
    q, k, v = (sizes.random(*shape, dtype=real, seed=3) for shape in shapes)
    assert_accurate(function(q, k, v, return_lse=True), q, k, v)


EMPTY = [
    # seqlen_q, seqlen_k, head_dim, head_dim_v, batch, heads, kv_heads
    (0, 5, 4, 3, (2,), 2, 2),
    (5, 0, 4, 3, (2,), 2, 2),
    (5, 7, 0, 3, (2,), 2, 1),
    (5, 7, 4, 0, (2,), 2, 1),
    (5, 7, 4, 3, (0,), 2, 1),
    (5, 7, 4, 3, (2,), 0, 0),
    (5, 7, 4, 3, (2,), 0, 2),
    (0, 0, 0, 0, (0, 2), 0, 0),
]


@pytest.mark.parametrize("size", EMPTY, ids=str)
@pytest.mark.parametrize("function", [attention, reference.attention])
def test_zero_size_axes_have_a_defined_result(function, dtype, size):
    *size, batch, heads, kv_heads = size
    q, k, v = qkv(*size, batch=batch, heads=heads, kv_heads=kv_heads, dtype=dtype)
    out, lse = function(q, k, v, causal=True, q_offset=7, return_lse=True)
    assert out.shape == (*batch, heads, size[0], size[3])
    assert out.dtype == dtype
    assert lse.shape == out.shape[:-1]
    given = np.empty(out.shape, dtype)
    assert function(q, k, v, causal=True, q_offset=7, out=given) is given
    assert_same(given, out)
    if size[1] == 0:
        assert_same(out, np.zeros_like(out))
        assert (lse == -np.inf).all()
    elif out.size:
        assert_accurate((out, lse), q, k, v, causal=True, q_offset=7)


def test_one_key_returns_its_value_exactly(isa, dtype):
    q, k, v = qkv(13, 1, dtype=dtype)
    assert_same(attention(q, k, v), np.broadcast_to(v, q.shape))


def test_result_is_a_plain_array_unless_more_is_asked_for():
    q, k, v = qkv(3, 5)
    result = attention(q, k, v, return_lse=True)
    assert type(attention(q, k, v)) is np.ndarray
    assert type(result) is AttentionResult
    assert result._fields == ("out", "lse")
    assert_same(result.out, attention(q, k, v))


def test_lists_and_array_likes_are_accepted():
    q, k, v = qkv(3, 5, batch=(), heads=1, dtype=np.float64)

    class Wrapped:
        def __array__(self, dtype=None, copy=None):
            return k

    assert_same(attention(q.tolist(), Wrapped(), v), attention(q, k, v))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out * (1 + 1e-5),
        lambda out: np.where(np.arange(out.size).reshape(out.shape) == 7, np.nan, out),
        lambda out: out[..., ::-1],
        lambda out: np.zeros_like(out),
    ],
    ids=["scaled", "one NaN", "reversed", "zeros"],
)
def test_canary_a_wrong_result_is_caught(wrong):
    q, k, v = qkv(5, 67)
    out = wrong(attention(q, k, v)).astype(np.float32)
    with pytest.raises(AssertionError, match="out: .* are wrong"):
        assert_accurate(out, q, k, v)


@pytest.mark.parametrize(
    "change",
    [{"causal": True}, {"scale": 0.354}, {"kv_lengths": 66}, {"window": (60, None)}],
    ids=str,
)
def test_canary_a_wrong_option_is_caught(change):
    q, k, v = qkv(5, 67)
    with pytest.raises(AssertionError, match="out: .* are wrong"):
        assert_accurate(attention(q, k, v, **change), q, k, v)


def test_canary_a_bound_that_is_not_finite_is_caught():
    with pytest.raises(AssertionError, match="not finite"):
        judge.assert_within(np.zeros(2), np.array([1, np.inf]), "out")


@pytest.mark.parametrize(
    "asked", [{"return_lse"}, {"return_weights"}, {"return_lse", "return_weights"}]
)
def test_results_with_names_pickle_and_keep_their_type(asked):
    result = attention(*qkv(3, 5), **dict.fromkeys(asked, True))
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is type(result) and again._fields == result._fields
    assert_same(again, result)
