"""The whole layer: projections, attention, output projection. Sizes, systems, float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import truth
from linear import NumPyLinear
from problem import Problem, normal
from systems import MhaFast, NumPy, Torch


@dataclass(frozen=True)
class Layer(Problem):
    """Self-attention with biases over x (batch, tokens, d_model)."""

    name: str
    batch: int
    tokens: int
    d_model: int
    heads: int
    causal: bool = False
    dtype: str = "float32"
    unit: str = "flops"

    def flops(self):
        """8 tokens d_model^2 of products, and 4 d_model for every visible pair."""
        n, d = self.tokens, self.d_model
        pairs = n * (n + 1) // 2 if self.causal else n * n
        return self.batch * (8 * n * d * d + 4 * pairs * d)

    def columns(self):
        names = "batch", "tokens", "d_model", "heads"
        sizes = {name: str(getattr(self, name)) for name in names}
        return {**sizes, "GFLOP": f"{self.flops() / 1e9:.3g}"}

    def make_inputs(self, seed=0):
        """Tokens, and weights by torch's names, of a size that keeps the tokens'."""
        rng, d = np.random.default_rng(seed), self.d_model
        shrink = np.dtype(self.dtype).type(d**-0.5)
        return {
            "x": normal(rng, (self.batch, self.tokens, d), self.dtype),
            "weights": {
                "in_proj_weight": normal(rng, (3 * d, d), self.dtype) * shrink,
                "in_proj_bias": normal(rng, (3 * d,), self.dtype),
                "out_proj.weight": normal(rng, (d, d), self.dtype) * shrink,
                "out_proj.bias": normal(rng, (d,), self.dtype),
            },
        }

    def hidden(self):
        """True where a token may not look, or None."""
        if not self.causal:
            return None
        return ~np.tri(self.tokens, dtype=bool)

    def split(self, qkv):
        """q, k and v as views (..., heads, tokens, head_dim) of one product's rows."""
        parts = qkv.reshape(self.batch, self.tokens, 3, self.heads, -1)
        return parts.transpose(2, 0, 3, 1, 4)

    def check(self, inputs, output):
        """Compare a sample of the rows with float64."""
        truth.require_shape(output, inputs["x"].shape)
        weights = {name: x.astype(float) for name, x in inputs["weights"].items()}
        qkv = inputs["x"].astype(float) @ weights["in_proj_weight"].T
        q, k, v = self.split(qkv + weights["in_proj_bias"])
        rows = truth.sample(self.batch * self.tokens, most=64)
        for b, i in zip(*np.unravel_index(rows, (self.batch, self.tokens)), strict=True):
            s = (k[b] @ q[b, :, i, :, None])[..., 0] / math.sqrt(q.shape[-1])
            seen = slice(i + 1 if self.causal else None)
            p = truth.softmax(s[:, seen])[:, None]
            room = truth.tolerance(self.dtype, s[:, seen])
            mixed = (p @ v[b, :, seen])[:, 0]
            size = room * (p @ np.abs(v[b, :, seen]))[:, 0]
            weight, bias = weights["out_proj.weight"], weights["out_proj.bias"]
            exact = weight @ mixed.ravel() + bias
            bound = np.abs(weight) @ size.ravel()
            truth.require_near(output[b, i], exact, bound, f"batch {b}, token {i}")


class MhaFastLayer(MhaFast):
    """mha_fast.MultiHeadAttention."""

    def prepare(self, case, inputs):
        make = self.package.MultiHeadAttention.from_state_dict
        layer, x = make(inputs["weights"], case.heads), inputs["x"]
        return lambda: layer(x, causal=case.causal)


class NumPyLayer(NumPy):
    """What a careful NumPy user writes: two products around attention."""

    def prepare(self, case, inputs):
        weights, hidden = inputs["weights"], case.hidden()
        first = weights["in_proj_weight"], weights["in_proj_bias"]
        last = weights["out_proj.weight"], weights["out_proj.bias"]
        rows = inputs["x"].reshape(-1, case.d_model)
        shape = inputs["x"].shape

        def layer():
            q, k, v = case.split(NumPyLinear.linear(rows, *first))
            heads = self.attention(q, k, v, hidden).swapaxes(1, 2)
            return NumPyLinear.linear(heads.reshape(rows.shape), *last).reshape(shape)

        return layer


class TorchLayer(Torch):
    """torch.nn.MultiheadAttention in inference mode: its fast path, which users get."""

    fast_path = True

    def __init__(self, threads):
        super().__init__(threads)
        self.torch.backends.mha.set_fastpath_enabled(self.fast_path)
        self.inference = self.torch.inference_mode()
        self.inference.__enter__()  # for good

    def prepare(self, case, inputs):
        layer = self.torch.nn.MultiheadAttention(case.d_model, case.heads, batch_first=True)
        layer.load_state_dict({n: self.tensor(x) for n, x in inputs["weights"].items()})
        layer.eval()
        x, hidden = self.tensor(inputs["x"]), case.hidden()
        mask = None if hidden is None else self.tensor(hidden)
        options = {"need_weights": False, "attn_mask": mask, "is_causal": case.causal}
        return lambda: layer(x, x, x, **options)[0]


class TorchSdpaLayer(TorchLayer):
    """The same without the fast path: scaled_dot_product_attention between two products."""

    name = "torch_sdpa"
    fast_path = False


SYSTEMS = {system.name: system for system in (MhaFastLayer, NumPyLayer, TorchLayer, TorchSdpaLayer)}
HEADS = {512: 8, 768: 12, 1024: 16}


def layer_sizes(tokens=(64, 128, 256, 512, 1024), batches=(1, 8)):
    """Three widths with heads of 64, and one causal size of each."""
    return [
        Layer(f"layer_d{d}_b{batch}_s{n}{suffix}", batch, n, d, heads, bool(suffix))
        for d, heads in HEADS.items()
        for batch in batches
        for n in tokens
        for suffix in ("", "_causal")
        if not suffix or (batch, n) == (1, 512)
    ]
