"""Attention of many sequences of any lengths in one call."""

import itertools

import numpy as np

from ._core import ask, attend_together
from .arguments import boolean, floats, plain_array, result_dtype, thread_count
from .options import OPTIONS, checked
from .results import named_result

# What each sequence has alike. A mask or a bias would be one a sequence.
SHARED = tuple(name for name in OPTIONS if name not in ("mask", "bias", "kv_lengths", "q_offset"))


def attention_varlen(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, *, return_lse=False, threads=None, **options
):
    """Attention of each of many sequences over its own keys, by one team of threads.

    The result is, to the bit, that of a loop of `attention` over the sequences.

    Parameters
    ----------
    q : array_like, shape (heads, total_q, head_dim), or list of (heads, seqlen_q, head_dim)
        The sequences packed one behind the other, or one array each.
    k : array_like, shape (kv_heads, total_k, head_dim), or list of (kv_heads, seqlen_k, head_dim)
    v : array_like, shape (kv_heads, total_k, head_dim_v), or list
    cu_seqlens_q : array_like of int, shape (sequences + 1,)
        Where each packed sequence begins, from 0, and after them where the last one ends, at
        most total_q; rows behind it are 0. Sequences may be empty. None for lists.
    cu_seqlens_k : array_like of int, shape (sequences + 1,), optional
        The same for keys and values; default `cu_seqlens_q`.
    return_lse : bool
    threads : int, optional
        As in `attention`.
    **options
        causal, window, scale, softcap, sinks, alibi_slopes, dropout_p, seed, as in `attention`, for
        each sequence alone.

    Returns
    -------
    out : ndarray, shape (heads, total_q, head_dim_v), or list of (heads, seqlen_q, head_dim_v)
    AttentionResult
        With `return_lse`: ``(out, lse)``; ``lse (heads, total_q)``, -inf behind the last sequence,
        or a list.

    Raises
    ------
    TypeError, ValueError
        As `attention`; or `cu_seqlens_q` does not begin at 0, decreases, or ends too late.
    MemoryError
        No memory for the result or for the scratch space of a thread.

    Notes
    -----
    The packed layout is that of FlashAttention's ``flash_attn_varlen_func``, heads first.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((2, 7, 4))  # 2 heads; 3 and 4 tokens
    >>> out = attention_varlen(x, x, x, [0, 3, 7], causal=True)
    >>> out.shape
    (2, 7, 4)
    >>> first, second = attention_varlen(*[[x[:, :3], x[:, 3:]]] * 3, causal=True)
    >>> bool((out[:, 3:] == second).all())
    True
    """
    unknown = sorted(set(options) - set(SHARED))
    if unknown:
        raise TypeError(f"{unknown[0]} is no option of attention_varlen, expected {SHARED}")
    return_lse, threads = boolean("return_lse", return_lse), thread_count("threads", threads)
    if isinstance(q, list) and isinstance(k, list) and isinstance(v, list):
        return _of_lists(q, k, v, (cu_seqlens_q, cu_seqlens_k), return_lse, threads, options)
    return _of_packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), return_lse, threads, options)


def _of_lists(q, k, v, cu_seqlens, return_lse, threads, options):
    if cu_seqlens != (None, None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k are for packed arrays, found lists")
    if not len(q) == len(k) == len(v):
        raise ValueError(f"k and v have {len(k)} and {len(v)} sequences, expected {len(q)} as in q")
    questions = [_plain(*arrays, options) for arrays in zip(q, k, v, strict=True)]
    dtypes = {result_dtype(x.q, x.k, x.v) for x in questions}
    if len(dtypes) > 1:
        raise TypeError(f"sequences have dtypes {sorted(map(str, dtypes))}, expected one")
    outs = [np.empty((*x.q.shape[:-1], x.v.shape[-1]), *dtypes) for x in questions]
    lses = attend_together(questions, outs, return_lse, threads)
    return named_result(outs, lses, None)


def _of_packed(q, k, v, cu_seqlens, return_lse, threads, options):
    axes = ("heads", "total", "head_dim")
    q, k, v = (floats(name, x, axes) for name, x in (("q", q), ("k", k), ("v", v)))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} has shape {x.shape}, expected (heads, total, head_dim)")
    rows = _bounds("cu_seqlens_q", cu_seqlens[0], q.shape[1])
    keys = rows if cu_seqlens[1] is None else _bounds("cu_seqlens_k", cu_seqlens[1], k.shape[1])
    if cu_seqlens[1] is None:
        _bounds("cu_seqlens_q", rows, k.shape[1])
    if len(keys) != len(rows):
        raise ValueError(f"cu_seqlens_k has {len(keys)} entries, expected {len(rows)} as in "
                         "cu_seqlens_q")  # fmt: skip
    out = np.empty((*q.shape[:2], v.shape[-1]), result_dtype(q, k, v))
    questions, outs = [], []
    for (start, end), (first, past) in zip(
        itertools.pairwise(rows), itertools.pairwise(keys), strict=True
    ):
        questions.append(_plain(q[:, start:end], k[:, first:past], v[:, first:past], options))
        outs.append(out[:, start:end])
    out[:, rows[-1] :] = 0
    parts = attend_together(questions, outs, return_lse, threads)
    if not return_lse:
        return out
    lse = np.full(out.shape[:2], -np.inf, parts[0].dtype if parts else np.float32)
    for (start, end), part in zip(itertools.pairwise(rows), parts, strict=True):
        lse[:, start:end] = part
    return named_result(out, lse, None)


def _plain(q, k, v, options):
    question = ask(q, k, v, **options)
    question = question if question.plain else checked(question)
    if max(question.q.ndim, question.k.ndim, question.v.ndim) > 3:
        raise ValueError(f"a sequence of q has shape {question.q.shape}, expected no batch axes")
    return question


def _bounds(name, x, total):
    """Where sequences begin and end, as a list of ints."""
    if x is None:
        raise ValueError(f"{name} is None, expected ints beside packed arrays")
    x = plain_array(name, x)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {x.dtype}, expected ints")
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}, expected (sequences + 1,)")
    bounds = x.tolist()
    if bounds[0] != 0 or bounds[-1] > total or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name} goes from {bounds[0]} to {bounds[-1]}, expected to begin at 0, "
                         f"never to decrease and to end at {total} at most")  # fmt: skip
    return bounds
