"""A layer's call and the way back through its steps, in the opposite order."""

import numpy as np

from ..gradients import attention_vjp
from ..results import LayerGradients
from .layer_arguments import plain_tokens, rotation, score_terms
from .layer_weights import PACKED, SEPARATE
from .projection import head_products, heads_of, linear_vjp, with_extra_keys

WRT = ("q", "k", "v", "sinks")


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
    parts, pulls = {}, []
    for run, x, weight, rows_bias in head_products(inputs, weights, sizes):
        y, pull = linear_vjp(x, weight, rows_bias, threads=threads)
        parts |= heads_of(y, run, sizes)
        pulls.append((run, pull))
    q, k, v = rotation(rotary, query, key, None, threads)(*(parts[i] for i in range(3)))
    k, v = with_extra_keys(layer, k, "bias_k"), with_extra_keys(layer, v, "bias_v")
    options = options | {"bias": bias, "causal": options["causal"] and not extra_keys}
    attended, pull_attention = attention_vjp(q, k, v, mask, wrt=WRT, threads=threads, **options)
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
        d_inputs, d_parameters = {}, []
        for run, pull in pulls:
            rows = [_rows((d_q, d_k, d_v)[i]) for i in run]
            d_x, *of_rows = pull(np.concatenate(rows, axis=-1))
            d_inputs[run[0]] = d_x
            d_parameters.append(of_rows)
        found |= _parameters(sizes, *zip(*d_parameters, strict=True))
        found = {name: found[name] for name in weights}
        return LayerGradients(*_of_inputs(given, d_inputs), found, of.sinks)

    return out, pullback


def _rows(heads):
    """(..., heads, seqlen, head_dim) as (..., seqlen, heads * head_dim)."""
    *batch, num_heads, seqlen, head_dim = heads.shape
    return heads.swapaxes(-2, -3).reshape(*batch, seqlen, num_heads * head_dim)


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
    names, owner, sums = list(given), {}, dict.fromkeys(given)
    for i, name in enumerate(names):
        same = (n for n in names[:i] if given[name] is given[n])
        # A key is by default the query, a value the key.
        owner[name] = (
            owner[names[i - 1]] if given[name] is None else owner.get(next(same, ""), name)
        )
        if i in d_inputs:
            at = owner[name]
            sums[at] = d_inputs[i] if sums[at] is None else sums[at] + d_inputs[i]
    return tuple(sums.values())
