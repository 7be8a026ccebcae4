"""Our attention in Hugging Face's transformers, for models on the CPU.

>>> import mha_fast.transformers
>>> name = mha_fast.transformers.register()
>>> from transformers import AutoModel, BertConfig
>>> config = BertConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4)
>>> model = AutoModel.from_config(config, attn_implementation=name)

It needs ``pip install "mha_fast[transformers]"``; ``import mha_fast`` does not load it.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils.output_capturing import _active_collector

from .torch import attention

__all__ = ["cache", "register"]

NAME = "mha_fast"


def register():
    """Make `mha_fast` an attention implementation of transformers. It may be called again.

    Returns
    -------
    str
        The name, for ``from_pretrained(..., attn_implementation=...)``, ``set_attn_implementation``
        or, with sentence-transformers, ``model_kwargs={"attn_implementation": ...}``.

    Notes
    -----
    Masks that follow from positions and padding alone, causal ones, windows and padded batches, are
    never made: models get a small object in their place. Dense ones are made for packed and chunked
    sequences, and where a model has a rule of its own.

    Examples
    --------
    >>> register()
    'mha_fast'
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask_of)
    return NAME


def cache(config):
    """A cache for ``model.generate(..., past_key_values=...)`` that grows in place.

    transformers' own copies all keys and values for each token; this one doubles its memory where
    it is full. It is a `transformers.DynamicCache`; layers with a sliding window are as there.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model.

    Returns
    -------
    transformers.DynamicCache

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> cache(LlamaConfig(num_hidden_layers=2)).layers
    [GrowingLayer, GrowingLayer]
    """
    made = DynamicCache(config=config)
    made.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in made.layers]
    if made.layer_class_to_replicate is DynamicLayer:
        made.layer_class_to_replicate = GrowingLayer
    return made


class PositionMask:
    """Who sees whom, by positions and padding; what stands in for a mask of all pairs.

    Attributes
    ----------
    options : dict
        causal, window, q_offset and mask, for `attention`.
    shape : tuple
        Of the mask that was not made. Models look at it, and at `ndim`.
    """

    ndim = 4

    def __init__(self, options, shape):
        self.options = options
        self.shape = shape


def mask_of(batch_size, q_length, kv_length, **given):
    """The mask function of transformers' interface; its arguments are keywords there."""
    made = given.get("attention_mask")
    if isinstance(made, PositionMask):  # a static cache makes it early, and passes it on
        return made
    rule = _rule_of(given.get("mask_function", causal_mask_function), given.get("local_size"))
    if rule is None or given.get("use_vmap"):
        skips = dict.fromkeys(("allow_is_causal_skip", "allow_is_bidirectional_skip"), False)
        return sdpa_mask(batch_size, q_length, kv_length, **given | skips)
    kv_offset = given.get("kv_offset", 0)
    padding = prepare_padding_mask(made, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, None, None, kv_offset : kv_offset + kv_length]
        padding = None if not torch.compiler.is_compiling() and padding.all() else padding
    options = rule | {"q_offset": given.get("q_offset", 0) - kv_offset, "mask": padding}
    return PositionMask(options, (batch_size, 1, q_length, kv_length))


def _rule_of(mask_function, width):
    """causal and window of one of transformers' functions of positions; None: it is another one."""
    if mask_function is causal_mask_function:
        return {"causal": True}
    if mask_function is bidirectional_mask_function:
        return {"causal": False}
    if width is not None and _same(mask_function, sliding_window_causal_mask_function(width)):
        return {"causal": True, "window": (width - 1, None)}
    if width is not None and _same(
        mask_function, sliding_window_bidirectional_mask_function(width)
    ):
        return {"causal": False, "window": (width, width)}
    return None


def _same(a, b):
    """Are they equal, or functions of the same code over the same values?"""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    code = getattr(a, "__code__", None)
    if code is None or code is not getattr(b, "__code__", None):
        return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
    cells = [[x.cell_contents for x in f.__closure__ or ()] for f in (a, b)]
    return all(map(_same, *cells))


def attend(module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, **given):
    """The attention function of transformers' interface.

    Returns
    -------
    out : Tensor, shape (batch, seqlen_q, heads, head_dim_v)
    weights : Tensor or None
        Where the call has ``output_attentions``, or the model collects them.
    """
    if type(given.get("cache")).__name__ == "PagedAttentionCache":
        raise ValueError("cache is paged, expected another one: pages are for GPU servers")
    options = _seen(module, query, key, attention_mask, given)
    if dropout:
        options |= {"dropout_p": dropout, "seed": torch.randint(2**62, ())}
    if (bias := given.get("position_bias")) is not None:
        options["bias"] = bias[..., : key.shape[-2]]
    if (sinks := given.get("s_aux")) is not None:
        options["sinks"] = sinks
    wants_weights = bool(given.get("output_attentions")) or _are_collected()
    result = attention(
        query, key, value, scale=scaling, softcap=given.get("softcap"),
        return_weights=wants_weights, **options,
    )  # fmt: skip
    out, weights = result if wants_weights else (result, None)
    return out.transpose(1, 2).contiguous(), weights


def _are_collected():
    """Does a model whose layers are not told so collect weights?"""
    collected = _active_collector.get() or {}
    return any(name.endswith("attentions") for name in collected)


def _seen(module, query, key, mask, given):
    """causal, window, q_offset and mask."""
    if isinstance(mask, PositionMask):
        return dict(mask.options)
    if mask is not None:
        return {"mask": mask[..., : key.shape[-2]]}
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return {"causal": bool(causal and query.shape[-2] > 1), "q_offset": 0}


class GrowingLayer(DynamicLayer):
    """A layer of a cache whose keys and values are views of buffers with room to spare."""

    def __init__(self, **options):
        super().__init__(**options)
        self._buffers = {}

    def update(self, key_states, value_states, *args, **kwargs):
        """Append keys and values, and return all."""
        if key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name, old, new):
        buffer = self._buffers.get(name)
        seen = old.shape[-2] if old.numel() else 0
        length = seen + new.shape[-2]
        if not _begins(buffer, old) or length > buffer.shape[-2]:
            room = (*new.shape[:-2], max(2 * seen, length, 64), new.shape[-1])
            buffer = self._buffers[name] = new.new_empty(room)
            buffer[..., :seen, :] = old if seen else buffer[..., :0, :]
        buffer[..., seen:length, :] = new
        return buffer[..., :length, :]


def _begins(buffer, view):
    """Is this a view of the first rows of the buffer? Reordered or repeated layers are not."""
    return (
        buffer is not None
        and buffer.data_ptr() == view.data_ptr()
        and buffer.stride() == view.stride()
        and buffer.shape[:-2] == view.shape[:-2]
    )
