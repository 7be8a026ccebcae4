"""What nodes of attention of the domain com.microsoft mean: exporters and optimisers write them.

`call` is the run of a node, as in node.py. The text of the operators is ContribOperators.md of
onnxruntime.
"""

import numpy as np

from .. import _core
from ..arguments import integers
from ..attention import attention
from .heads import split_heads, unpack_heads
from .node import present_of


def refuse(**inputs):
    """What is not supported must not be there."""
    for name, x in inputs.items():
        if x is not None:
            raise ValueError(f"{name} is there, expected none: it is not supported")


def need(**inputs):
    for name, x in inputs.items():
        if x is None:
            raise ValueError(f"{name} is missing")


def answer(call, arrays, **options):
    """The output: heads packed into the last axis."""
    q, _, v = arrays
    batch, heads, seqlen, _ = q.shape
    y = call.new(0, (batch, seqlen, heads * v.shape[3]), q.dtype)
    attention(*arrays, **options, out=unpack_heads(y, heads))


# ---- MultiHeadAttention --------------------------------------------------------------------------


def multi_head_attention_node(
    call,
    query,
    key=None,
    value=None,
    bias=None,
    key_padding_mask=None,
    attention_bias=None,
    past_key=None,
    past_value=None,
    past_sequence_length=None,
    cache_indirection=None,
    *,
    num_heads,
    scale=0,
    unidirectional=0,
    mask_filter_value=None,
):
    """What a mask hides is hidden, whatever the `mask_filter_value`; a row that sees nothing is
    0."""
    refuse(past_sequence_length=past_sequence_length, cache_indirection=cache_indirection)
    refuse(qk=True if call.wants(3) else None)
    need(key=key, value=value)
    query, key, value = with_bias(query, key, value, bias)
    q = split_heads("query", query, "num_heads", num_heads)
    k = split_heads("key", key, "num_heads", num_heads)
    v = split_heads("value", value, "num_heads", num_heads)
    k, past = present_of(call, 1, k, past_key)
    v, _ = present_of(call, 2, v, past_value)
    hidden = {} if key_padding_mask is None else hidden_by(key_padding_mask, q, k)
    answer(
        call, (q, k, v), bias=attention_bias, causal=bool(unidirectional), q_offset=past,
        scale=scale or None, **hidden,
    )  # fmt: skip


def with_bias(query, key, value, bias):
    """What a projection adds: one row for all three. Keys that come by heads have theirs."""
    if bias is None:
        return query, key, value
    width = query.shape[-1]
    by_heads = key.ndim == 4
    total = len(bias) if by_heads else 2 * width + value.shape[-1]
    if query.ndim != 3 or bias.shape != (total,) or total < width:
        raise ValueError(f"bias has shape {bias.shape}, expected {(total,)}")
    if by_heads:
        return query + bias[:width], key, value
    return query + bias[:width], key + bias[width : 2 * width], value + bias[2 * width :]


def hidden_by(mask, q, k):
    """A key padding mask in our words: lengths, or 0 where a key is hidden."""
    batch, seqlen_q, seqlen_k = len(q), q.shape[2], k.shape[2]
    if mask.ndim == 1 and len(mask) in (batch, 3 * batch + 2):
        return {"kv_lengths": integers("key_padding_mask", mask[:batch], (batch,), 0, seqlen_k)}
    if mask.shape == (batch, seqlen_k):
        return {"mask": mask[:, None, None] != 0}
    if mask.shape == (batch, seqlen_q, seqlen_k):
        return {"mask": mask[:, None] != 0}
    raise ValueError(
        f"key_padding_mask has shape {mask.shape}, expected {(batch,)}, {(3 * batch + 2,)}, "
        f"{(batch, seqlen_k)} or {(batch, seqlen_q, seqlen_k)}"
    )


# ---- GroupQueryAttention -------------------------------------------------------------------------


def group_query_attention_node(
    call,
    query,
    key=None,
    value=None,
    past_key=None,
    past_value=None,
    seqlens_k=None,
    total_sequence_length=None,
    cos_cache=None,
    sin_cache=None,
    position_ids=None,
    attention_bias=None,
    head_sink=None,
    k_scale=None,
    v_scale=None,
    q_norm_weight=None,
    k_norm_weight=None,
    query_seqlens=None,
    *,
    num_heads,
    kv_num_heads,
    scale=0,
    softcap=0,
    causal=1,
    local_window_size=-1,
    do_rotary=0,
    rotary_interleaved=0,
    smooth_softmax=0,
):
    """New keys and values go into the caches, in place where past and present are one buffer."""
    refuse(k_scale=k_scale, v_scale=v_scale, query_seqlens=query_seqlens)
    refuse(q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight)
    refuse(output_qk=True if call.wants(3) else None)
    need(seqlens_k=seqlens_k, total_sequence_length=total_sequence_length)
    q, k, v = by_heads(query, key, value, num_heads, kv_num_heads)
    total, starts, lengths = places(q, seqlens_k, total_sequence_length)
    if do_rotary:
        need(cos_cache=cos_cache, sin_cache=sin_cache)
        index = rotary_index(position_ids, starts, q.shape[2], total)
        tables = rows_of(cos_cache, index), rows_of(sin_cache, index)
        q, k = (turned(x, *tables, bool(rotary_interleaved)) for x in (q, k))
    k = written(call, 1, k, past_key, starts, total)
    v = written(call, 2, v, past_value, starts, total)
    sinks = np.zeros(num_heads, np.float32) if smooth_softmax else None
    answer(
        call, (q, k[:, :, :total], v[:, :, :total]), bias=attention_bias,
        causal=bool(causal), q_offset=one(starts), kv_lengths=one(lengths), scale=scale or None,
        window=(local_window_size - 1, None) if local_window_size > 0 else None,
        softcap=softcap or None, sinks=sinks if head_sink is None else head_sink,
    )  # fmt: skip


def by_heads(query, key, value, heads, kv_heads):
    """q, k and v, from three inputs or from one that holds all three."""
    if key is not None:
        need(value=value)
        return (
            split_heads("query", query, "num_heads", heads),
            split_heads("key", key, "kv_num_heads", kv_heads),
            split_heads("value", value, "kv_num_heads", kv_heads),
        )
    x = split_heads("query", query, "num_heads + 2 * kv_num_heads", heads + 2 * kv_heads)
    return x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]


def places(q, seqlens_k, total_sequence_length):
    """Keys in all; and for each batch row where the new ones begin, and how many keys there are.
    A first prompt begins at 0, and may be padded at its end."""
    batch, _, seqlen, _ = q.shape
    total = int(total_sequence_length.reshape(()))
    lengths = [last + 1 for last in seqlens_k.reshape(-1).tolist()]
    if len(lengths) != batch:
        raise ValueError(f"seqlens_k has {len(lengths)} entries, expected {batch}")
    if total < seqlen:
        raise ValueError(f"total_sequence_length is {total}, expected at least {seqlen}")
    least = 1 if total == seqlen else seqlen
    if not all(least <= length <= total for length in lengths):
        raise ValueError(
            f"seqlens_k holds {min(lengths) - 1} to {max(lengths) - 1}, "
            f"expected {least - 1} to {total - 1}"
        )
    return total, [0 if total == seqlen else n - seqlen for n in lengths], lengths


def one(numbers):
    """An int where all are the same, which is faster, else an array."""
    return numbers[0] if len(set(numbers)) == 1 else np.array(numbers, np.int64)


def rotary_index(position_ids, starts, seqlen, total):
    """Rows of the tables, as an index: a slice for all, or (batch, sequence)."""
    first = one(starts)
    if position_ids is not None and total == seqlen:
        first = int(position_ids.reshape(-1)[0])  # of a first prompt only this one counts
    elif position_ids is not None:
        if position_ids.shape != (len(starts), seqlen):
            raise ValueError(
                f"position_ids has shape {position_ids.shape}, expected {(len(starts), seqlen)}"
            )
        return position_ids
    if type(first) is int:
        return slice(first, first + seqlen)
    return first[:, None] + np.arange(seqlen)


def rows_of(table, index):
    """These rows of cos_cache or sin_cache, as (batch or 1, 1, sequence, pairs) of float32."""
    if table.ndim != 2:
        raise ValueError(f"cos_cache or sin_cache has shape {table.shape}, expected two axes")
    if type(index) is slice:
        least, most = index.start, index.stop - 1
    else:
        least, most = int(index.min(initial=0)), int(index.max(initial=0))
    if least < 0 or most >= len(table):
        raise ValueError(f"positions are {least} to {most}, expected 0 to {len(table) - 1}")
    rows = table[index].astype(np.float32, copy=False)
    return rows[None, None] if rows.ndim == 2 else rows[:, None]


def turned(x, cos, sin, interleaved):
    """What `rotary` does, of arrays that are known to be plain."""
    if cos.shape != sin.shape or 2 * cos.shape[3] > x.shape[3]:
        raise ValueError(
            f"cos_cache has {cos.shape[3]} columns and sin_cache {sin.shape[3]}, "
            f"expected the same, at most half of head_size {x.shape[3]}"
        )
    out = np.empty(x.shape, x.dtype)
    rows = np.arange(x.shape[2])[None, None]
    _core.rotate(x, out, cos, sin, rows, interleaved, None)
    return out


def written(call, output, x, past, starts, total):
    """The present cache, with the new rows `x` after what is kept of the past."""
    name = ("past_key", "past_value")[output - 1]
    batch, kv_heads, seqlen, head_dim = x.shape
    room = 0
    if past is not None:
        room = past.shape[2] if past.ndim == 4 else -1
        if past.shape != (batch, kv_heads, room, head_dim):
            expected = (batch, kv_heads, "cache_sequence_length", head_dim)
            raise ValueError(f"{name} has shape {past.shape}, expected {expected}")
    if max(starts, default=0) > room:
        raise ValueError(f"{name} has {room} rows, expected at least {max(starts)}")
    present = call.new(output, (batch, kv_heads, max(total, room), head_dim), x.dtype)
    if present is None:
        present = np.empty((batch, kv_heads, max(total, room), head_dim), x.dtype)
    apart = past is not None and not _core.overlap(past, present)
    for row, new, start in zip(range(batch), x, starts, strict=True):
        if apart:
            present[row, :, :start] = past[row, :, :start]
        present[row, :, start : start + seqlen] = new
        if apart or past is None:
            present[row, :, start + seqlen :] = 0
    return present
