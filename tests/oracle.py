"""Attention once more, from the definitions, in the widest float: the judge's own copy.

It shares no line with the package, so it also judges `mha_fast.reference`.
"""

from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    size: np.ndarray  # sum over keys of p |v|: what an error of `out` is measured by
    score: np.ndarray  # largest |score| that each row sees
    weights: np.ndarray
    gross: np.ndarray  # the same with |q|, |k| and |terms|, so nothing cancels


def attention(q, k, v, mask=None, *, bias=None, scale=None, wide=None, **structure):
    """The exact answer; options as in `mha_fast.attention`."""
    wide = np.longdouble if wide is None else wide
    without_heads = max(x.ndim for x in (q, k, v)) == 2
    q, k, v = (with_heads(x, wide) for x in (q, k, v))
    group_size = q.shape[-3] // k.shape[-3] if k.shape[-3] else 1
    k, v = (np.repeat(x, group_size, axis=-3) for x in (k, v))
    if scale is None:
        scale = 1 / np.sqrt(wide(q.shape[-1])) if q.shape[-1] else 1
    s = wide(scale) * (q @ k.swapaxes(-1, -2))
    gross = np.abs(wide(scale)) * (np.abs(q) @ np.abs(k).swapaxes(-1, -2))
    seen = visible(q.shape[-2], k.shape[-2], **structure)
    for term in (mask, bias):
        if term is not None and term.dtype == bool:
            seen = seen & term
        elif term is not None:
            term = term.astype(wide)
            seen = seen & (term != -np.inf)
            term = np.where(term == -np.inf, 0, term)
            s, gross = s + term, gross + np.abs(term)
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    s, seen, _ = np.broadcast_arrays(s, seen, np.empty((*batch, 1, 1, 1)))
    score, gross = (np.where(seen, np.abs(x), 0).max(axis=-1, initial=0) for x in (s, gross))
    s = np.where(seen, s, -np.inf)
    m = s.max(axis=-1, initial=np.finfo(wide).min)
    p = np.exp(s - m[..., None])
    total = p.sum(axis=-1)
    empty = total == 0
    p = p / np.where(empty, 1, total)[..., None]
    lse = np.where(empty, -np.inf, m + np.log(np.where(empty, 1, total)))
    answer = Answer(p @ v, lse, p @ np.abs(v), score, p, gross)
    return Answer(*(x[0] for x in answer)) if without_heads else answer


def with_heads(x, wide):
    x = np.asarray(x, np.float64).astype(wide)
    return x.reshape((1,) * (3 - x.ndim) + x.shape)


def visible(seqlen_q, seqlen_k, causal=False, q_offset=None, window=None, kv_lengths=None):
    """Which keys a row may see by position: (batch..., 1, seqlen_q, seqlen_k)."""
    length = np.asarray(seqlen_k if kv_lengths is None else kv_lengths)
    offset = length - seqlen_q if q_offset is None else np.asarray(q_offset)
    length, offset = length[..., None, None, None], offset[..., None, None, None]
    position = np.arange(seqlen_q)[:, None] + offset
    key = np.arange(seqlen_k)
    seen = key < length
    if causal:
        seen = seen & (key <= position)
    left, right = (None, None) if window is None else window
    if left is not None:
        seen = seen & (key >= position - left)
    if right is not None:
        seen = seen & (key <= position + right)
    return np.broadcast_to(seen, np.broadcast_shapes(seen.shape, (1, seqlen_q, seqlen_k)))
