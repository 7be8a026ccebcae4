"""Attention once more, from the definitions, in the widest float: the judge's own copy.

It shares no line with the package, so it also judges `mha_fast.reference`.
"""

import math
from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    size: np.ndarray  # sum over keys of p |v|: what an error of `out` is measured by
    score: (
        np.ndarray
    )  # largest |score| that each row sees, also before a cap, which hides its error
    weights: np.ndarray
    gross: np.ndarray  # the same with |q|, |k| and |terms|, so nothing cancels


def attention(
    q, k, v, mask=None, *, bias=None, scale=None, softcap=None, sinks=None, alibi_slopes=None,
    dropout_p=0, seed=None, wide=None, **structure,
):  # fmt: skip
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
    product = np.abs(s)
    if softcap is not None:
        s = wide(softcap) * np.tanh(s / wide(softcap))
    if alibi_slopes is not None:
        slopes = np.asarray(alibi_slopes, np.float64).astype(wide)[..., None, None]
        term = -slopes * np.abs(distance(q.shape[-2], k.shape[-2], **structure))
        s, gross = s + term, gross + np.abs(term)
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
    largest = np.abs(s) if softcap is None else np.maximum(np.abs(s), product)
    score, gross = (np.where(seen, x, 0).max(axis=-1, initial=0) for x in (largest, gross))
    s = np.where(seen, s, -np.inf)
    m = s.max(axis=-1, initial=np.finfo(wide).min)
    sink = np.asarray(-np.inf if sinks is None else sinks, np.float64).astype(wide)[..., None]
    logit = np.where(sink == -np.inf, 0, np.abs(sink))  # a score too
    score, gross = np.maximum(score, logit), np.maximum(gross, logit)
    m = np.maximum(m, sink)
    p = np.exp(s - m[..., None])
    total = p.sum(axis=-1) + np.exp(sink - m)
    empty = total == 0
    p = p / np.where(empty, 1, total)[..., None]
    lse = np.where(empty, -np.inf, m + np.log(np.where(empty, 1, total)))
    kept = p * kept_weights(p.shape, dropout_p, seed).astype(wide)
    answer = Answer(kept @ v, lse, kept @ np.abs(v), score, p, gross)
    return Answer(*(x[0] for x in answer)) if without_heads else answer


def with_heads(x, wide):
    x = np.asarray(x, np.float64).astype(wide)
    return x.reshape((1,) * (3 - x.ndim) + x.shape)


def distance(seqlen_q, seqlen_k, q_offset=None, kv_lengths=None, **_):
    """From each query's position to each key: (batch..., 1, seqlen_q, seqlen_k)."""
    length = np.asarray(seqlen_k if kv_lengths is None else kv_lengths, int)
    offset = length - seqlen_q if q_offset is None else np.asarray(q_offset, int)
    return np.arange(seqlen_k) - np.arange(seqlen_q)[:, None] - offset[..., None, None, None]


def kept_weights(shape, dropout_p, seed):
    """0 where a weight is dropped, else what it is multiplied by."""
    threshold = min(int(dropout_p * 2**16 + 0.5), 2**16 - 1)
    if not threshold:
        return np.ones(1)
    *batch, heads, rows, keys = shape
    numbers = np.empty((math.prod(batch), heads, rows, keys + 7), int)
    key = np.array([seed % 2**32, seed // 2**32, 0, 0], np.uint64)
    b, h, i = (x[..., None] for x in np.indices(numbers.shape[:-1]))
    for first in range(0, keys, 8):
        words = threefry([first // 8, i, h, b], key)
        for n, word in enumerate(words):
            numbers[..., [first + 2 * n]] = word % 2**16
            numbers[..., [first + 2 * n + 1]] = word // 2**16
    dropped = numbers[..., :keys].reshape(shape) < threshold
    return np.where(dropped, 0, 2**16 / (2**16 - threshold))


def threefry(counter, key):
    """Threefry-4x32-20 in arithmetic modulo 2**32, written from its paper."""
    x = [np.uint64(c) + k for c, k in zip(counter, key, strict=True)]
    x = [np.asarray(word, np.uint64) % 2**32 for word in x]
    schedule = [*key, np.bitwise_xor.reduce(key) ^ np.uint64(0x1BD11BDA)]
    turns = np.array([10, 26, 11, 21, 13, 27, 23, 5, 6, 20, 17, 11, 25, 10, 18, 20])
    for n in range(20):
        for at, by in ((0, turns[2 * n % 16]), (2, turns[2 * n % 16 + 1])):
            other = (at + 1) if n % 2 == 0 else (at + 3) % 4
            x[at] = (x[at] + x[other]) % 2**32
            turned = x[other] * np.uint64(2) ** np.uint64(by)
            x[other] = (turned % 2**32 + turned // 2**32) ^ x[at]
        if n % 4 == 3:
            i = (n + 1) // 4
            x = [(word + schedule[(i + j) % 5]) % 2**32 for j, word in enumerate(x)]
            x[3] = (x[3] + np.uint64(i)) % 2**32
    return x


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
