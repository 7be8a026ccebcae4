"""BERT's encoder in NumPy: the sentence encoder and the reaction mapper are both one.

Every layer adds to the vector of each token what attention gathers from all tokens of
its text, then what a small network makes of it alone, and normalises after each. BERT
has weights of its own for each layer, ALBERT uses one layer again and again. Shapes in
the comments:

    batch       texts in this call, padded to the longest
    n           tokens of the longest text
    dim         width of a token's vector              (384 in MiniLM)
    heads       attention heads of a layer             (12)
    head_dim    width of a head                        (32)
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mha_fast import attention, linear

EPS = 1e-12  # of the layer norms, in all published BERT and ALBERT configurations
BLOCK = 16384  # numbers of one GELU step: they stay in the first-level cache


class Pair(NamedTuple):
    """A matrix (out, in) with its bias, or the scale of a layer norm with its shift."""

    weight: np.ndarray
    bias: np.ndarray


def read(tensors: Mapping, *names: str) -> Pair:
    """Take a pair out of the tensors of a file, or several, stacked."""
    parts = ([tensors[f"{name}.{part}"] for name in names] for part in Pair._fields)
    return Pair(*map(np.concatenate, parts))


class Layer(NamedTuple):
    """The weights of one layer."""

    qkv: Pair
    attention_out: Pair
    attention_norm: Pair
    up: Pair
    down: Pair
    norm: Pair


def read_layer(tensors: Mapping, prefix: str, names: Sequence[str]) -> Layer:
    """Take a layer out of the tensors of a file.

    The names are those of queries, keys and values, which become one product, then of the
    other fields of `Layer` in their order.
    """
    names = [f"{prefix}.{name}" for name in names]
    return Layer(read(tensors, *names[:3]), *(read(tensors, name) for name in names[3:]))


class Embeddings(NamedTuple):
    """A vector for each token of the vocabulary and for each position."""

    words: np.ndarray  # (vocab, width)
    positions: np.ndarray  # (longest text, width)
    segment: np.ndarray  # (width,): added to all, since a text is one segment here
    norm: Pair

    def __call__(self, tokens) -> np.ndarray:
        """(batch, n) to (batch, n, width)."""
        x = self.words[tokens] + self.positions[: tokens.shape[-1]] + self.segment
        return layer_norm(x, self.norm)


def read_embeddings(tensors: Mapping, prefix: str) -> Embeddings:
    """Take them out of the tensors of a file; BERT and ALBERT name them alike."""
    return Embeddings(
        words=tensors[f"{prefix}.word_embeddings.weight"],
        positions=tensors[f"{prefix}.position_embeddings.weight"],
        segment=tensors[f"{prefix}.token_type_embeddings.weight"][0],
        norm=read(tensors, f"{prefix}.LayerNorm"),
    )


class Encoder:
    """The layers, with what they have in common."""

    def __init__(self, layers: list[Layer], heads: int):
        self.layers = layers
        self.heads = heads

    def __call__(self, x, lengths, *, kept=None, return_weights=False):
        """Encode x (batch, n, dim), of which text b has lengths[b] tokens.

        `kept` (layers, heads) is False for heads whose output is set to 0. Returns the
        vectors (batch, n, dim), and with `return_weights` also the attention weights
        (layers, batch, heads, n, n).
        """
        weights = []
        for index, layer in enumerate(self.layers):
            found, seen = self.attend(x, layer.qkv, lengths, return_weights)
            weights.append(seen)
            if kept is not None:
                found[:, :, ~kept[index]] = 0
            found = linear(found.reshape(x.shape), *layer.attention_out)
            x = layer_norm(x + found, layer.attention_norm)
            made = linear(gelu(linear(x, *layer.up)), *layer.down)
            x = layer_norm(x + made, layer.norm)
        return (x, np.stack(weights)) if return_weights else x

    def attend(self, x, qkv: Pair, lengths, return_weights):
        """What each head gathers, (batch, n, heads, head_dim), and the weights or None."""
        qkv = linear(x, *qkv).reshape(*x.shape[:2], 3, self.heads, -1)
        # Attention wants (batch, heads, n, head_dim). These are views, read and written
        # where they lie.
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        found = np.empty((*x.shape[:2], self.heads, q.shape[-1]), x.dtype)
        result = attention(
            q, k, v, kv_lengths=lengths, out=found.swapaxes(1, 2), return_weights=return_weights
        )
        return found, result.weights if return_weights else None


def layer_norm(x, pair: Pair) -> np.ndarray:
    """Bring each vector to mean 0 and variance 1, then scale and shift it."""
    x = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(variance + EPS) * pair.weight + pair.bias


def gelu(x) -> np.ndarray:
    """x times the share of a normal distribution below x.

    By formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions: its
    error is below 5e-7 here, less than torch and NumPy differ in the products around it.
    """
    flat, result = x.reshape(-1), np.empty(x.size, x.dtype)
    for start in range(0, x.size, BLOCK):
        part = flat[start : start + BLOCK]
        z = np.abs(part) * np.sqrt(x.dtype.type(0.5))
        t = 1 / (1 + 0.3275911 * z)
        tail = 1.061405429 * t - 1.453152027
        for coefficient in (1.421413741, -0.284496736, 0.254829592):
            tail = tail * t + coefficient
        erf = np.copysign(1 - tail * t * np.exp(-z * z), part)
        result[start : start + BLOCK] = part * (0.5 + 0.5 * erf)
    return result.reshape(x.shape)
