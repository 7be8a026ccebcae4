"""The layer once more, from the definitions, in the widest float, with a bound for its error.

The bounds follow the steps (running error analysis: Higham, Accuracy and Stability of Numerical
Algorithms, section 3.3): each inherits the errors of the one before and adds its own, which are
those that judge.py grants.
"""

from typing import NamedTuple

import judge
import numpy as np
import oracle


class LayerAnswer(NamedTuple):
    out: np.ndarray
    out_bound: np.ndarray
    weights: np.ndarray  # of each head
    weights_bound: np.ndarray


def multi_head_attention(
    layer,
    query,
    key=None,
    value=None,
    *,
    key_padding_mask=None,
    attn_mask=None,
    causal=False,
):
    """The answer to a layer's call; options as in `mha_fast.MultiHeadAttention`."""
    compute = np.dtype(layer.dtype)
    wide = np.longdouble if compute == np.float64 else np.float64
    key = query if key is None else key
    value = key if value is None else value
    batched = np.ndim(query) == 3
    q, k, v = (x.astype(wide) if batched else x[None].astype(wide) for x in (query, key, value))
    w = {name: x.astype(wide) for name, x in layer.weights.items()}
    hidden, added = masks(layer, q, k, key_padding_mask, attn_mask, causal)

    width, kv_width = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    ends = [width, width + kv_width]
    if "in_proj_weight" in w:
        matrices = np.split(w["in_proj_weight"], ends)
    else:
        matrices = [w[f"{name}_proj_weight"] for name in "qkv"]
    biases = np.split(w.get("in_proj_bias", np.zeros(width + 2 * kv_width, wide)), ends)
    q, dq = project(q, matrices[0], biases[0], compute, layer.head_dim)
    k, dk = project(k, matrices[1], biases[1], compute, layer.head_dim)
    v, dv = project(v, matrices[2], biases[2], compute, layer.head_dim)
    if "bias_k" in w:
        k, dk = append(k, dk, w["bias_k"])
        v, dv = append(v, dv, w["bias_v"])
    if layer.add_zero_attn:
        k, dk = append(k, dk, np.zeros(kv_width, wide))
        v, dv = append(v, dv, np.zeros(kv_width, wide))

    mask = np.where(hidden, -np.inf, added)
    answer = oracle.attention(q, k, v, mask, wide=wide)
    p = answer.weights
    group_size = layer.num_heads // layer.num_kv_heads
    k, dk, v, dv = (np.repeat(x, group_size, axis=1) for x in (k, dk, v, dv))
    dk, k_size = dk.swapaxes(-1, -2), np.abs(k).swapaxes(-1, -2)
    ds = (dq @ k_size + np.abs(q) @ dk + dq @ dk) / np.sqrt(wide(layer.head_dim))
    ds = np.where(hidden, 0, ds).max(axis=-1, keepdims=True, initial=0)
    change = np.expm1(2 * ds)  # of a weight, when every score is off by ds, one way or the other
    weights_bound = change * p + (1 + change) * judge.weights_bound(answer, compute)
    da = change * (p @ np.abs(v)) + (1 + change) * (p @ dv + judge.out_bound(answer, compute))

    a, da = (x.swapaxes(1, 2).reshape(*q.shape[:1], q.shape[2], width) for x in (answer.out, da))
    out_weight, out_bias = w["out_proj.weight"], w.get("out_proj.bias", np.zeros(1, wide))
    out = a @ out_weight.T + out_bias
    bound = judge.product_bound(np.abs(a) + da, out_weight, out_bias, compute)
    result = LayerAnswer(out, bound + da @ np.abs(out_weight).T, p, weights_bound)
    return result if batched else LayerAnswer(*(x[0] for x in result))


def masks(layer, q, k, key_padding_mask, attn_mask, causal):
    """Which keys are hidden, and what is added, (batch, num_heads, seqlen_q, seqlen_k + extra)."""
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    shape = (batch, layer.num_heads, seqlen_q, seqlen_k)
    hidden, added = np.zeros(shape, bool), np.zeros(shape, q.dtype)
    terms = []
    if attn_mask is not None:
        terms.append(attn_mask if attn_mask.ndim == 2 else attn_mask.reshape(shape))
    if key_padding_mask is not None:
        terms.append(key_padding_mask.reshape(batch, 1, 1, seqlen_k))
    for term in terms:
        if term.dtype == bool:
            hidden = hidden | term
        else:
            hidden = hidden | (term == -np.inf)
            added = added + np.where(term == -np.inf, 0, term.astype(q.dtype))
    if causal:
        position = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
        hidden = hidden | (np.arange(seqlen_k) > position)
    extra = layer.add_zero_attn + ("bias_k" in layer.weights)
    return tuple(np.pad(x, [(0, 0)] * 3 + [(0, extra)]) for x in (hidden, added))


def project(x, weight, bias, compute, head_dim):
    """The heads of a projection, (batch, heads, seqlen, head_dim), and bounds of their errors."""
    exact, error = x @ weight.T + bias, judge.product_bound(x, weight, bias, compute)
    shape = (*x.shape[:2], len(weight) // head_dim, head_dim)
    return exact.reshape(shape).swapaxes(1, 2), error.reshape(shape).swapaxes(1, 2)


def append(x, error, row):
    """One more exact key or value, (kv_heads * head_dim), the same for each batch entry."""
    batch, kv_heads, _, head_dim = x.shape
    row = np.broadcast_to(row.reshape(kv_heads, 1, head_dim), (batch, kv_heads, 1, head_dim))
    return np.concatenate([x, row], axis=2), np.concatenate([error, np.zeros_like(row)], axis=2)
