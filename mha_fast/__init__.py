"""Exact multi-head attention for NumPy arrays on CPUs."""

from . import heads, reference
from .attention import attention
from .model.layer import MultiHeadAttention
from .model.projection import linear
from .process.config import show_config
from .process.threads import get_num_threads, set_num_threads
from .results import AttentionResult

__version__ = "0.1.0"

__all__ = [
    "AttentionResult",
    "MultiHeadAttention",
    "attention",
    "get_num_threads",
    "heads",
    "linear",
    "reference",
    "set_num_threads",
    "show_config",
]
