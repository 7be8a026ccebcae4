"""KVCache: the bits of one call, however tokens come; what it forgets, refuses and keeps."""

import pickle

import numpy as np
import pytest
from judge import assert_same
from sizes import KEY_BLOCK, qkv

from mha_fast import KVCache, _core, attention

RUN_KEYS = KEY_BLOCK * _core.geometry()["run"]
TOKENS = RUN_KEYS + 700
CHUNKS = {
    "at once": [TOKENS],
    "odd chunks": [1, 7, KEY_BLOCK - 1, KEY_BLOCK, KEY_BLOCK + 1, 101, RUN_KEYS],
    "token by token": [TOKENS - 100] + [1] * 100,
}
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "slopes": {"alibi_slopes": [0.5, 0.1, 0.02, 0.0]},
    "sinks": {"sinks": [0.5, -1.0, 2.0, 0.0]},
}


def tokens(count=TOKENS, dtype=np.float32, seed=0):
    return qkv(count, count, 8, 5, heads=4, kv_heads=2, dtype=dtype, seed=seed)


def cache_of(dtype=np.float32, **more):
    return KVCache(2, 2, 8, head_dim_v=5, dtype=dtype, **more)


def run(cache, q, k, v, chunks, **options):
    """Results of all tokens, appended and asked for in chunks; the last one takes what is left."""
    outs, at = [], 0
    while at < q.shape[2]:
        count = chunks[len(outs)] if len(outs) < len(chunks) else q.shape[2] - at
        part = (slice(None), slice(None), slice(at, at + count))
        cache.append(k[part], v[part])
        outs.append(cache.attention(q[part], **options))
        at += count
    return np.concatenate(outs, axis=2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("window", [None, 100, RUN_KEYS])
def test_bits_are_those_of_one_call(chunks, window, options):
    q, k, v = tokens()
    sides = None if window is None else (window, 0)
    expected = attention(q, k, v, causal=True, window=sides, **options)
    assert_same(run(cache_of(window=window), q, k, v, chunks, **options), expected)


def test_bits_are_those_of_every_isa(isa):
    q, k, v = tokens(300)
    assert_same(run(cache_of(), q, k, v, [250] + [1] * 50), attention(q, k, v, causal=True))


@pytest.mark.parametrize("window", [100, 3000])
def test_a_window_forgets_and_memory_stays_bounded(window):
    count = 3 * RUN_KEYS + 500
    q, k, v = tokens(count)
    cache = cache_of(window=window)
    out = run(cache, q, k, v, [500] * (count // 500) + [1] * 50)
    assert_same(out, attention(q, k, v, causal=True, window=(window, 0)))
    assert cache.forgotten > 0 and cache.forgotten % RUN_KEYS == 0
    assert len(cache) == count and cache.k.shape[2] == count - cache.forgotten
    assert cache.capacity <= 2 * (window + RUN_KEYS + 500)
    with pytest.raises(ValueError, match=f"keys before {cache.forgotten} are forgotten"):
        cache.rewind(cache.forgotten)
    with pytest.raises(
        ValueError, match=f"could see key 0, expected none before {cache.forgotten}"
    ):
        cache.attention(q[:, :, -1:], window=None)
    with pytest.raises(ValueError, match="those are forgotten"):
        cache.attention(q[:, :, -1:], q_offset=cache.forgotten)


def test_values_are_rounded_to_the_dtype_of_the_cache(dtype):
    q, k, v = tokens(200, np.float64)
    out = run(cache_of(dtype), q, k, v, [150, 1])
    assert_same(out, attention(q, k.astype(dtype), v.astype(dtype), causal=True))


def test_rows_may_have_lengths_of_their_own():
    """Prompts padded on the right, then a token each: as if each row were alone."""
    q, k, v = tokens(40)
    lengths = [23, 30]
    cache = cache_of()
    cache.append(k[:, :, :30], v[:, :, :30], lengths)
    first = cache.attention(q[:, :, :30])
    cache.append(k[:, :, 30:31], v[:, :, 30:31])
    assert cache.lengths.tolist() == [24, 31]
    last = cache.attention(q[:, :, 30:31])
    for row, n in enumerate(lengths):
        keys, values = (np.concatenate([x[row, :, :n], x[row, :, 30:31]], axis=1) for x in (k, v))
        queries = np.concatenate([q[row, :, :n], q[row, :, 30:31]], axis=1)
        whole = attention(queries, keys, values, causal=True)
        assert_same(first[row, :, :n], whole[:, :n])
        assert_same(last[row], whole[:, n:])


def test_room_that_is_not_used_is_never_read():
    q, k, v = tokens(100)
    cache = cache_of()
    cache.append(k[:, :, :70], v[:, :, :70], [70, 3])
    expected = cache.attention(q[:, :, :70])
    for x in (cache._store.k, cache._store.v):
        x[0, :, 70:], x[1, :, 3:] = np.nan, np.inf
    assert_same(cache.attention(q[:, :, :70]), expected)


def test_keys_and_values_are_views():
    _, k, v = tokens(100)
    cache = cache_of()
    cache.append(k, v)
    assert np.shares_memory(cache.k, cache._store.k) and np.shares_memory(cache.v, cache._store.v)
    assert_same(cache.k, k)
    assert_same(cache.v, v)


def test_capacity_doubles_when_full():
    _, k, v = tokens(300)
    cache, seen = cache_of(), set()
    for i in range(300):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        seen.add(cache.capacity)
    assert seen == {64, 128, 256, 512}
    assert cache.nbytes == 512 * 2 * 2 * (8 + 5) * 4


def test_one_row_needs_no_batch_axis():
    q, k, v = (x[0] for x in tokens(50))
    cache = KVCache(1, 2, 8, head_dim_v=5)
    cache.append(k[:, :40], v[:, :40])
    cache.append(k[:, 40:], v[:, 40:])
    out, lse = cache.attention(q[:, 40:], return_lse=True)
    expected = attention(q, k, v, causal=True, return_lse=True)
    assert_same(out, expected.out[:, 40:])
    assert_same(lse, expected.lse[:, 40:])


def test_rewound_tokens_are_as_if_they_had_never_been():
    q, k, v = tokens(60)
    _, other_k, other_v = tokens(60, seed=9)
    cache = cache_of()
    cache.append(k[:, :, :50], v[:, :, :50])
    cache.append(other_k[:, :, :10], other_v[:, :, :10])
    cache.rewind([50, 50])
    cache.append(k[:, :, 50:], v[:, :, 50:])
    assert_same(cache.attention(q[:, :, 50:]), attention(q, k, v, causal=True)[:, :, 50:])
    cache.rewind(20)
    assert_same(cache.attention(q[:, :, 15:20]), attention(q, k, v, causal=True)[:, :, 15:20])


def test_selected_rows_are_the_batch():
    q, k, v = tokens(60)
    rows = [1, 1, 0]
    cache = cache_of()
    cache.append(k[:, :, :50], v[:, :, :50])
    cache.select(rows)
    cache.append(k[rows][:, :, 50:], v[rows][:, :, 50:])
    out = cache.attention(q[rows][:, :, 50:])
    assert_same(out, attention(q, k, v, causal=True)[rows][:, :, 50:])


@pytest.mark.parametrize("copy", [KVCache.fork, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_shares_nothing(copy):
    q, k, v = tokens(60)
    cache = cache_of(window=100)
    cache.append(k[:, :, :50], v[:, :, :50])
    other = copy(cache)
    assert not np.shares_memory(other.k, cache.k)
    cache.append(v[:, :, 50:, :1] + k[:, :, 50:], v[:, :, 50:])
    other.append(k[:, :, 50:], v[:, :, 50:])
    expected = attention(q, k, v, causal=True, window=(100, 0))[:, :, 50:]
    assert_same(other.attention(q[:, :, 50:]), expected)
    assert (cache.attention(q[:, :, 50:]) != expected).any()


@pytest.mark.parametrize("where", [None, "file"])
def test_a_failed_append_leaves_the_cache_as_it_was(monkeypatch, tmp_path, where):
    q, k, v = tokens(100)
    cache = cache_of(path=where and tmp_path / where)
    cache.append(k[:, :, :60], v[:, :, :60])
    expected = cache.attention(q[:, :, :60])

    def fails(*_):
        raise MemoryError

    for name in ("in_memory", "in_file"):
        monkeypatch.setattr(f"mha_fast.model.cache.{name}", fails)
    monkeypatch.setattr(KVCache, "_fill", fails)
    for error, arguments in (
        (MemoryError, (k, v)),
        (ValueError, (k[:, :, :5], v[:, :, :6])),
        (ValueError, (k[..., :5], v)),
        (TypeError, (k.astype(int), v)),
        (ValueError, (k, v, [3, 101])),
    ):
        with pytest.raises(error):
            cache.append(*arguments)
        assert len(cache) == 60
        assert_same(cache.attention(q[:, :, :60]), expected)
    assert [x.name for x in tmp_path.iterdir()] == [where] * (where is not None)


FULL = cache_of()
FULL.append(*tokens(10)[1:])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KVCache(0, 2, 8), ValueError, "batch is 0, expected at least 1"),
        (lambda: KVCache(1, 2, 8.0), TypeError, "head_dim is 8.0, expected a positive int"),
        (lambda: KVCache(1, 2, 8, dtype=int), TypeError, "dtype is int64, expected float16"),
        (lambda: KVCache(1, 2, 8, window=-1), ValueError, "window is -1, expected at least 1"),
        (lambda: FULL.append(FULL.k[0], FULL.v), ValueError, "k has shape (2, 10, 8), expected (2"),
        (lambda: FULL.append(FULL.k, FULL.v, [1, -1]), ValueError, "lengths holds -1 to 1, exp"),
        (lambda: FULL.attention(FULL.k[:1]), ValueError, "q has shape (1, 2, 10, 8), expected (2"),
        (lambda: FULL.attention(FULL.k, kv_lengths=3), TypeError, "kv_lengths is given, expected"),
        (lambda: FULL.attention(FULL.k, dropout_p=0.5), TypeError, "dropout_p is given, expected"),
        (lambda: FULL.attention(FULL.k, q_offset=0.5), TypeError, "q_offset has dtype float64"),
        (lambda: FULL.rewind(11), ValueError, "lengths holds 11 to 11, expected 0 to 10"),
        (lambda: FULL.rewind([1, 2, 3]), ValueError, "lengths has shape (3,), expected one that"),
        (lambda: FULL.select([0, 2]), ValueError, "rows holds 0 to 2, expected 0 to 1"),
        (lambda: FULL.select([]), ValueError, "rows has shape (0,), expected a list of ints"),
        (lambda: FULL.select([0.5]), TypeError, "rows has dtype float64, expected integers"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_use_is_refused_by_name(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert len(FULL) == 10


def test_repr_says_what_is_in_it():
    assert repr(FULL) == (
        "<KVCache(2, 2, 8, dtype=float32, head_dim_v=5) of 10 tokens, 10 stored, room for 64>"
    )


def test_canary_keys_forgotten_within_a_run_change_bits(monkeypatch):
    monkeypatch.setattr("mha_fast.model.cache.RUN_KEYS", 100)
    q, k, v = tokens()
    out = run(cache_of(window=1000), q, k, v, [500] * 9)
    with pytest.raises(AssertionError):
        assert_same(out, attention(q, k, v, causal=True, window=(1000, 0)))
