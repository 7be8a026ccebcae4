"""The same functions in plain NumPy: the specification, and the oracle of the tests.

Scores are stored whole, so memory grows with ``seqlen_q * seqlen_k``.
"""

import numpy as np

from .arguments import compute_dtype, plain_arguments, plain_linear, result_dtype
from .attention import named_result


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
    (q, k, v, mask, bias, causal, scale, _, _, out, q_offset, kv_lengths, window, *_) = (
        plain_arguments(
            q, k, v, mask, bias, causal, scale, threads, return_lse, out, q_offset, kv_lengths,
            window, return_weights, weights_heads, weights_rows,
        )
    )  # fmt: skip
    dtype = result_dtype(q, k, v)
    compute = compute_dtype(q, k, v)
    without_heads = max(q.ndim, k.ndim, v.ndim) == 2
    # One axis for the KV heads, one for the query heads that share each of them:
    k, v = (x.reshape(*x.shape[:-2], 1, *x.shape[-2:]).astype(compute) for x in (k, v))
    kv_heads = k.shape[-4] if k.ndim > 3 else 1
    heads = q.shape[-3] if q.ndim > 2 else 1
    group_size = heads // max(kv_heads, 1)
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-4], v.shape[:-4])
    q = q.astype(compute).reshape(*q.shape[:-3], kv_heads, group_size, *q.shape[-2:])
    rows, keys = (heads, q.shape[-2]), k.shape[-2]
    if scale is None:
        scale = 1 / np.sqrt(q.shape[-1]) if q.shape[-1] else 1

    s = compute.type(scale) * (q @ k.swapaxes(-1, -2))  # (..., kv_heads, group, seqlen_q, seqlen_k)
    s = s.reshape(*s.shape[:-4], *rows, keys)
    s = np.broadcast_to(s, (*batch, *rows, keys))
    visible = _interval(batch, rows[1], keys, causal, q_offset, kv_lengths, window)
    for term in (mask, bias):
        if term is not None and term.dtype == bool:
            visible = visible & term
        elif term is not None:
            visible = visible & (term != -np.inf)
            s = s + _narrow(term, compute)
    visible = np.broadcast_to(visible, s.shape)
    s = np.where(visible, s, -np.inf)

    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(m == -np.inf, 0, m))
    l = p.sum(axis=-1, keepdims=True)  # noqa: E741
    p = np.divide(p, l, out=np.zeros_like(p), where=visible & (l != 0))
    grouped = (*batch, kv_heads, group_size, rows[1], keys)
    result = _weighted_sum(p.reshape(grouped), visible.reshape(grouped), v)
    result = result.reshape(*batch, *(rows[1:] if without_heads else rows), v.shape[-1])
    with np.errstate(divide="ignore"):
        lse = (np.where(m == -np.inf, 0, m) + np.log(l)).reshape(result.shape[:-1])
    if out is None:
        out = result.astype(dtype)
    else:
        out[...] = result
    weights = None
    if return_weights:
        for axis, chosen in ((-3, weights_heads), (-2, weights_rows)):
            p = p if chosen is None else np.take(p, np.asarray(chosen, int), axis)
        weights = p[..., 0, :, :] if without_heads else p
    return named_result(out, lse if return_lse else None, weights)


def linear(x, weight, bias=None, *, threads=None):
    """A layer's product, ``x @ weight.T + bias``; see `mha_fast.linear`.

    Examples
    --------
    >>> linear([[1.0, 2.0]], [[1.0, 0.0], [1.0, 1.0]])
    array([[1., 3.]])
    """
    x, weight, bias, _ = plain_linear(x, weight, bias, threads)
    compute = compute_dtype(x, weight)
    product = x.astype(compute) @ weight.astype(compute).T
    return (product if bias is None else product + bias).astype(result_dtype(x, weight))


def _interval(batch, seqlen_q, seqlen_k, causal, q_offset, kv_lengths, window):
    """Which keys each row may see by position: bool (batch..., 1, seqlen_q, seqlen_k)."""

    def per_batch_row(x):
        return np.broadcast_to(x, batch)[..., None, None, None]

    length = per_batch_row(seqlen_k if kv_lengths is None else kv_lengths)
    offset = length - seqlen_q if q_offset is None else per_batch_row(q_offset)
    position = np.arange(seqlen_q)[:, None] + offset
    key = np.arange(seqlen_k)
    visible = (key < length) & (position == position)
    if causal:
        visible &= key <= position
    if window is not None:
        left, right = window
        visible &= key >= position - min(left, seqlen_k + np.abs(offset).max(initial=0))
        visible &= key <= position + min(right, seqlen_k + np.abs(offset).max(initial=0))
    return visible


def _narrow(term, compute):
    """A term in the compute dtype; what is finite stays finite, so it never hides a key."""
    with np.errstate(over="ignore"):
        narrow = term.astype(compute)
    limit = np.finfo(compute).max
    return np.where(np.isfinite(term), np.clip(narrow, -limit, limit), narrow)


def _weighted_sum(p, visible, v):
    """``p @ v``, where an Inf or NaN in `v` reaches the rows that see it and no other."""
    finite = np.isfinite(v)
    if finite.all():
        return p @ v
    result = p @ np.where(finite, v, 0)
    for special in (np.inf, -np.inf, np.nan):
        here = np.isnan(v) if np.isnan(special) else v == special
        seen = visible.astype(v.dtype) @ here.astype(v.dtype) > 0
        with np.errstate(invalid="ignore"):
            result = result + np.where(seen, special, 0).astype(v.dtype)
    return result
