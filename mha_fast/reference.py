"""The same functions in plain NumPy: the specification, and the oracle of the tests.

Nothing is checked here, and scores are stored whole, so memory grows with ``seqlen_q * seqlen_k``.
"""

from typing import NamedTuple

import numpy as np

from .results import AttentionGradients, AttentionResult, AttentionStats, named_result


def attention(
    q,
    k,
    v,
    mask=None,
    *,
    bias=None,
    causal=False,
    q_offset=None,
    window=None,
    kv_lengths=None,
    scale=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
    dropout_p=0.0,
    seed=None,
    out=None,
    return_lse=False,
    return_weights=False,
    weights_heads=None,
    weights_rows=None,
    threads=None,
):
    """Attention of every query over the keys it may see; see `mha_fast.attention`.

    Examples
    --------
    >>> q = np.zeros((1, 2), np.float32)
    >>> k = np.ones((3, 2), np.float32)
    >>> v = np.arange(6, dtype=np.float32).reshape(3, 2)
    >>> attention(q, k, v)
    array([[2., 3.]], dtype=float32)
    """
    steps = _forward(
        q, k, v, mask, bias=bias, causal=causal, q_offset=q_offset, window=window,
        kv_lengths=kv_lengths, scale=scale, softcap=softcap, sinks=sinks,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    result, lse, weights = steps.result, steps.lse, steps.weights
    if not steps.has_heads:
        result, lse, weights = result[..., 0, :, :], lse[..., 0, :], weights[..., 0, :, :]
    if weights_heads is not None:
        weights = np.take(weights, np.asarray(weights_heads, int), axis=-3)
    if weights_rows is not None:
        weights = np.take(weights, np.asarray(weights_rows, int), axis=-2)
    if out is None:
        out = np.empty(result.shape, steps.dtype)
    out[...] = result
    return named_result(out, lse if return_lse else None, weights if return_weights else None)


class _Steps(NamedTuple):
    """What a call computes on its way, in the compute dtype, with an axis for heads."""

    q: np.ndarray
    k: np.ndarray  # of each query head
    v: np.ndarray
    scale: float
    steep: np.ndarray  # the derivative of the cap
    distance: np.ndarray
    seen: np.ndarray
    weights: np.ndarray
    kept: np.ndarray  # 1 over the share that is kept, 0 where dropped
    result: np.ndarray
    lse: np.ndarray
    dtype: np.dtype
    has_heads: bool


def _forward(
    q, k, v, mask=None, *, bias=None, causal=False, q_offset=None, window=None, kv_lengths=None,
    scale=None, softcap=None, sinks=None, alibi_slopes=None, dropout_p=0.0, seed=None,
):  # fmt: skip
    (q, k, v), dtype, compute = _floats(q, k, v)
    has_heads = max(x.ndim for x in (q, k, v)) > 2
    q, k, v = (x.reshape((1,) * (3 - x.ndim) + x.shape) for x in (q, k, v))
    group_size = q.shape[-3] // max(k.shape[-3], 1)
    k, v = (np.repeat(x, group_size, axis=-3) for x in (k, v))
    if scale is None:
        scale = 1 / np.sqrt(q.shape[-1]) if q.shape[-1] else 1

    s = compute.type(scale) * (q @ k.swapaxes(-1, -2))
    steep = np.ones((), compute)
    if softcap is not None:
        capped = np.tanh(s / compute.type(softcap))
        s, steep = compute.type(softcap) * capped, 1 - capped * capped
    length, distance = _positions(*s.shape[-2:], q_offset, kv_lengths)
    distance = np.abs(distance).astype(compute), distance
    if alibi_slopes is not None:
        s = s - _per_head(alibi_slopes, compute) * distance[0]
    seen = _visible(length, distance[1], causal, window)
    for term in (mask, bias):
        if term is not None and np.asarray(term).dtype == bool:
            seen = seen & term
        elif term is not None:
            seen = seen & (np.asarray(term) != -np.inf)
            s = s + _narrow(np.asarray(term), compute)
    batch = np.broadcast_shapes(s.shape[:-3], v.shape[:-3])
    s, seen = (np.broadcast_to(x, batch + s.shape[-3:]) for x in (s, seen))
    s = np.where(seen, s, -np.inf)

    sink = -np.inf if sinks is None else _per_head(sinks, compute)
    m = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    m = np.where(m == -np.inf, 0, m)
    p = np.exp(s - m)
    l = p.sum(axis=-1, keepdims=True) + np.exp(sink - m)  # noqa: E741
    weights = np.divide(p, l, out=np.zeros_like(p), where=seen & (l != 0))
    kept = np.ones((), compute)
    if dropout_p > 0:
        threshold = min(int(dropout_p * 65536 + 0.5), 65535)
        drawn = _drawn(s.shape, seed)
        kept = np.where(drawn < threshold, 0, compute.type(65536 / (65536 - threshold)))
    result = _weighted_sum(weights * kept, seen, v)
    with np.errstate(divide="ignore"):
        lse = (m + np.log(l))[..., 0]
    return _Steps(
        q, k, v, scale, steep, distance[0], seen, weights, kept, result, lse, dtype, has_heads
    )


def attention_vjp(
    q, k, v, mask=None, *, wrt=AttentionGradients._fields, return_lse=False, threads=None, **options
):
    """The result, and the gradients of arguments as a function of its own; see
    `mha_fast.attention_vjp`.

    Examples
    --------
    >>> out, pullback = attention_vjp([[0.0]], [[1.0], [-1.0]], [[1.0], [0.0]])
    >>> pullback([[1.0]]).q
    array([[0.5]])
    """
    arrays = {"q": q, "k": k, "v": v, "mask": mask, **options}
    arrays = {name: np.asarray(x) for name, x in arrays.items() if x is not None}
    f = _forward(q, k, v, mask, **options)
    heads = () if f.has_heads else (0,)
    out, lse = f.result[(..., *heads, slice(None), slice(None))], f.lse[(..., *heads, slice(None))]

    def pullback(d_out, d_lse=None):
        real = f.lse.dtype
        d_out = np.broadcast_to(np.asarray(d_out, real), out.shape).reshape(f.result.shape)
        d_lse = np.zeros((), real) if d_lse is None else np.asarray(d_lse, real)
        d_lse = np.broadcast_to(d_lse, lse.shape).reshape(f.lse.shape)
        delta = (d_out * f.result).sum(axis=-1) - d_lse
        d_kept = _weighted_sum(
            (f.weights * f.kept).swapaxes(-1, -2), f.seen.swapaxes(-1, -2), d_out
        )
        d_weights = f.kept * (d_out @ f.v.swapaxes(-1, -2))
        d_scores = np.where(f.seen, f.weights * (d_weights - delta[..., None]), 0)
        d_products = d_scores * f.steep
        found = {
            "q": d_products @ np.where(np.isfinite(f.k), f.k, 0),
            "k": d_products.swapaxes(-1, -2) @ np.where(np.isfinite(f.q), f.q, 0),
            "v": d_kept,
            "mask": d_scores,
            "bias": d_scores,
            "alibi_slopes": -(d_scores * f.distance).sum(axis=(-2, -1)),
        }
        if "sinks" in arrays:
            total = np.where(f.lse == -np.inf, np.inf, f.lse)  # a share of nothing is 0
            share = np.exp(_per_head(arrays["sinks"], real)[..., 0] - total)
            found["sinks"] = -(share * delta).sum(axis=-1)
        if "scale" in arrays:
            found["scale"] = (found["q"] * f.q).sum()
        found["q"], found["k"] = f.scale * found["q"], f.scale * found["k"]
        wanted = {n: x for n, x in arrays.items() if n in wrt and x.dtype != bool}
        found = {n: _sum_to(found[n], x) for n, x in wanted.items()}
        return AttentionGradients(**dict.fromkeys(AttentionGradients._fields) | found)

    return named_result(out.astype(f.dtype), lse if return_lse else None, None), pullback


def attention_stats(q, k, v, mask=None, *, top=0, threads=None, **options):
    """Statistics of the weights; see `mha_fast.attention_stats`."""
    result = attention(q, k, v, mask, return_lse=True, return_weights=True, **options)
    weights = result.weights
    with np.errstate(divide="ignore", invalid="ignore"):
        best = result.lse + np.log(weights.max(axis=-1, initial=0))
        bits = np.where(weights == 0, 0, weights * np.log(weights))
    keys = np.argsort(-weights, axis=-1, kind="stable")[..., :top]
    heaviest = np.take_along_axis(weights, keys, axis=-1)
    missing = [(0, 0)] * (keys.ndim - 1) + [(0, top - keys.shape[-1])]
    return AttentionStats(
        max=best,
        lse=result.lse,
        entropy=-bits.sum(axis=-1),
        received=weights.sum(axis=-2),
        top_keys=np.pad(np.where(heaviest > 0, keys, -1), missing, constant_values=-1),
        top_weights=np.pad(heaviest, missing),
    )


def attention_varlen(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, *, return_lse=False, threads=None, **options
):
    """`attention` of each sequence; see `mha_fast.attention_varlen`."""
    packed = cu_seqlens_q is not None
    if packed:
        rows, keys = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        q = np.split(np.asarray(q), rows[1:], axis=1)
        k, v = (np.split(np.asarray(x), keys[1:], axis=1)[:-1] for x in (k, v))
        behind = q.pop()
    results = [
        attention(*arrays, return_lse=True, **options) for arrays in zip(q, k, v, strict=True)
    ]
    outs, lses = [r.out for r in results], [r.lse for r in results]
    if packed:
        width = v[0].shape[-1]
        outs = np.concatenate([*outs, np.zeros((*behind.shape[:2], width), outs[0].dtype)], axis=1)
        lses = np.concatenate([*lses, np.full(behind.shape[:2], -np.inf, lses[0].dtype)], axis=1)
    return named_result(outs, lses if return_lse else None, None)


def linear(x, weight, bias=None, *, threads=None):
    """A layer's product, ``x @ weight.T + bias``; see `mha_fast.linear`.

    Examples
    --------
    >>> linear([[1.0, 2.0]], [[1.0, 0.0], [1.0, 1.0]])
    array([[1., 3.]])
    """
    (x, weight), dtype, compute = _floats(x, weight)
    product = x @ weight.T
    return (product if bias is None else product + np.asarray(bias, compute)).astype(dtype)


def merge(outs, lses):
    """The result over all keys, from results over parts of them; see `mha_fast.merge`.

    Examples
    --------
    >>> out, lse = merge([[[1.0]], [[3.0]]], [[0.0], [0.0]])
    >>> float(out[0, 0]), round(float(lse[0]), 4)
    (2.0, 0.6931)
    """
    outs, dtype, compute = _floats(*outs)
    lses = [np.asarray(x, compute)[..., None] for x in lses]
    with np.errstate(invalid="ignore"):
        lse = np.logaddexp.reduce(np.broadcast_arrays(*lses))
        weights = [np.exp(x - lse) for x in lses]
        parts = zip(outs, lses, weights, strict=True)
        out = sum(np.where(x == -np.inf, 0, weight * out) for out, x, weight in parts)
    rows = np.broadcast_shapes(out.shape[:-1], lse.shape[:-1])
    return AttentionResult(out.astype(dtype), np.broadcast_to(lse[..., 0], rows).copy())


def rotary(x, cos, sin, *, interleaved=False, positions=None, out=None, threads=None):
    """Pairs of each row turned by the angles of its position; see `mha_fast.rotary`.

    Examples
    --------
    >>> rotary([[3.0, 4.0]], [[0.0]], [[1.0]])
    array([[-4.,  3.]])
    """
    (x,), dtype, compute = _floats(x)
    batch, seqlen = x.shape[:-3], x.shape[-2]
    at = np.arange(seqlen) if positions is None else np.asarray(positions)
    at = np.broadcast_to(at, (*batch, seqlen))[..., None]
    tables = (np.asarray(a, compute) for a in (cos, sin))
    tables = (np.broadcast_to(a, batch + a.shape[-2:]) for a in tables)
    cos, sin = (np.take_along_axis(a, at, axis=-2) for a in tables)
    if x.ndim > 2:
        cos, sin = cos[..., None, :, :], sin[..., None, :, :]
    pairs = cos.shape[-1]
    turned = x.copy()
    first, second = slice(pairs), slice(pairs, 2 * pairs)
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    a, b = x[..., first], x[..., second]
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    if out is None:
        return turned.astype(dtype)
    out[...] = turned
    return out


def _positions(seqlen_q, seqlen_k, q_offset, kv_lengths):
    """How many keys exist, and how far each is from each query: (batch..., 1, rows, keys)."""
    length = np.asarray(seqlen_k if kv_lengths is None else kv_lengths, np.int64)
    offset = length - seqlen_q if q_offset is None else np.asarray(q_offset, np.int64)
    length, offset = (x[..., None, None, None] for x in (length, offset))  # heads, rows, keys
    return length, np.arange(seqlen_k) - (np.arange(seqlen_q)[:, None] + offset)


def _visible(length, distance, causal, window):
    """Which keys each row may see by position."""
    left, right = (None, None) if window is None else window
    seen = np.arange(distance.shape[-1]) < length
    if causal:
        seen = seen & (distance <= 0)
    if left is not None:
        seen = seen & (distance + left >= 0)
    if right is not None:
        seen = seen & (distance <= right)
    return np.broadcast_to(seen, np.broadcast_shapes(seen.shape, distance.shape))


def _per_head(x, compute):
    """(..., heads) as (..., heads, 1, 1)."""
    return np.asarray(x).astype(compute)[..., None, None]


def _drawn(shape, seed):
    """A number below 65536 for each weight: Threefry-4x32-20 of the counter (key // 8, row, head,
    batch row) makes four words, whose halves belong to 8 keys in turn, the low half first."""
    batch, heads, rows, keys = np.prod(shape[:-3], dtype=int), *shape[-3:]
    x = np.indices((batch, heads, rows, -(-keys // 8)), np.uint32)[::-1]
    words = threefry(x, [seed & 0xFFFFFFFF, seed >> 32, 0, 0])
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return np.stack(halves, -1).reshape(*shape[:-1], -(-keys // 8) * 8)[..., :keys]


def threefry(counter, key):
    """Four words of a counter and a key of four words each (Salmon et al., SC 2011).

    Examples
    --------
    >>> [f"{int(word):08x}" for word in threefry([0, 0, 0, 0], [0, 0, 0, 0])]
    ['9c6ca96a', 'e17eae66', 'fc10ecd4', '5256a7d8']
    """
    turns = [(10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20)]
    k = [*key, 0x1BD11BDA ^ key[0] ^ key[1] ^ key[2] ^ key[3]]
    a, b, c, d = (
        np.asarray(x, np.uint32) + np.uint32(y) for x, y in zip(counter, key, strict=True)
    )
    with np.errstate(over="ignore"):  # words wrap round
        for n in range(20):
            first, second = turns[n % 8]
            a = a + b
            b = (b << first | b >> (32 - first)) ^ a
            c = c + d
            d = (d << second | d >> (32 - second)) ^ c
            b, d = d, b  # the pairs change partners
            if n % 4 == 3:
                i = n // 4 + 1
                a, b, c, d = (
                    x + np.uint32(k[(i + j) % 5] + (i if j == 3 else 0) & 0xFFFFFFFF)
                    for j, x in enumerate((a, b, c, d))
                )
    return [a, b, c, d]


def _floats(*arrays):
    """The arrays in the compute dtype, the result's dtype, the compute dtype."""
    arrays = [np.asarray(x) for x in arrays]
    dtypes = {x.dtype for x in arrays}
    compute = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
    dtype = dtypes.pop() if len(dtypes) == 1 else compute
    return [x.astype(compute) for x in arrays], dtype, compute


def _sum_to(gradient, array):
    """The gradient summed over what the array was broadcast along, or query heads share of it."""
    shape = (1,) * (gradient.ndim - array.ndim) + array.shape
    for axis, (have, want) in enumerate(zip(gradient.shape, shape, strict=True)):
        if have != want:  # want is 1, or the number of KV heads
            parts = (*gradient.shape[:axis], want, have // want, *gradient.shape[axis + 1 :])
            gradient = gradient.reshape(parts).sum(axis=axis + 1)
    return gradient.reshape(array.shape).astype(array.dtype)


def _narrow(term, compute):
    """A term in the compute dtype; what is finite stays finite, so it never hides a key."""
    with np.errstate(over="ignore"):
        narrow = term.astype(compute)
    limit = np.finfo(compute).max
    return np.where(np.isfinite(term), np.clip(narrow, -limit, limit), narrow)


def _weighted_sum(p, seen, v):
    """``p @ v``, where an Inf or NaN in `v` reaches the rows that see it and no other."""
    finite = np.isfinite(v)
    if finite.all():
        return p @ v
    result = p @ np.where(finite, v, 0)
    for special in (np.inf, -np.inf, np.nan):
        here = np.isnan(v) if np.isnan(special) else v == special
        reached = seen.astype(v.dtype) @ here.astype(v.dtype) > 0
        with np.errstate(invalid="ignore"):
            result = result + np.where(reached, special, 0).astype(v.dtype)
    return result
