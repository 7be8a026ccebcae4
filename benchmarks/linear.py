"""The products of the layer alone: sizes, systems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from problem import Problem, normal
from systems import MhaFast, NumPy, Torch
from truth import check_product


@dataclass(frozen=True)
class Linear(Problem):
    """``x @ weight.T + bias`` with x (rows, width) and weight (outputs, width)."""

    name: str
    rows: int
    width: int
    outputs: int
    dtype: str = "float32"
    unit: str = "flops"

    def flops(self):
        return 2 * self.rows * self.width * self.outputs

    def columns(self):
        sizes = {name: str(getattr(self, name)) for name in ("rows", "width", "outputs")}
        return {**sizes, "GFLOP": f"{self.flops() / 1e9:.3g}"}

    def make_inputs(self, seed=0):
        rng = np.random.default_rng(seed)
        shapes = {
            "x": (self.rows, self.width),
            "weight": (self.outputs, self.width),
            "bias": (self.outputs,),
        }
        return {name: normal(rng, shape, self.dtype) for name, shape in shapes.items()}

    def check(self, inputs, output):
        check_product(self, inputs, output)


class MhaFastLinear(MhaFast):
    """mha_fast.linear."""

    def prepare(self, case, inputs):
        linear = self.package.linear
        return lambda: linear(**inputs)


class NumPyLinear(NumPy):
    """NumPy's @, which is its BLAS, and the bias in place."""

    def prepare(self, case, inputs):
        return lambda: self.linear(**inputs)

    @staticmethod
    def linear(x, weight, bias):
        y = x @ weight.T
        y += bias
        return y


class TorchLinear(Torch):
    """torch.nn.functional.linear."""

    def prepare(self, case, inputs):
        linear = self.torch.nn.functional.linear
        tensors = [self.tensor(inputs[name]) for name in ("x", "weight", "bias")]
        return lambda: linear(*tensors)


SYSTEMS = {system.name: system for system in (MhaFastLinear, NumPyLinear, TorchLinear)}


def linear_sizes(d_models=(512, 768, 1024), most_rows=8192):
    """The layer's two products, q, k and v in one and the output, with 64 rows and more."""
    return [
        Linear(f"linear_d{d}_{which}_r{rows}", rows, d, outputs)
        for d in d_models
        for which, outputs in (("qkv", 3 * d), ("out", d))
        for rows in (2**power for power in range(6, 14))
        if rows <= most_rows
    ]
