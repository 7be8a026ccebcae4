"""The operator Attention."""

import numpy as np
from onnx.reference.op_run import OpRun

from .._core import ask
from ..arguments import check_broadcast, integers, stored
from ..attention import attention
from ..options import checked
from .heads import pack_heads, split_heads

SCORE_OPTIONS = [("scale",), ("scale", "softcap"), None]  # of each mode; None: all options
AFTER_SOFTMAX = len(SCORE_OPTIONS)
PRECISIONS = (1, 10, 11, 16)  # ONNX's numbers of the element types with 32, 16, 64 and 16 bits
DOUBLE = 11


class Attention(OpRun):
    """Attention of the domain "", opsets 23, 24 and 25, computed by `mha_fast.attention`.

    All inputs, attributes and outputs, with Q, K and V of four axes or packed into three. A class
    for ``onnx.reference.ReferenceEvaluator(model, new_ops=[Attention])``, which finds an operator
    by its domain and name, so that one class serves every opset.

    Raises
    ------
    TypeError
        An input has an unsupported dtype.
    ValueError
        Shapes do not fit, attributes contradict them, a length is out of range, or past and
        present caches are not used together.

    Notes
    -----
    It follows the text of the operator as corrected in onnx 1.23: `softcap` before the mask, query
    head ``h`` reads KV head ``h // (heads // kv_heads)``, query ``i`` stands at the position
    ``i + offset``, where the offset is the length of the past, or ``nonpad_kv_seqlen`` less the
    number of queries, or 0. Beyond the text:

    - Keys that no query may see are never read, so a NaN there does no harm.
    - 16-bit floats are computed in float32, with one rounding at the end. `softmax_precision`
      raises all of the computation to float64, and never lowers it.
    - `scale` may be negative, because it is not split into square roots.
    - ``qk_matmul_output_mode=0`` is the scaled product before `softcap`.

    Examples
    --------
    >>> q, k, v = (np.random.rand(2, 4, 10, 8) for _ in range(3))
    >>> y = Attention.eval(q, k, v, n_outputs=1, is_causal=1)
    >>> bool((y == attention(q, k, v, causal=True)).all())
    True
    """

    op_domain = ""

    def _run(
        self,
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
        if not Q.ndim == K.ndim == V.ndim:
            raise ValueError(
                f"Q, K and V have {Q.ndim}, {K.ndim} and {V.ndim} axes, expected the same"
            )
        q = split_heads("Q", Q, "q_num_heads", q_num_heads)
        k = split_heads("K", K, "kv_num_heads", kv_num_heads)
        v = split_heads("V", V, "kv_num_heads", kv_num_heads)
        self.check_caches(past_key, past_value, nonpad_kv_seqlen)
        k, past = after(past_key, "past_key", k)
        v, _ = after(past_value, "past_value", v)
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
        y, scores = self.answers((q, k, v), options, qk_matmul_output_mode)
        y = stored(y, Q.dtype)
        return self.named(
            y if Q.ndim == 4 else pack_heads(y),
            k,
            v,
            scores if scores is None else stored(scores, Q.dtype),
        )

    def check_caches(self, past_key, past_value, nonpad_kv_seqlen):
        """Past and present go together; there is one cache, inside or outside."""
        used = {
            "past_key": past_key is not None,
            "past_value": past_value is not None,
            "present_key": self.asks_for(1),
            "present_value": self.asks_for(2),
        }
        missing = ", ".join(name for name, there in used.items() if not there)
        if (used["past_key"] or used["past_value"]) and missing:
            raise ValueError(
                f"{missing} missing, expected past and present keys and values together"
            )
        if used["past_key"] and nonpad_kv_seqlen is not None:
            raise ValueError("nonpad_kv_seqlen is given beside past_key, expected one of them")

    def answers(self, arrays, options, mode):
        """Y, and what the mode says of the scores, if it is asked for."""
        if not 0 <= mode <= AFTER_SOFTMAX:
            raise ValueError(f"qk_matmul_output_mode is {mode}, expected 0 to {AFTER_SOFTMAX}")
        if not self.asks_for(3):
            return attention(*arrays, **options), None
        if mode == AFTER_SOFTMAX:
            return attention(*arrays, **options, return_weights=True)
        stage = SCORE_OPTIONS[mode]
        kept = {name: x for name, x in options.items() if stage is None or name in stage}
        return attention(*arrays, **options), checked(ask(*arrays, **kept)).scores()

    def asks_for(self, output):
        return len(self.output) > output and self.output[output] != ""

    def named(self, *results):
        """The results that have a name in the graph, None in place of the others."""
        asked = results[: len(self.output)]
        return tuple(x if self.asks_for(i) else None for i, x in enumerate(asked))

    def _check_and_fix_outputs(self, results):
        """The evaluator keeps an output without a name under "", where the next operator looks
        for the inputs that it does not have. So None has to pass."""
        return results


def score_options(*, is_causal=0, scale=None, softcap=0, left_window_size=-1, right_window_size=-1):
    """Attributes in our words."""
    sides = {"left_window_size": left_window_size, "right_window_size": right_window_size}
    for name, side in sides.items():
        if side < -1:
            raise ValueError(f"{name} is {side}, expected -1 (open) or more")
    return {
        "causal": bool(is_causal),
        "window": tuple(None if side < 0 else side for side in sides.values()),
        "scale": scale,
        "softcap": softcap or None,
    }


def after(past, name, x):
    """`x` after what is kept from before, and the length of that."""
    if past is None:
        return x, 0
    expected = (*x.shape[:2], "past_sequence_length", x.shape[3])
    if past.ndim != 4 or (*past.shape[:2], past.shape[3]) != (*x.shape[:2], x.shape[3]):
        raise ValueError(f"{name} has shape {past.shape}, expected {expected}")
    if past.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {past.dtype}, expected {x.dtype} as the new ones")
    return np.concatenate([past, x], axis=2), past.shape[2]


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
