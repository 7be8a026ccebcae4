"""The layers that the tests draw from."""

import numpy as np
from sizes import random

from mha_fast import MultiHeadAttention

BATCH, HEADS, EMBED = 2, 4, 24
EACH = {"need_weights": True, "average_weights": False}

LAYERS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both extra keys": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "grouped": {"num_kv_heads": 2, "head_dim": 5},
    "grouped, extra keys": {"num_kv_heads": 1, "add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 7, "vdim": 10},
    "other widths, grouped": {"kdim": 7, "num_kv_heads": 2, "add_bias_kv": True, "head_dim": 9},
}


def layer_of(more, dtype=np.float32, seed=0):
    """A layer whose biases are not 0, as they would be if it were new."""
    layer = MultiHeadAttention(EMBED, HEADS, **more, dtype=dtype)
    weights = {
        name: random(*x.shape, dtype=dtype, seed=seed) / dtype(np.sqrt(x.shape[-1]))
        for name, x in layer.weights.items()
    }
    return MultiHeadAttention.from_state_dict(weights, HEADS, add_zero_attn=layer.add_zero_attn)


def tokens(*shape, dtype=np.float32, seed=0):
    return random(*shape, dtype=dtype, seed=seed)
