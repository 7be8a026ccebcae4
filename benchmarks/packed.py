"""Few rows of x times a packed weight, as where a model writes a text: sizes, systems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from linear import Linear, NumPyLinear, TorchLinear
from problem import ITEM_BYTES, normal
from systems import MhaFast


@dataclass(frozen=True)
class Packed(Linear):
    """``x @ weight.T + bias``, where reading the weight takes the time."""

    unit: str = "bandwidth"
    stored: str = "float32"  # dtype of the weight

    def kv_bytes(self):
        """Bytes of the weight."""
        return self.width * self.outputs * ITEM_BYTES[self.stored]

    def make_inputs(self, seed=0):
        inputs = super().make_inputs(seed)
        shape = inputs["weight"].shape
        return inputs | {"weight": normal(np.random.default_rng([seed, 1]), shape, self.stored)}


class MhaFastPacked(MhaFast):
    """mha_fast.linear of what mha_fast.pack has made."""

    def prepare(self, case, inputs):
        linear, packed = self.package.linear, self.package.pack(inputs["weight"])
        return lambda: linear(inputs["x"], packed, inputs["bias"])


class NumPyOfOneDtype(NumPyLinear):
    """It would widen the weight first."""

    def prepare(self, case, inputs):
        return super().prepare(case, inputs) if case.stored == case.dtype else None


class TorchOfOneDtype(TorchLinear):
    """It takes no tensors of two dtypes."""

    def prepare(self, case, inputs):
        return super().prepare(case, inputs) if case.stored == case.dtype else None


SYSTEMS = {system.name: system for system in (MhaFastPacked, NumPyOfOneDtype, TorchOfOneDtype)}


def packed_sizes(width=2048, outputs=8192):
    """A weight of 67 MB, or half of that in 16 bits."""
    return [
        Packed(f"packed_{stored}_r{rows}", rows, width, outputs, stored=stored)
        for stored in ("float32", "bfloat16")
        for rows in (1, 2, 4, 8, 16)
    ]
