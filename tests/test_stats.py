"""attention_stats says, to the bit, what the weights would have said; and what scores are."""

import numpy as np
import oracle
import pytest
import sizes
from judge import FACTOR, assert_near, assert_same, assert_within, bits, compute_dtype
from options import OPTIONS
from sizes import KEY_BLOCK, qkv

from mha_fast import AttentionStats, _core, attention, attention_stats, reference
from mha_fast.options import checked

TOP = 5


def arrays(dtype=np.float32, seqlen_q=67):
    return qkv(seqlen_q, 2 * KEY_BLOCK + 9, 5, 9, heads=4, kv_heads=2, dtype=dtype)


def question(q, k, v, **options):
    asked = _core.ask(q, k, v, **options)
    return asked if asked.plain else checked(asked)


def assert_exact(stats, q, k, v, top, **options):
    """All but the entropy follow from weights and scores without another rounding that differs."""
    result = attention(q, k, v, return_lse=True, return_weights=True, **options)
    weights = result.weights
    keys = np.argsort(-weights, axis=-1, kind="stable")[..., :top]
    heaviest = np.take_along_axis(weights, keys, axis=-1)
    counted = np.floor(weights.astype(np.float64) * 2**40 + 0.5).sum(axis=-2) / 2**40
    best = question(q, k, v, **options).scores().max(axis=-1, initial=-np.inf)
    assert_same(stats.lse, result.lse, "lse")
    assert_same(stats.max, best, "max")
    assert_same(stats.top_weights, heaviest, "top_weights")
    assert np.array_equal(stats.top_keys, np.where(heaviest > 0, keys, -1))
    assert_within(np.abs(stats.received - counted), counted * np.finfo(weights.dtype).eps, "mass")


def entropy_bound(answer, compute):
    """The rule for weights, where an error of a weight counts as its logarithm does. The sum of a
    block is a chain of its keys."""
    w = answer.weights
    size = (w * (1 + np.abs(np.log(np.where(w > 0, w, 1))))).sum(axis=-1)
    return (FACTOR * (1 + answer.score) + KEY_BLOCK) * np.finfo(compute).eps * size


def test_statistics_are_those_of_the_weights(isa, dtype, option):
    q, k, v = arrays(dtype)
    options = option(q, k, v)
    stats = attention_stats(q, k, v, top=TOP, **options)
    assert_exact(stats, q, k, v, TOP, **options)
    compute = compute_dtype(dtype)
    answer = oracle.attention(q, k, v, wide=np.longdouble, **options)
    w = answer.weights
    exact = -(w * np.log(np.where(w > 0, w, 1))).sum(axis=-1)
    assert_within(np.abs(stats.entropy - exact), entropy_bound(answer, compute), "entropy")
    assert {x.dtype for x in stats} == {compute, np.dtype(np.int64)}


@pytest.mark.parametrize("seqlen_q", [1, 2, 8, 9, 64, 65])
def test_bits_are_those_of_every_isa_and_thread_count(option, seqlen_q):
    q, k, v = arrays(seqlen_q=seqlen_q)
    options = option(q, k, v)

    def call(threads=1):
        return attention_stats(q, k, v, top=2, threads=threads, **options)

    (_, first), *others = sizes.on_every_isa(call)
    for isa, stats in [*others, ("two threads", call(2))]:
        assert_same(stats, first, f"statistics of {isa}")


def test_large_calls_have_the_bits_of_one_thread():
    """Threads add to what keys receive at the same time."""
    q, k, v = qkv(400, 1500, 16, heads=1, batch=())
    assert_same(attention_stats(q, k, v, threads=4), attention_stats(q, k, v, threads=1))


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gives_the_same(name):
    q, k, v = arrays(np.float64)
    options = OPTIONS[name](q, k, v)
    fast = attention_stats(q, k, v, top=TOP, **options)
    plain = reference.attention_stats(q, k, v, top=TOP, **options)
    assert np.array_equal(fast.top_keys, plain.top_keys)
    for field in ("max", "lse", "entropy", "received", "top_weights"):
        assert_near(getattr(fast, field), getattr(plain, field), q.shape[-2] * k.shape[-2], field)


def test_a_hidden_nan_is_not_read_and_a_visible_one_shows_where_it_is_seen(isa):
    q, k, v = arrays()
    k[0, 0, 100] = np.nan  # of heads 0 and 1; seen by the last rows
    v[...] = np.nan
    stats = attention_stats(q, k, v, causal=True, q_offset=50, top=1)
    sees = np.arange(67) + 50 >= 100
    for field in ("max", "lse", "entropy"):
        unknown = np.isnan(getattr(stats, field))
        assert np.array_equal(unknown[0, :2], np.stack([sees] * 2)), field
        assert not unknown[0, 2:].any() and not unknown[1].any(), field
    reached = np.arange(k.shape[-2]) <= 50 + 66
    assert np.array_equal(np.isnan(stats.received[0, 0]), reached)
    assert not np.isnan(stats.received[:, 2:]).any()


def test_equal_keys_come_in_order_and_missing_ones_are_minus_one():
    x = np.zeros((1, 3, 4), np.float32)
    stats = attention_stats(x, x, x, causal=True, top=4)
    assert stats.top_keys.tolist() == [[[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]]
    assert stats.top_weights[0, 2].tolist() == [*np.float32([1 / 3] * 3).tolist(), 0]
    assert_same(stats.entropy[0, 0], np.float32(0))


@pytest.mark.parametrize("sizes_", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("heads", [(), (2,), (2, 0, 2)], ids=str)
def test_axes_may_be_empty(sizes_, heads):
    rows, keys, dim = sizes_
    q, k = np.ones((*heads, rows, dim)), np.ones((*heads, keys, dim))
    stats = attention_stats(q, k, k, top=2)
    assert stats.max.shape == stats.lse.shape == stats.entropy.shape == (*heads, rows)
    assert stats.received.shape == (*heads, keys)
    assert stats.top_keys.shape == stats.top_weights.shape == (*heads, rows, 2)
    assert keys or (np.isneginf(stats.max).all() and (stats.entropy == 0).all())


def test_scores_are_those_of_the_softmax(isa, dtype, option):
    """And -inf where a key is hidden: what exp(scores - lse) makes the weights of."""
    q, k, v = arrays(dtype)
    options = option(q, k, v)
    scores = question(q, k, v, **options).scores()
    result = attention(q, k, v, return_lse=True, return_weights=True, **options)
    hidden = oracle.attention(q, k, v, wide=np.float64, **options).weights == 0
    assert np.array_equal(np.isneginf(scores), hidden)
    lse = np.where(np.isneginf(result.lse), 0, result.lse)[..., None].astype(np.float64)
    most = np.where(hidden, 0, np.abs(scores)).max()
    info = np.finfo(scores.dtype)
    bound = FACTOR * (1 + most + np.abs(lse)) * info.eps * result.weights + info.smallest_normal
    assert_within(np.abs(np.exp(scores - lse) - result.weights), bound, "exp(scores)")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"top": -1}, ValueError, "top is -1, expected at least 0"),
        ({"top": 1.5}, TypeError, "top is 1.5, expected an int"),
        ({"threads": 0}, ValueError, "threads is 0, expected at least 1"),
        ({"window": (1,)}, ValueError, "window has 1 entries"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(more, error, message):
    with pytest.raises(error) as caught:
        attention_stats(*arrays(), **more)
    assert message in str(caught.value)


def test_too_many_rows_are_refused():
    q = np.broadcast_to(np.float32(1), (2**22 + 1, 1))
    with pytest.raises(ValueError, match=f"q has {2**22 + 1} rows, expected at most {2**22}"):
        attention_stats(q, q[:1], q[:1])


def test_canary_a_key_that_receives_a_little_more_is_caught():
    q, k, v = arrays()
    stats = attention_stats(q, k, v, top=TOP)
    received = stats.received.copy()
    received[1, 3, 200] *= np.float32(1 + 1e-6)
    assert (bits(received) != bits(stats.received)).sum() == 1
    with pytest.raises(AssertionError, match="mass"):
        assert_exact(AttentionStats(*stats[:3], received, *stats[4:]), q, k, v, TOP)
