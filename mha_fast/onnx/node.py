"""What a node Attention of a model means, wherever it runs.

`call` is the run of a node: ``call.wants(i)`` tells whether its output ``i`` has a name, and
``call.new(i, shape, dtype)`` is an array to fill with that output, or None.
"""

import numpy as np

from .._core import ask
from ..arguments import check_broadcast, integers, result_dtype, stored
from ..attention import attention
from ..options import checked
from .heads import split_heads, unpack_heads

SCORE_OPTIONS = [("scale",), ("scale", "softcap"), None]  # of each mode; None: all options
AFTER_SOFTMAX = len(SCORE_OPTIONS)
PRECISIONS = (1, 10, 11, 16)  # ONNX's numbers of the element types with 32, 16, 64 and 16 bits
DOUBLE = 11


def attention_node(
    call,
    Q,
    K,
    V,
    attn_mask=None,
    past_key=None,
    past_value=None,
    nonpad_kv_seqlen=None,
    *,
    q_num_heads=None,
    kv_num_heads=None,
    softmax_precision=None,
    qk_matmul_output_mode=0,
    **attributes,
):
    """Attention of the domain "", opsets 23 to 25: fills in the outputs of the call."""
    if not Q.ndim == K.ndim == V.ndim:
        raise ValueError(f"Q, K and V have {Q.ndim}, {K.ndim} and {V.ndim} axes, expected the same")
    q = split_heads("Q", Q, "q_num_heads", q_num_heads)
    k = split_heads("K", K, "kv_num_heads", kv_num_heads)
    v = split_heads("V", V, "kv_num_heads", kv_num_heads)
    check_caches(call, past_key, past_value, nonpad_kv_seqlen)
    k, past = present_of(call, 1, k, past_key)
    v, _ = present_of(call, 2, v, past_value)
    options = score_options(**attributes)
    if nonpad_kv_seqlen is None:
        options["q_offset"] = past
    else:
        options["kv_lengths"] = integers(
            "nonpad_kv_seqlen", nonpad_kv_seqlen, q.shape[:1], 0, k.shape[2]
        )
    if attn_mask is not None:
        options["mask"] = plain_mask(attn_mask, (*q.shape[:3], k.shape[2]))
    if is_double(softmax_precision):
        q = q.astype(np.float64)
    answer(call, Q, (q, k, v), options, qk_matmul_output_mode)


def check_caches(call, past_key, past_value, nonpad_kv_seqlen):
    """Past and present go together; there is one cache, inside or outside."""
    if past_key is None and past_value is None:
        return
    used = {
        "past_key": past_key is not None,
        "past_value": past_value is not None,
        "present_key": call.wants(1),
        "present_value": call.wants(2),
    }
    missing = ", ".join(name for name, there in used.items() if not there)
    if missing:
        raise ValueError(f"{missing} missing, expected past and present keys and values together")
    if nonpad_kv_seqlen is not None:
        raise ValueError("nonpad_kv_seqlen is given beside past_key, expected one of them")


def present_of(call, output, x, past):
    """`x` after what is kept from before, which is an output too, and the length of that."""
    if past is None:
        if call.wants(output):
            call.new(output, x.shape, x.dtype)[...] = x
        return x, 0
    name = ("past_key", "past_value")[output - 1]
    expected = (*x.shape[:2], "past_sequence_length", x.shape[3])
    if past.ndim != 4 or (*past.shape[:2], past.shape[3]) != (*x.shape[:2], x.shape[3]):
        raise ValueError(f"{name} has shape {past.shape}, expected {expected}")
    if past.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {past.dtype}, expected {x.dtype} as the new ones")
    length = past.shape[2] + x.shape[2]
    present = call.new(output, (*x.shape[:2], length, x.shape[3]), x.dtype)
    return np.concatenate([past, x], axis=2, out=present), past.shape[2]


def score_options(*, is_causal=0, scale=None, softcap=0, left_window_size=-1, right_window_size=-1):
    """Attributes in our words."""
    return {
        "causal": bool(is_causal),
        "window": (
            side("left_window_size", left_window_size),
            side("right_window_size", right_window_size),
        ),
        "scale": scale,
        "softcap": softcap or None,
    }


def side(name, size):
    if size < -1:
        raise ValueError(f"{name} is {size}, expected -1 (open) or more")
    return None if size < 0 else size


def plain_mask(mask, shape):
    """A mask as long as the keys, bool or float."""
    if not 1 <= mask.ndim <= 4:
        raise ValueError(f"attn_mask has shape {mask.shape}, expected one to four axes")
    if mask.dtype.kind in "iu":
        mask = mask.astype(np.float64)  # the operator adds integers
    length = mask.shape[-1]
    if length < shape[-1]:  # even if it is 1: keys past the mask's end are hidden
        short, mask = mask, np.empty((*mask.shape[:-1], shape[-1]), mask.dtype)
        mask[..., :length] = short
        mask[..., length:] = False if mask.dtype == np.bool_ else -np.inf
    axes = "(batch_size, q_num_heads, q_sequence_length, total_sequence_length)"
    check_broadcast("attn_mask", mask.shape, shape, axes)
    return mask


def is_double(precision):
    """Does this element type ask for float64?"""
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"softmax_precision is {precision}, expected one of {PRECISIONS}")
    return precision == DOUBLE


def answer(call, Q, arrays, options, mode):
    """Y, and what the mode says of the scores, if it is asked for."""
    if not 0 <= mode <= AFTER_SOFTMAX:
        raise ValueError(f"qk_matmul_output_mode is {mode}, expected 0 to {AFTER_SOFTMAX}")
    if not call.wants(3):
        answer_y(call, Q, arrays, options)
    elif mode == AFTER_SOFTMAX:
        result = answer_y(call, Q, arrays, options, return_weights=True)
        fill(call.new(3, result.weights.shape, Q.dtype), result.weights)
    else:
        answer_y(call, Q, arrays, options)
        stage = SCORE_OPTIONS[mode]
        kept = {name: x for name, x in options.items() if stage is None or name in stage}
        scores = checked(ask(*arrays, **kept)).scores()
        fill(call.new(3, scores.shape, Q.dtype), scores)


def answer_y(call, Q, arrays, options, **more):
    """Y in the layout and dtype of Q; what `attention` returns."""
    q, k, v = arrays
    batch = max(len(q), len(k), len(v))
    if Q.ndim == 4:
        to = call.new(0, (batch, *q.shape[1:3], v.shape[3]), Q.dtype)
    else:
        y = call.new(0, (batch, q.shape[2], q.shape[1] * v.shape[3]), Q.dtype)
        to = unpack_heads(y, q.shape[1])
    if result_dtype(*arrays) == Q.dtype:
        return attention(*arrays, **options, **more, out=to)
    result = attention(*arrays, **options, **more)
    fill(to, result.out if more else result)
    return result


def fill(to, x):
    to[...] = stored(x, to.dtype)
