"""A layer's call and the way back through its steps, in the opposite order."""

import numpy as np

from ..gradients import attention_vjp
from ..results import LayerGradients
from .layer_arguments import plain_tokens, rotation, score_terms
from .layer_weights import PACKED, SEPARATE
from .projection import linear_vjp, with_extra_keys


def layer_vjp(layer, query, key, value, rotary, masks, options, threads):
    """`MultiHeadAttention.vjp`; masks are (attn_mask, key_padding_mask)."""
    given = {"query": query, "key": key, "value": value}
    sizes, weights = layer._sizes, layer.weights
    inputs = plain_tokens(query, key, value, sizes, layer.dtype)
    query, key, _ = inputs
    extra_keys = layer.add_bias_kv + layer.add_zero_attn
    mask, bias = score_terms(
        *masks, options["causal"], (*query.shape[:-1], key.shape[-2]), layer.num_heads,
        extra_keys, layer.dtype,
    )  # fmt: skip
    projections = [_project(weights, sizes, x, i, threads) for i, x in enumerate(inputs)]
    q, k, v = (heads for heads, _ in projections)
    q, k, v = rotation(rotary, query, key, None, threads)(q, k, v)
    k, v = with_extra_keys(layer, k, "bias_k"), with_extra_keys(layer, v, "bias_v")
    options = options | {"bias": bias, "causal": options["causal"] and not extra_keys}
    attended, pull_attention = attention_vjp(q, k, v, mask, threads=threads, **options)
    heads = attended.swapaxes(-2, -3).reshape(*query.shape[:-1], -1)
    out, pull_out = linear_vjp(
        heads, weights["out_proj.weight"], weights.get("out_proj.bias"), threads=threads
    )

    def pullback(d_out):
        """Gradients of the inputs and of every weight."""
        back = pull_out(d_out)
        found = {"out_proj.weight": back.weight, "out_proj.bias": back.bias}
        d_heads = back.x.reshape(*query.shape[:-1], layer.num_heads, layer.head_dim)
        of = pull_attention(d_heads.swapaxes(-2, -3))
        d_q, d_k, d_v = of.q, *_without_extra_keys(layer, found, of.k, of.v, extra_keys)
        d_q, d_k, _ = rotation(_turned_back(rotary), query, key, None, threads)(d_q, d_k, d_v)
        d_inputs, parts = [], []
        for (_, pull), d in zip(projections, (d_q, d_k, d_v), strict=True):
            d_x, d_weight, d_bias = pull(d.swapaxes(-2, -3).reshape(*d.shape[:-3], d.shape[-2], -1))
            d_inputs.append(d_x)
            parts.append((d_weight, d_bias))
        found |= _parameters(sizes, *zip(*parts, strict=True))
        found = {name: found[name] for name in weights}
        return LayerGradients(*_of_inputs(given, d_inputs), found, of.sinks)

    return out, pullback


def _project(weights, sizes, x, i, threads):
    """The heads of q, k or v, and the way back."""
    rows = slice(sizes.edges[i] * sizes.head_dim, sizes.edges[i + 1] * sizes.head_dim)
    weight = weights[PACKED][rows] if sizes.packed else weights[SEPARATE[i]]
    bias = weights["in_proj_bias"][rows] if sizes.bias else None
    y, pull = linear_vjp(x, weight, bias, threads=threads)
    return y.reshape(*y.shape[:-1], -1, sizes.head_dim).swapaxes(-2, -3), pull


def _turned_back(rotary):
    """A rotation's gradient is the rotation by the opposite angles."""
    return rotary if rotary is None else rotary | {"sin": -np.asarray(rotary["sin"])}


def _without_extra_keys(layer, found, d_k, d_v, extra_keys):
    """Gradients of the keys and values of the sequence; those of the learned ones go to `found`."""
    if not extra_keys:
        return d_k, d_v
    seqlen_k = d_k.shape[-2] - extra_keys
    for name, d in (("bias_k", d_k), ("bias_v", d_v)):
        if layer.add_bias_kv:
            learned = d[..., seqlen_k, :]
            learned = learned.reshape(-1, *learned.shape[-2:]).sum(axis=0)
            found[name] = learned.reshape(layer.weights[name].shape)
    return d_k[..., :seqlen_k, :], d_v[..., :seqlen_k, :]


def _parameters(sizes, d_weights, d_biases):
    found = {"in_proj_bias": np.concatenate(d_biases)} if sizes.bias else {}
    if sizes.packed:
        return found | {PACKED: np.concatenate(d_weights)}
    return found | dict(zip(SEPARATE, d_weights, strict=True))


def _of_inputs(given, d_inputs):
    """One gradient for each array that was given: what it was used for adds up."""
    owner, names = {}, list(given)
    for i, name in enumerate(names):
        x = given[name]
        same = next((n for n in names[:i] if x is None or x is given[n]), name)
        # Default: a key is the query, a value the key.
        owner[name] = owner[names[i - 1]] if x is None else owner.get(same, name)
    sums = dict.fromkeys(names)
    for name, d in zip(names, d_inputs, strict=True):
        at = owner[name]
        sums[at] = d if sums[at] is None else sums[at] + d
    return sums["query"], sums["key"], sums["value"]
