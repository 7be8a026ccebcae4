"""The backward pass alone: gradients of q, k and v from that of the result. Sizes, systems.

The forward pass runs once, before the clock; what is timed is the pullback that it left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import report
from cases import CASES, Case
from problem import normal
from systems import LARGEST_SCORES, MhaFast, NumPy, System, Torch, bias_of, split_mask
from truth import check_attention, check_gradients

FORWARD = "mha_fast_forward"
FORWARDS = 2.5  # five products, where the forward pass has two


@dataclass(frozen=True)
class Backward(Case):
    """The gradients of one attention problem."""

    def flops(self):
        return int(FORWARDS * super().flops())

    def make_inputs(self, seed=0):
        """Arguments of attention, and the cotangent `d_out` of its result."""
        shape = self.batch, self.heads, self.seqlen_q, self.head_dim_v
        d_out = normal(np.random.default_rng([seed, 1]), shape, self.dtype)
        return {**super().make_inputs(seed), "d_out": d_out}

    def check(self, inputs, output):
        """`output` is a tuple of three gradients, or what the forward pass returns."""
        check = check_gradients if isinstance(output, tuple) else check_attention
        check(self, inputs, output)


def arguments(inputs):
    """Those of the forward pass."""
    return {name: x for name, x in inputs.items() if name != "d_out"}


class MhaFastBackward(MhaFast):
    """The pullback of mha_fast.attention_vjp."""

    options = ("alibi", "sinks", "dropout")

    def prepare(self, case, inputs):
        _, pullback = self.package.attention_vjp(**arguments(inputs), wrt=("q", "k", "v"))
        d_out = inputs["d_out"]
        return lambda: pullback(d_out)

    def canonical(self, output, case):
        return tuple(output[:3])


class MhaFastForward(MhaFast):
    """mha_fast.attention, which the shares of the backward pass are held against."""

    name = FORWARD
    options = MhaFastBackward.options

    def prepare(self, case, inputs):
        return super().prepare(case, arguments(inputs))


class NumPyBackward(NumPy):
    """What a careful NumPy user writes: the weights kept, four matmuls, the rest in place."""

    options = ("alibi", "sinks")

    def prepare(self, case, inputs):
        if 2 * case.score_bytes() > LARGEST_SCORES:
            return None
        out, weights = super().prepare(replace(case, weights=True), inputs)()
        tensors = (inputs[name] for name in "qkv")
        return partial(self.pullback, *tensors, out, weights, inputs["d_out"])

    @staticmethod
    def pullback(q, k, v, out, weights, d_out):
        def grouped(x):
            """The heads of a group are rows of one product, which adds them up."""
            return x.reshape(*k.shape[:2], -1, x.shape[-1])

        scale = q.dtype.type(q.shape[-1] ** -0.5)
        shape = q.shape
        q, out, weights, d_out = map(grouped, (q, out, weights, d_out))
        d_v = weights.swapaxes(-1, -2) @ d_out
        d_s = d_out @ v.swapaxes(-1, -2)
        d_s -= (d_out * out).sum(axis=-1, keepdims=True)
        d_s *= weights
        d_q, d_k = d_s @ k, d_s.swapaxes(-1, -2) @ q
        d_q *= scale
        d_k *= scale
        return d_q.reshape(shape), d_k, d_v


class TorchBackward(Torch):
    """torch.autograd.grad of scaled_dot_product_attention, the graph kept."""

    def prepare(self, case, inputs):
        attend = self.torch.nn.functional.scaled_dot_product_attention
        leaves = [self.tensor(inputs[name]).requires_grad_() for name in "qkv"]
        with self.torch.enable_grad():
            out = attend(*leaves, **self.sdpa_options(case, inputs))
        d_out = self.tensor(inputs["d_out"])
        return lambda: self.torch.autograd.grad(out, leaves, d_out, retain_graph=True)

    def canonical(self, output, case):
        return tuple(x.numpy() for x in output)


class JaxBackward(System):
    """jax.vjp of jax.nn.dot_product_attention, compiled, with arrays in its own layout."""

    name = "jax"
    packages = ("jax", "jaxlib")
    options = ("alibi",)

    def __init__(self, threads):
        super().__init__(threads)
        import jax

        self.jax = jax

    def prepare(self, case, inputs):
        if case.dtype != "float32" or 4 * case.score_bytes() > LARGEST_SCORES:  # it keeps several
            return None
        jax, attend = self.jax, self.jax.nn.dot_product_attention
        causal, mask = split_mask(case, inputs)
        bias = bias_of(case, inputs)
        terms = {"bias": None if bias is None else bias[None], "mask": mask}

        def forward(tensors, terms):
            return jax.vjp(partial(attend, is_causal=causal, **terms), *tensors)

        *tensors, d_out = (self.array(inputs[name]) for name in ("q", "k", "v", "d_out"))
        _, kept = jax.jit(forward)(tensors, terms)
        pullback = jax.jit(lambda kept, d_out: kept(d_out))
        return lambda: jax.block_until_ready(pullback(kept, d_out))

    def array(self, x):
        return self.jax.numpy.asarray(np.ascontiguousarray(x.swapaxes(1, 2)))

    def canonical(self, output, case):
        return tuple(np.asarray(x).swapaxes(1, 2) for x in output)


SYSTEMS = {
    system.name: system
    for system in (MhaFastBackward, MhaFastForward, NumPyBackward, TorchBackward, JaxBackward)
}
NAMES = (
    "paper512_s64",
    "bert_b8_s128",
    "gpt2_s1024",
    "llama_s2048",
    "plain_s1024",
    "dropout_s1024",
    "bias_s1024",
    "long_s8192",
)


def backward_cases():
    """Cases of the main table, and one head alone."""
    cases = {case.name: case for case in CASES}
    chosen = [
        *(cases[name] for name in NAMES),
        Case("one_head_s2048", 1, 1, 1, 2048, 2048, 64),
        Case("one_head_causal_s4096", 1, 1, 1, 4096, 4096, 64, causal=True),
    ]
    return [Backward(**{**vars(case), "name": f"backward_{case.name}"}) for case in chosen]


def table(results):
    """Header and rows: our pullback, its share over that of our forward pass, then the peers."""
    others = [
        {**result, "systems": {n: x for n, x in result["systems"].items() if n != FORWARD}}
        for result in results
    ]
    header, rows = report.table(others)
    at = header.index("share") + 1
    for result, row in zip(results, rows, strict=True):
        forward, ours = (report.time_of(result, name) for name in (FORWARD, report.OURS))
        known = forward and ours
        ratio = f"{FORWARDS * forward / ours:.2f}" if known else report.MISSING
        row[at:at] = [report.duration(forward), ratio]
    return [*header[:at], "forward", "/ its share", *header[at:]], rows
