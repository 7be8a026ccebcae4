"""The same functions in plain NumPy: the specification, and the oracle of the tests.

Nothing is checked here, and scores are stored whole, so memory grows with ``seqlen_q * seqlen_k``.
"""

import numpy as np

from .results import named_result


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
    (q, k, v), dtype, compute = _floats(q, k, v)
    has_heads = max(x.ndim for x in (q, k, v)) > 2
    q, k, v = (x.reshape((1,) * (3 - x.ndim) + x.shape) for x in (q, k, v))
    group_size = q.shape[-3] // max(k.shape[-3], 1)
    k, v = (np.repeat(x, group_size, axis=-3) for x in (k, v))
    if scale is None:
        scale = 1 / np.sqrt(q.shape[-1]) if q.shape[-1] else 1

    s = compute.type(scale) * (q @ k.swapaxes(-1, -2))
    seen = visible(*s.shape[-2:], causal, q_offset, window, kv_lengths)
    for term in (mask, bias):
        if term is not None and np.asarray(term).dtype == bool:
            seen = seen & term
        elif term is not None:
            seen = seen & (np.asarray(term) != -np.inf)
            s = s + _narrow(np.asarray(term), compute)
    batch = np.broadcast_shapes(s.shape[:-3], v.shape[:-3])
    s, seen = (np.broadcast_to(x, batch + s.shape[-3:]) for x in (s, seen))
    s = np.where(seen, s, -np.inf)

    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    m = np.where(m == -np.inf, 0, m)
    p = np.exp(s - m)
    l = p.sum(axis=-1, keepdims=True)  # noqa: E741
    weights = np.divide(p, l, out=np.zeros_like(p), where=seen & (l != 0))
    result = _weighted_sum(weights, seen, v)
    with np.errstate(divide="ignore"):
        lse = (m + np.log(l))[..., 0]

    if not has_heads:
        result, lse, weights = result[..., 0, :, :], lse[..., 0, :], weights[..., 0, :, :]
    if weights_heads is not None:
        weights = np.take(weights, np.asarray(weights_heads, int), axis=-3)
    if weights_rows is not None:
        weights = np.take(weights, np.asarray(weights_rows, int), axis=-2)
    if out is None:
        out = np.empty(result.shape, dtype)
    out[...] = result
    return named_result(out, lse if return_lse else None, weights if return_weights else None)


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


def visible(seqlen_q, seqlen_k, causal=False, q_offset=None, window=None, kv_lengths=None):
    """Which keys a row may see by position: bool (batch..., 1, seqlen_q, seqlen_k)."""
    length = np.asarray(seqlen_k if kv_lengths is None else kv_lengths, np.int64)
    offset = length - seqlen_q if q_offset is None else np.asarray(q_offset, np.int64)
    length, offset = (x[..., None, None, None] for x in (length, offset))  # heads, rows, keys
    position = np.arange(seqlen_q)[:, None] + offset
    key = np.arange(seqlen_k)
    left, right = (None, None) if window is None else window
    seen = key < length
    if causal:
        seen = seen & (key <= position)
    if left is not None:
        seen = seen & (key >= position - left)
    if right is not None:
        seen = seen & (key <= position + right)
    return np.broadcast_to(seen, np.broadcast_shapes(seen.shape, position.shape, (1, 1, 1)))


def _floats(*arrays):
    """The arrays in the compute dtype, the result's dtype, the compute dtype."""
    arrays = [np.asarray(x) for x in arrays]
    dtypes = {x.dtype for x in arrays}
    compute = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
    dtype = dtypes.pop() if len(dtypes) == 1 else compute
    return [x.astype(compute) for x in arrays], dtype, compute


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
