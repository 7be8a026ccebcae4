"""SmolLM2, a Llama-type language model, in NumPy.

A transformer turns a row of tokens into logits for the next one. Every layer adds
two things to the vector of each token: what attention gathers from the tokens
before it, and what a small network makes of it alone. Shapes in the comments:

    n           new tokens in this call: the whole prompt, then one at a time
    length      tokens in the caches, the new ones included
    dim         width of a token's vector              (576 in SmolLM2-135M)
    heads       query heads                            (9)
    kv_heads    key and value heads, each serving heads / kv_heads query heads (3)
    head_dim    width of a head                        (64)
"""

from collections.abc import Callable, Sequence

import numpy as np

from mha_fast import KVCache, rotary, rotary_tables


class SmolLM2:
    """The model: its numbers, its weights, and the attention function it calls."""

    def __init__(self, config, weights, attention: Callable):
        self.config = config
        self.weights = weights
        self.attention = attention
        # RoPE: pair i of a head turns by base ** (-2i / head_dim) radians a token.
        self.angles = rotary_tables(config.context, config.head_dim, base=config.rope_base)

    def caches(self) -> list[KVCache]:
        """Keys and values of the tokens seen so far: none yet, in each layer."""
        shape = 1, self.config.num_kv_heads, self.config.head_dim
        return [KVCache(*shape) for _ in self.weights.layers]

    def __call__(self, tokens: Sequence[int], caches: list[KVCache]) -> np.ndarray:
        """Append tokens to the caches; return the next token's logits, (vocab,)."""
        x = self.weights.token_embd[tokens]  # (n, dim)
        for layer, cache in zip(self.weights.layers, caches, strict=True):
            normed = self.rms_norm(x, layer.attn_norm)
            x = x + self.attend(normed, layer, cache)
            normed = self.rms_norm(x, layer.ffn_norm)
            x = x + feed_forward(normed, layer)

        # Only the last token's logits are wanted; embedding and output share a matrix.
        last = self.rms_norm(x[-1], self.weights.output_norm)  # (dim,)
        return self.weights.token_embd @ last

    def attend(self, x, layer, cache) -> np.ndarray:
        """Write the new keys and values; gather what the queries find, (n, dim)."""
        n = len(x)
        q = self.split_heads(x @ layer.attn_q.T)  # (heads, n, head_dim)
        k = self.split_heads(x @ layer.attn_k.T)  # (kv_heads, n, head_dim)
        v = self.split_heads(x @ layer.attn_v.T)
        cache.append(self.rotate(k, len(cache)), v)
        # Causal: the last query sees the last key, so this is right for a prompt and
        # for a single token. cache.k and cache.v are views, (1, kv_heads, length, head_dim).
        q = self.rotate(q, len(cache) - n)
        out = self.attention(q, cache.k[0], cache.v[0], causal=True)
        return out.swapaxes(0, 1).reshape(n, -1) @ layer.attn_output.T

    def rotate(self, x, first) -> np.ndarray:
        """Turn (heads, n, head_dim) by the positions from `first` on (RoPE).

        Llama's published weights pair element i with i + head_dim / 2; GGUF reorders the
        rows of the Q and K matrices so that the pairs are neighbours.
        """
        positions = np.arange(first, first + x.shape[1])
        return rotary(x, *self.angles, positions=positions, interleaved=True)

    def split_heads(self, x) -> np.ndarray:
        """(n, heads * head_dim) to (heads, n, head_dim), a view."""
        return x.reshape(len(x), -1, self.config.head_dim).swapaxes(0, 1)

    def rms_norm(self, x, weight) -> np.ndarray:
        """Scale each vector to a root mean square of 1, then by `weight`."""
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.rms_eps) * weight


def feed_forward(x, layer) -> np.ndarray:
    """SwiGLU: silu(gate) * up, and back to (n, dim)."""
    gate = x @ layer.ffn_gate.T  # (n, hidden)
    up = x @ layer.ffn_up.T
    sigmoid = 0.5 + 0.5 * np.tanh(0.5 * gate)  # unlike 1 / (1 + exp), never overflows
    return (gate * sigmoid * up) @ layer.ffn_down.T
