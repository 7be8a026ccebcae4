"""The function that transformers' models call for attention."""

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils.output_capturing import _active_collector

import mha_fast.torch

from .mask import Mask, check_device

# What some models choose keys by, or add for every query, when no back end of transformers does.
UNKNOWN = ("indices", "block_indices", "sinks")
SEEDS = 2**62


def attend(module, query, key, value, attention_mask, dropout=0.0, **options):
    """What `AttentionInterface` asks for: (batch, seqlen_q, heads, head_dim_v), and weights or
    None."""
    _refuse(query, options)
    given = {
        "scale": options.get("scaling"),
        "softcap": options.get("softcap"),
        "sinks": options.get("s_aux"),
        "bias": options.get("position_bias"),
    }
    given |= _seen(module, query, attention_mask, options.get("is_causal"))
    if dropout:
        seed = torch.randint(SEEDS, ())  # torch.manual_seed rules, checkpoints repeat it
        given |= {"dropout_p": dropout, "seed": seed}
    weights = None
    if options.get("output_attentions") or _collects_weights():
        out, weights = mha_fast.torch.attention(query, key, value, return_weights=True, **given)
    else:
        out = mha_fast.torch.attention(query, key, value, **given)
    return out.transpose(1, 2).contiguous(), weights


def _collects_weights():
    """Whether a model is asked for `output_attentions`, which some do not pass on (GPT-2)."""
    return any("attentions" in name for name in _active_collector.get() or ())


def _seen(module, query, attention_mask, is_causal):
    """The options that say which keys a query sees."""
    if isinstance(attention_mask, Mask):
        seen = attention_mask.options
        return {"mask": attention_mask.tensor} if seen is None else seen
    if attention_mask is not None:
        return {"mask": attention_mask}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if is_causal and query.shape[2] > 1:
        return {"causal": True, "q_offset": 0}  # what sdpa means by it
    return {}


def _refuse(query, options):
    check_device(query.device)
    if isinstance(options.get("cache"), PagedAttentionCache):
        raise NotImplementedError(
            "mha_fast has no paged caches (continuous batching); use model.generate, or "
            "model.set_attn_implementation('sdpa')"
        )
    for name in UNKNOWN:
        if options.get(name) is not None:
            raise NotImplementedError(
                f"this model's attention takes {name}, which mha_fast does not know; use "
                "model.set_attn_implementation('eager')"
            )
