"""Exact multi-head attention for NumPy arrays on CPUs."""

try:
    from .attention import attention
except ModuleNotFoundError as error:
    if error.name != "mha_fast._core":
        raise
    raise ImportError(
        f"{__path__[0]} is the source of mha_fast, without the extension that a build makes. Start "
        "Python in another folder, where it finds the installed package (`pip install .`), or "
        "build the extension here (`pip install -e .`)."
    ) from None
from . import heads, reference
from .gradients import attention_vjp
from .merging import merge
from .model.cache import KVCache
from .model.layer import MultiHeadAttention
from .model.norm import layer_norm, layer_norm_vjp, rms_norm
from .model.packed import PackedWeight, pack
from .model.projection import linear, linear_vjp
from .model.rotary import rotary, rotary_tables
from .plan import Plan, explain
from .process.config import show_config
from .process.threads import get_num_threads, set_num_threads
from .results import (
    AttentionGradients,
    AttentionResult,
    AttentionStats,
    LayerGradients,
    LinearGradients,
    NormGradients,
    NormResult,
)
from .state import AttentionState
from .stats import attention_stats
from .varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "AttentionGradients",
    "AttentionResult",
    "AttentionState",
    "AttentionStats",
    "KVCache",
    "LayerGradients",
    "LinearGradients",
    "MultiHeadAttention",
    "NormGradients",
    "NormResult",
    "PackedWeight",
    "Plan",
    "attention",
    "attention_stats",
    "attention_varlen",
    "attention_vjp",
    "explain",
    "get_num_threads",
    "heads",
    "layer_norm",
    "layer_norm_vjp",
    "linear",
    "linear_vjp",
    "merge",
    "pack",
    "reference",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "set_num_threads",
    "show_config",
]
