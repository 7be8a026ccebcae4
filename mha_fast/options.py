"""The one list of attention's options: name, default, check.

`attention`, `reference.attention` and `_core.ask` spell the same names and defaults, so that one
can read them where they are used; tests/test_signatures.py holds the four together.
"""

import math
import numbers
from typing import NamedTuple

import numpy as np

from ._core import FARTHEST, ask
from .arguments import (
    FLOATS,
    boolean,
    check_broadcast,
    compute_dtype,
    floats,
    integers,
    is_float,
    plain_array,
)


class Shape(NamedTuple):
    """What q, k and v say about the sizes of a question."""

    batch: tuple
    heads: tuple  # () for two-dimensional arrays
    seqlen_q: int
    seqlen_k: int
    real: np.dtype  # the compute dtype

    @property
    def scores(self):
        return (*self.batch, *self.heads, self.seqlen_q, self.seqlen_k)


def checked(question):
    """The same question of plain arguments; raises TypeError or ValueError."""
    q, k, v = (floats(name, getattr(question, name)) for name in "qkv")
    shape = shape_of(q, k, v)
    options = {
        name: check(name, getattr(question, name), shape) for name, (_, check) in OPTIONS.items()
    }
    if options["dropout_p"] > 0 and options["seed"] is None:
        raise ValueError("seed is None, expected an int beside a dropout_p above 0")
    return ask(q, k, v, **options)


def shape_of(q, k, v):
    """The sizes of arrays that fit together."""
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head_dim {k.shape[-1]}, expected {q.shape[-1]} as in q")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v has seqlen_k {v.shape[-2]}, expected {k.shape[-2]} as in k")
    heads, kv_heads, v_heads = (x.shape[-3] if x.ndim > 2 else 1 for x in (q, k, v))
    if v_heads != kv_heads:
        raise ValueError(f"v has {v_heads} heads, expected {kv_heads} as in k")
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"k has {kv_heads} heads, which does not divide q's {heads}")
    shapes = [x.shape[:-3] for x in (q, k, v)]
    try:
        batch = np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            "leading axes of q, k and v do not broadcast: found {}, {} and {}".format(*shapes)
        ) from None
    heads = (heads,) if max(q.ndim, k.ndim, v.ndim) > 2 else ()
    return Shape(batch, heads, q.shape[-2], k.shape[-2], compute_dtype(q, k, v))


# ---- Checks: (name, value, shape of the question) to a plain value -------------------------------


def mask_or_bias(name, term, shape):
    """None, or an array that broadcasts to the scores."""
    if term is None:
        return None
    term = plain_array(name, term)
    kinds = f"bool (True = attend) or {FLOATS} (added to the scores)"
    if name == "bias":
        kinds = f"{FLOATS}; a bool array is a mask="
    if not is_float(term.dtype) and (name == "bias" or term.dtype != np.bool_):
        raise TypeError(
            f"{name} has dtype {term.dtype}, expected {kinds}: {name}.astype(bool) as mask= "
            f"or {name}.astype(np.float32)"
        )
    axes = "(..., heads, seqlen_q, seqlen_k)" if shape.heads else "(seqlen_q, seqlen_k)"
    check_broadcast(name, term.shape, shape.scores, axes)
    return term


def flag(name, x, _):
    return boolean(name, x)


def positions(name, x, shape):
    return integers(name, x, shape.batch, -FARTHEST, FARTHEST)


def lengths(name, x, shape):
    return integers(name, x, shape.batch, 0, shape.seqlen_k)


def sides(name, window, _):
    """None, or a tuple of two sides, each None or an int."""
    if window is None:
        return None
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"{name} is {window!r}, expected a tuple (left, right)")
    if len(window) != 2:
        raise ValueError(f"{name} has {len(window)} entries, expected (left, right)")
    for side in window:
        if side is not None and (not isinstance(side, numbers.Integral) or isinstance(side, bool)):
            raise TypeError(f"{name} is {window!r}, expected ints or None as sides")
        if side is not None and side < 0:
            raise ValueError(f"{name} is {window!r}, expected sides of at least 0")
    return tuple(None if side is None or side > FARTHEST else int(side) for side in window)


def finite(name, x, _):
    """None, or a float."""
    if x is None:
        return None
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        raise TypeError(f"{name} is {x!r}, expected a number or None")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return value


def cap(name, x, shape):
    """None, or a float of the range that `_core` takes."""
    x = finite(name, x, shape)
    if x is not None and not 2.0**-64 <= x <= 2.0**64:
        raise ValueError(f"{name} is {x!r}, expected a number from 2**-64 to 2**64, or None")
    return x


def per_head(name, x, shape):
    """None, or an aligned array in the compute dtype that broadcasts to the heads."""
    if x is None:
        return None
    x = floats(name, x, least=())
    target = (*shape.batch, *(shape.heads or (1,)))
    check_broadcast(name, x.shape, target, "(..., heads)")
    return np.require(x, shape.real, ["ALIGNED"])


def share(name, x, shape):
    """A float from 0 to less than 1."""
    if x is None:
        raise TypeError(f"{name} is None, expected a number")
    x = finite(name, x, shape)
    if not 0 <= x < 1:
        raise ValueError(f"{name} is {x!r}, expected a number from 0 to less than 1")
    return x


def seed_of(name, x, _):
    """None, or an int of 63 bits."""
    if x is None:
        return None
    if not isinstance(x, numbers.Integral) or isinstance(x, bool):
        raise TypeError(f"{name} is {x!r}, expected an int or None")
    if not 0 <= x < 2**63:
        raise ValueError(f"{name} is {x!r}, expected 0 to {2**63 - 1}")
    return int(x)


OPTIONS = {
    "mask": (None, mask_or_bias),
    "bias": (None, mask_or_bias),
    "causal": (False, flag),
    "q_offset": (None, positions),
    "window": (None, sides),
    "kv_lengths": (None, lengths),
    "scale": (None, finite),
    "softcap": (None, cap),
    "sinks": (None, per_head),
    "alibi_slopes": (None, per_head),
    "dropout_p": (0.0, share),
    "seed": (None, seed_of),
}
