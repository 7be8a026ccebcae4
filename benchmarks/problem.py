"""What all kinds of cases have in common, and random numbers for them."""

from __future__ import annotations

import importlib.util

import numpy as np

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Problem:
    """What every kind of case has, beside the fields `name`, `dtype` and `unit`."""

    weights = False  # whether attention weights are returned too
    options = ()  # what not every system can say

    def possible(self):
        """Whether NumPy can hold the arrays."""
        return self.dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes") is not None

    def make_inputs(self, seed=0):
        """A dictionary of what the systems compute with."""
        raise NotImplementedError

    def check(self, inputs, output):
        """Raise ValueError unless `output` is right."""
        raise NotImplementedError

    def flops(self):
        """FLOPs that a share is counted from."""
        raise NotImplementedError

    def flops_with_padding(self):
        """FLOPs if keys that do not exist counted too."""
        return self.flops()

    def kv_bytes(self):
        """Bytes of K and V that have to be read."""
        return 0

    def columns(self):
        """What ``--list`` shows: column to text."""
        raise NotImplementedError


def normal(rng, shape, dtype):
    """Random numbers of a storage dtype."""
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  (tells NumPy the name)
    drawn = np.float64 if dtype == "float64" else np.float32
    return rng.standard_normal(shape, drawn).astype(dtype, copy=False)
