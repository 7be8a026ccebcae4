"""Exact multi-head attention for NumPy arrays on CPUs."""

from . import heads, reference
from .attention import attention
from .config import show_config
from .layer import MultiHeadAttention
from .projection import linear
from .results import AttentionResult
from .threads import get_num_threads, set_num_threads

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
