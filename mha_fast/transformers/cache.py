"""Keys and values of generated tokens, in memory that grows by doubling."""

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)


def cache(config):
    """A cache for ``model.generate`` and for models that writes new tokens behind the old ones.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        ``model.config``.

    Returns
    -------
    transformers.DynamicCache
        Its layers of full and of sliding attention copy what they hold when their memory is full,
        and then have room for as much again; transformers' own copy it for every token. Layers of
        other kinds are transformers' own. Where gradients are wanted, all of them copy. For models
        with an encoder it is the first part of a transformers.EncoderDecoderCache.

    Raises
    ------
    AttributeError
        `config` is no configuration.

    Notes
    -----
    Keys and values that a model gets are views, which stay what they are when the cache goes on.
    It works with every `attn_implementation`, and for every device.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> cache(LlamaConfig(num_hidden_layers=2))
    DynamicCache(layers=[GrowingLayer, GrowingLayer])
    """
    grown = DynamicCache(config=config)
    grown.layers = [_growing(layer) for layer in grown.layers]
    if config.is_encoder_decoder:
        return EncoderDecoderCache(grown, DynamicCache(config=config))
    return grown


def _growing(layer):
    if type(layer) is DynamicLayer:
        return GrowingLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        return GrowingSlidingWindowLayer(layer.sliding_window)
    return layer


class Room:
    """Memory for a tensor (batch, kv_heads, length, head_dim) that goes on along its length."""

    def __init__(self):
        self.memory, self.used = None, 0

    def append(self, held, new):
        """`held`, and `new` behind it: a view. Nothing is copied if `held` ends the last one."""
        length = held.shape[-2] if held.numel() else 0
        start, stop = self.used - length, self.used + new.shape[-2]
        if not self._ends_with(held, new, start, stop):
            start, stop = 0, length + new.shape[-2]
            self.memory = new.new_empty((*new.shape[:-2], 2 * stop, new.shape[-1]))
            if length:
                self.memory[..., :length, :] = held
        self.memory[..., start + length : stop, :] = new
        self.used = stop
        return self.memory[..., start:stop, :]

    def _ends_with(self, held, new, start, stop):
        memory = self.memory
        if memory is None or not held.numel() or start < 0 or stop > memory.shape[-2]:
            return False
        if memory.is_inference() and not torch.is_inference_mode_enabled():
            return False
        end = memory[..., start : self.used, :]
        return (
            held.data_ptr() == end.data_ptr()
            and held.shape == end.shape
            and held.stride() == end.stride()
            and held.dtype == new.dtype
        )


class Growing:
    """What both kinds of layers share."""

    def lazy_initialization(self, key_states, value_states):
        """With no token yet."""
        super().lazy_initialization(key_states, value_states)
        self._rooms = Room(), Room()

    def _appended(self, key_states, value_states):
        """All keys and values, as views; None where they must be copied for gradients."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tensors = self.keys, self.values, key_states, value_states
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return None
        return [
            room.append(held, new)
            for room, held, new in zip(
                self._rooms, (self.keys, self.values), (key_states, value_states), strict=True
            )
        ]


class GrowingLayer(Growing, DynamicLayer):
    """Keys and values of all tokens."""

    def update(self, key_states, value_states, *args, **kwargs):
        """The tokens so far, and these."""
        whole = self._appended(key_states, value_states)
        if whole is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = whole
        return self.keys, self.values


class GrowingSlidingWindowLayer(Growing, DynamicSlidingWindowLayer):
    """Keys and values of the last tokens: they move to the front when the memory is full."""

    def update(self, key_states, value_states, *args, **kwargs):
        """The tokens that the first of these sees, and these."""
        whole = None if self.record_past else self._appended(key_states, value_states)
        if whole is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = (x[..., 1 - self.sliding_window :, :] for x in whole)
        return whole[0], whole[1]
