"""The options of attention, each once: a row of OPTIONS puts an option under every promise.

A new option needs its meaning in `oracle.attention` and in `mha_fast.reference`, and a row here.
The tests then take it alone and with every other: its accuracy, its bits (threads, instruction
sets, parts alone and together), what it hides (poison, weights), its scratch memory, layouts and
scalars, and that it has an effect on every path.
"""

import itertools
import math
from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import sizes
from hypothesis.strategies import booleans, floats, integers, lists, none, sampled_from, sets


def usual(value, strategy):
    """What most tests pick; for random properties hypothesis draws from the strategy."""
    return value


class Problem(NamedTuple):
    """What the value of an option depends on. Each choice is `pick(usual value, strategy)`."""

    batch: tuple
    heads: int
    seqlen_q: int
    seqlen_k: int
    pick: Callable = usual

    @classmethod
    def of(cls, q, k, v, pick=usual):
        batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
        return cls(batch, q.shape[-3] if q.ndim > 2 else 1, q.shape[-2], k.shape[-2], pick)

    def number(self, value, low, high):
        return self.pick(value, integers(low, high))

    def number_of_each_batch_row(self, values, low, high):
        """The usual values in turn; drawn also one for all."""
        size, drawn = math.prod(self.batch), integers(low, high)
        number = self.pick(values, drawn | lists(drawn, min_size=size, max_size=size))
        return number if isinstance(number, int) else np.resize(number, self.batch)

    def side(self, value):
        """Of a window: keys, or None, which is open."""
        return self.pick(value, none() | integers(0, self.seqlen_k + 3))

    def mask(self, axes, visible=0.7):
        """Random bools of the sizes of these axes; drawn broadcast along any."""
        axes = self.pick(set(axes), sets(sampled_from("bhqk")))
        whole = [*(("b", n) for n in self.batch), *zip("hqk", self[1:4], strict=True)]
        shape = [n if axis in axes else 1 for axis, n in whole]
        first = next((i for i, (axis, _) in enumerate(whole) if axis in axes), len(whole))
        shape = shape[self.number(first, 0, first) :]
        visible = self.pick(visible, sampled_from([0.0, 0.1, 0.7, 1.0]))
        return sizes.random_mask(*shape, seed=self.number(0, 0, 2**32), visible=visible)

    def terms(self, axes, visible=0.7):
        """Numbers, and -inf where such a mask hides a key."""
        dtype = self.pick(np.dtype("f4"), sampled_from(sizes.DTYPES))
        return sizes.additive(self.mask(axes, visible), dtype, seed=self.number(1, 0, 2**32))


class Option(NamedTuple):
    """An argument of attention, and its value for any problem."""

    argument: str
    value: Callable
    axes: str = ""  # the last axes of its value: (b)atch, (h)eads, (q)uery rows, (k)eys
    beside: dict = {}  # what else it takes to have an effect
    counted: str = ""  # axes along which the index of an entry enters the result

    def __call__(self, q, k, v, pick=usual):
        """The options of a call with these arrays."""
        return self.beside | {self.argument: self.value(Problem.of(q, k, v, pick))}


PLAIN = Option("causal", lambda p: False)

OPTIONS = {
    "causal": Option("causal", lambda p: p.pick(True, booleans())),
    "q_offset": Option("q_offset", lambda p: p.number_of_each_batch_row(
        [-(p.seqlen_q // 4), p.seqlen_k // 2], -p.seqlen_q - 3, p.seqlen_k + 3), "b",
        beside={"causal": True}),
    "window": Option("window", lambda p: (p.side(p.seqlen_k // 4), p.side(p.seqlen_k // 13))),
    "open window": Option("window", lambda p: (p.side(p.seqlen_k // 4), p.side(None))),
    "kv_lengths": Option("kv_lengths", lambda p: p.number(p.seqlen_k // 2 + 1, 0, p.seqlen_k)),
    "kv_lengths of each": Option("kv_lengths", lambda p: p.number_of_each_batch_row(
        [p.seqlen_k // 2 + 1, 0], 0, p.seqlen_k), "b"),
    "mask": Option("mask", lambda p: p.mask("bqk"), "bhqk"),
    "sparse mask": Option("mask", lambda p: p.mask("qk", visible=0.02), "bhqk"),
    "key mask": Option("mask", lambda p: p.mask("k") & not_in_block(1, p.seqlen_k), "bhqk"),
    "float mask": Option("mask", lambda p: p.terms("qk"), "bhqk"),
    "bias": Option("bias", lambda p: p.terms("hk", visible=1), "bhqk"),
    "hiding bias": Option("bias", lambda p: p.terms("k"), "bhqk"),
    "scale": Option("scale", lambda p: p.pick(-0.7, none() | floats(-4, 4, allow_subnormal=False))),
    "softcap": Option("softcap", lambda p: p.pick(1.5, floats(0.25, 60, allow_subnormal=False))),
    "sinks": Option("sinks", lambda p: sizes.random(p.heads, seed=p.number(2, 0, 2**32)), "h"),
    "alibi_slopes": Option(
        "alibi_slopes", lambda p: abs(sizes.random(p.heads, seed=p.number(3, 0, 2**32))) / 8, "h"),
    "dropout_p": Option("dropout_p", lambda p: p.pick(0.3, floats(0, 0.9, allow_subnormal=False)),
                        beside={"seed": 7}, counted="bhq"),
    "seed": Option("seed", lambda p: p.number(2**62 + 5, 0, 2**63 - 1), beside={"dropout_p": 0.5},
                   counted="bhq"),
}  # fmt: skip

PAIRS = [
    (a, b)
    for a, b in itertools.combinations(OPTIONS, 2)
    if OPTIONS[a].argument != OPTIONS[b].argument
]

# Those that are an interval of keys for each row.
INTERVALS = [
    name for name, row in OPTIONS.items() if row.argument in signature(oracle.visible).parameters
]


def not_in_block(block, seqlen_k):
    return np.arange(seqlen_k) // sizes.KEY_BLOCK != block


def pair_of(names, q, k, v):
    """The options of two rows."""
    a, b = (OPTIONS[name](q, k, v) for name in names)
    return a | b


def cut(options, axis, part, q, k, v):
    """The options of a part, a slice, of the batch rows "b", the heads "h" or the query rows "q" of
    a problem with one batch axis."""
    kept = dict(options)
    for row in OPTIONS.values():
        if row.argument in options and axis in row.counted:
            pytest.skip(f"{row.argument} counts them")
        if row.argument in options and axis in row.axes:
            x, place = np.asarray(options[row.argument]), row.axes.index(axis) - len(row.axes)
            if x.ndim >= -place and x.shape[place] > 1:
                kept[row.argument] = x[(..., part, *[slice(None)] * (-place - 1))]
    if axis == "q":  # a row stands where it stood
        length = np.asarray(options.get("kv_lengths", k.shape[-2]))
        kept["q_offset"] = options.get("q_offset", length - q.shape[-2]) + part.start
    return kept
