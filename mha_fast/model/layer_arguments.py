"""What the arguments of a layer's call mean: torch's masks as those of `attention`, every check."""

import math

import numpy as np

from ..arguments import FLOATS, floats, is_float, plain_array
from .cache import KVCache
from .rotary import rotary


def plain_tokens(query, key, value, sizes, dtype):
    """Plain arrays of this dtype that fit together. What was one object stays one object, so that
    it can be projected in one product."""
    q = _tokens("query", query, sizes.embed_dim, dtype)
    k = _tokens("key", q if key is None or key is query else key, sizes.kdim, dtype)
    v = k if value is None or value is key else q if value is query else value
    v = _tokens("value", v, sizes.vdim, dtype)
    if k.shape[:-2] != q.shape[:-2]:
        raise ValueError(f"key has shape {k.shape}, expected the batch of query, {q.shape}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"value has shape {v.shape}, expected as many tokens as key, {k.shape}")
    return q, k, v


def _tokens(name, x, width, dtype):
    x = floats(name, x, least=())
    if x.ndim not in (2, 3) or x.shape[-1] != width:
        raise ValueError(
            f"{name} has shape {x.shape}, expected (batch, seqlen, {width}) or (seqlen, {width})"
        )
    return x.astype(dtype, copy=False)


def score_terms(attn_mask, key_padding_mask, causal, scores, num_heads, extra_keys, dtype):
    """The `mask` and `bias` of `attention` that say what torch's two masks say.

    `scores` is (batch, seqlen_q, seqlen_k), or without batch; `extra_keys` stand after those and
    are seen by all. Neither mask is expanded to the shape of the other.
    """
    *batch, seqlen_q, seqlen_k = scores
    rows = (seqlen_q, seqlen_k)
    attn = _mask("attn_mask", attn_mask, rows, (math.prod(batch) * num_heads, *rows))
    padding = _mask("key_padding_mask", key_padding_mask, (*batch, seqlen_k))
    if causal and extra_keys:
        attn = _hide_later(attn, *rows)
    if attn is not None:
        attn = attn if attn.ndim == 2 else attn.reshape(*batch, num_heads, *rows)
        attn = _append(attn, extra_keys)
    if padding is not None:
        padding = _append(padding[..., None, None, :], extra_keys)
    if attn is None or attn.dtype != bool:
        return _shown(padding), attn
    if padding is not None and padding.dtype == bool:  # the bias is float, and -inf hides as well
        padding = np.where(padding, -np.inf, 0).astype(dtype)
    return _shown(attn), padding


def rotation(arguments, query, key, cache, threads):
    """A function from q, k and v to the same, turned in place as `rotary` with these arguments
    does: key 0 stands at 0, or after what the cache holds, and the last query at the last key."""
    if arguments is None:
        return lambda q, k, v: (q, k, v)
    if not isinstance(arguments, dict):
        raise TypeError(f"rotary is {arguments!r}, expected a dict of rotary's arguments, or None")
    if not {"cos", "sin"} <= arguments.keys() <= {"cos", "sin", "interleaved"}:
        raise ValueError(
            f"rotary has {', '.join(map(repr, arguments)) or 'no entries'}, expected 'cos' and "
            "'sin', and perhaps 'interleaved'"
        )
    length = key.shape[-2]
    held = 0 if cache is None else cache.lengths if query.ndim == 3 else cache.lengths[0]

    def turn(q, k, v):
        for x in (q, k):
            positions = np.add.outer(held, np.arange(length - x.shape[-2], length))
            rotary(x, **arguments, positions=positions, out=x, threads=threads)
        return q, k, v

    return turn


def check_cache(cache, plain):
    """Is it one, and does the call ask for nothing that it cannot keep?"""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache is a {type(cache).__name__}, expected a KVCache or None")
    if not plain:
        raise ValueError("cache is given, expected None beside key, value, masks or extra keys")


def cached_attention(cache):
    """`attention` of tokens that are appended to the cache; it is as before if this fails."""

    def attend(q, k, v, mask, *, bias, **options):
        before = cache.lengths
        cache.append(k, v)
        try:
            return cache.attention(q, **options)
        except BaseException:
            cache.rewind(before)
            raise

    return attend


def _mask(name, mask, *shapes):
    if mask is None:
        return None
    mask = plain_array(name, mask)
    if mask.dtype != bool and not is_float(mask.dtype):
        raise TypeError(
            f"{name} has dtype {mask.dtype}, expected bool (True = hidden) or {FLOATS} (added to "
            f"the scores): {name}.astype(bool)"
        )
    if mask.shape not in shapes:
        raise ValueError(f"{name} has shape {mask.shape}, expected {' or '.join(map(str, shapes))}")
    return mask


def _hide_later(mask, seqlen_q, seqlen_k):
    """`causal` as a mask."""
    later = ~np.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)
    if mask is None:
        return later
    return mask | later if mask.dtype == bool else np.where(later, mask.dtype.type(-np.inf), mask)


def _append(mask, extra_keys):
    """Neither hidden nor changed: False, or 0."""
    return np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, extra_keys)]) if extra_keys else mask


def _shown(mask):
    return ~mask if mask is not None and mask.dtype == bool else mask
