"""The alternation test: a product and attention in turn, against each of them alone.

Five systems, each in a process of its own: two products, attention, and each product with
attention. What they compute is what ``python -m mha_fast doctor`` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import report
from cases import Case
from problem import Problem
from systems import MhaFast
from truth import check_product

PRODUCTS = {"matmul": "NumPy's @", "linear": "mha_fast.linear"}


@dataclass(frozen=True)
class Pair(Problem):
    """A product (tokens, width) x (width, width), and self-attention of as many tokens."""

    name: str
    tokens: int
    width: int
    heads: int
    dtype: str = "float32"
    unit: str = "latency"

    def attention(self):
        n, h = self.tokens, self.heads
        return Case(self.name, 1, h, h, n, n, self.width // h)

    def flops(self):
        return 2 * self.tokens * self.width**2 + self.attention().flops()

    def columns(self):
        names = "tokens", "width", "heads"
        return {name: str(getattr(self, name)) for name in names}

    def make_inputs(self, seed=0):
        from mha_fast.process import doctor

        return doctor.arrays(self.tokens, seed)

    def check(self, inputs, output):
        """`output` has a product, a result of attention, or both."""
        if "product" in output:
            check_product(self, inputs, output["product"])
        if "attention" in output:
            qkv = dict(zip("qkv", inputs["qkv"][:, None], strict=True))
            self.attention().check(qkv, output["attention"][None])


class Part(MhaFast):
    """One of the doctor's calls; the base of the five below."""

    holds = ()

    def prepare(self, case, inputs):
        from mha_fast.process import doctor

        return doctor.calls(**inputs)[self.name]

    def canonical(self, output, case):
        output = output if len(self.holds) > 1 else (output,)
        return dict(zip(self.holds, output, strict=True))


def part(name, *holds):
    return type("Part", (Part,), {"name": name, "holds": holds})


SYSTEMS = {
    system.name: system
    for system in (
        part("matmul", "product"),
        part("linear", "product"),
        part("attention", "attention"),
        part("matmul+attention", "product", "attention"),
        part("linear+attention", "product", "attention"),
    )
}


def pair_sizes():
    """The doctor's sizes."""
    if not Part.installed():
        return []
    from mha_fast.process import doctor

    return [Pair(f"pair_s{n}", n, doctor.WIDTH, doctor.HEADS) for n in doctor.TOKENS]


def table(results):
    """Header and rows: for each size and product the parts, the pair, and pair over sum."""
    header = ["case", "product by", "product", "attention", "pair", "/ sum", "median", "/ sum"]
    rows = []
    for result in results:
        for name, label in PRODUCTS.items():
            parts = [result["systems"].get(n, {}) for n in (name, "attention")]
            pair = result["systems"].get(f"{name}+attention", {})
            cells = [report.duration(part.get("best")) for part in parts]
            for key in ("best", "median"):
                cells += [report.duration(pair.get(key)), over_sum(pair, parts, key)]
            rows.append([result["case"], label, *cells])
    return header, rows


def over_sum(pair, parts, key):
    """How many times the sum of its parts a pair takes; '-' if one was not timed."""
    if any(key not in entry for entry in (pair, *parts)):
        return report.MISSING
    return f"{pair[key] / sum(part[key] for part in parts):.2f}x"
