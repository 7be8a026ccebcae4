"""Rotary position embedding: queries and keys turn by angles that grow with their position."""

import math
import numbers

import numpy as np

from .. import _core
from ..arguments import (
    boolean,
    check_broadcast,
    compute_dtype,
    floats,
    integers,
    non_negative_int,
    own_array,
    thread_count,
)

NAMES = ("cos", "sin")


def rotary(x, cos, sin, *, interleaved=False, positions=None, out=None, threads=None):
    """Turn pairs of numbers of each row by the angles of its position.

    Pair ``i`` of a row, ``(a, b)``, becomes ``(a cos - b sin, b cos + a sin)``, so that the product
    of a query and a key depends on their distance alone.

    Parameters
    ----------
    x : array_like, shape (..., heads, seqlen, head_dim)
        Queries or keys, float16, bfloat16 (`ml_dtypes`), float32 or float64, with any strides. A
        two-dimensional array is one head.
    cos, sin : array_like, shape (..., length, pairs)
        Angles of each position, as `rotary_tables` makes them. The first ``2 * pairs`` numbers of
        a row turn; the others stay. Axes before the last two broadcast to the batch axes of `x`.
    interleaved : bool
        Pairs are numbers ``2 * i`` and ``2 * i + 1`` (GPT-J, GGUF files of Llama); otherwise ``i``
        and ``pairs + i`` (GPT-NeoX, Llama as published for transformers).
    positions : array_like of int, broadcast to (..., seqlen), optional
        The row of `cos` and `sin` for each row of each batch entry; default 0, 1, 2 and so on.
    out : ndarray, shape of `x`, optional
        Written and returned; `x` itself turns in place. Other overlaps are refused.
    threads : int, optional
        Upper limit for this call; see `set_num_threads`. It changes no bit of the result.

    Returns
    -------
    ndarray, shape and dtype of `x`
        16-bit floats are computed in float32.

    Raises
    ------
    TypeError
        An argument has an unsupported dtype or kind.
    ValueError
        Shapes do not fit, or `cos` has no row for a position.
    MemoryError
        No memory for the result or for the scratch space of a thread.

    Notes
    -----
    Su et al., "RoFormer" (arXiv 2104.09864).

    Examples
    --------
    A quarter turn for each position:

    >>> cos, sin = [[1.0], [0.0], [-1.0]], [[0.0], [1.0], [0.0]]
    >>> rotary([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]], cos, sin)
    array([[ 3.,  4.],
           [-4.,  3.],
           [-3., -4.]])
    """
    given, x = x, floats("x", x)
    cos, sin = _angles(x, cos, sin)
    positions = _positions(x, positions, cos.shape[-2])
    interleaved, threads = boolean("interleaved", interleaved), thread_count("threads", threads)
    if out is None:
        out = np.empty(x.shape, x.dtype)
    inputs = {"cos": cos, "sin": sin} | ({} if out is given else {"x": x})
    to = own_array("out", out, x.shape, x.dtype, inputs)
    if x.ndim == 2:
        x, to = x[None], to[None]
    angles = cos[..., None, :, :], sin[..., None, :, :]
    _core.rotate(x, to, *angles, positions[..., None, :], interleaved, threads)
    return out


def _angles(x, *tables):
    """cos and sin in the compute dtype, as arrays that fit `x`."""
    cos, sin = (floats(name, a, ("length", "pairs")) for name, a in zip(NAMES, tables, strict=True))
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {sin.shape}, expected {cos.shape} as cos")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos has {cos.shape[-1]} pairs, expected at most {x.shape[-1] // 2} for x's head_dim "
            f"of {x.shape[-1]}"
        )
    check_broadcast("cos", cos.shape[:-2], x.shape[:-3], "the batch axes of x")
    return (np.require(a, compute_dtype(x), ["C", "ALIGNED"]) for a in (cos, sin))


def _positions(x, positions, length):
    """A row of the tables for each row of x."""
    seqlen = x.shape[-2]
    if positions is None and seqlen > length:
        raise ValueError(f"cos has {length} rows, expected at least {seqlen} for x's seqlen")
    if positions is None:
        return np.arange(seqlen)
    shape = (*x.shape[:-3], seqlen)
    positions = integers("positions", positions, shape, 0, length - 1, "(..., seqlen)")
    return np.broadcast_to(positions, np.broadcast_shapes(positions.shape, (seqlen,)))


def rotary_tables(length, rotary_dim, *, base=10000.0, scaling=None, dtype=np.float32):
    """The angles of `rotary`: cosines and sines for positions 0 to ``length - 1``.

    Pair ``i`` turns by ``base ** (-2 * i / rotary_dim)`` radians a position, unless scaled.

    Parameters
    ----------
    length : int
        Positions.
    rotary_dim : int
        Numbers of a row that turn: head_dim, or less for a partial rotation; even.
    base : float
        ``rope_theta`` of a model's configuration.
    scaling : dict, optional
        How a model was stretched to longer texts: ``rope_scaling`` or ``rope_parameters`` of its
        ``config.json`` as it stands there. Its ``rope_type`` (or ``type``) is one of

        - "default": as without.
        - "linear" with "factor": positions are divided by it (Chen et al., arXiv 2306.15595).
        - "dynamic" with "factor" and "original_max_position_embeddings": the base grows once
          `length` is beyond that (dynamic NTK).
        - "yarn" with the same; "attention_factor", "beta_fast", "beta_slow", "mscale",
          "mscale_all_dim" and "truncate" may be given (Peng et al., arXiv 2309.00071).
        - "llama3" with the same, "low_freq_factor" and "high_freq_factor" (arXiv 2407.21783).

        A "rope_theta" in it goes before `base`.
    dtype : dtype
        Angles are computed in float64.

    Returns
    -------
    cos, sin : ndarray, shape (length, rotary_dim // 2)

    Raises
    ------
    TypeError, ValueError
        An argument is out of range, or `scaling` is unknown or lacks an entry.

    Examples
    --------
    >>> cos, sin = rotary_tables(3, 4, base=100.0)
    >>> np.arctan2(sin, cos).round(3)
    array([[0. , 0. ],
           [1. , 0.1],
           [2. , 0.2]], dtype=float32)
    """
    length = non_negative_int("length", length)
    rotary_dim = non_negative_int("rotary_dim", rotary_dim)
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}, expected an even number")
    scaling = _Scaling(scaling)
    base = scaling.number("rope_theta", base)
    speed, size = SCALINGS[scaling.kind](length, rotary_dim, base, scaling)
    angles = np.outer(np.arange(length), speed)
    return tuple((size * f(angles)).astype(dtype) for f in (np.cos, np.sin))


# ---- Scalings: radians a position of each pair, and a factor of cos and sin ----------------------


class _Scaling:
    """The entries of a scaling; those that are missing or no numbers are errors that name them."""

    def __init__(self, entries):
        if entries is not None and not isinstance(entries, dict):
            raise TypeError(f"scaling is {entries!r}, expected a dict or None")
        self.entries = entries or {}
        self.kind = self.entries.get("rope_type", self.entries.get("type", "default"))
        if self.kind not in SCALINGS:
            raise ValueError(
                f"scaling has rope_type {self.kind!r}, expected one of {', '.join(SCALINGS)}"
            )

    def number(self, name, default=None):
        """An entry above 0, or the default where it is missing or None."""
        value = self.entries.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"scaling has no {name!r}, which {self.kind!r} needs")
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected a number")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}, expected a number above 0")
        return float(value)


def _plain(length, rotary_dim, base, scaling):
    return base ** -(np.arange(0, rotary_dim, 2) / rotary_dim), 1.0


def _linear(length, rotary_dim, base, scaling):
    speed, size = _plain(length, rotary_dim, base, scaling)
    return speed / scaling.number("factor"), size


def _dynamic(length, rotary_dim, base, scaling):
    factor, trained = scaling.number("factor"), scaling.number("original_max_position_embeddings")
    stretched = factor * max(length, trained) / trained - (factor - 1)
    base = base * stretched ** (rotary_dim / max(rotary_dim - 2, 1))
    return _plain(length, rotary_dim, base, scaling)


def _llama3(length, rotary_dim, base, scaling):
    """Pairs that turn often within the trained length stay, slow ones are slowed down."""
    speed, size = _plain(length, rotary_dim, base, scaling)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise ValueError(f"low_freq_factor is {low}, expected less than high_freq_factor {high}")
    turns = scaling.number("original_max_position_embeddings") * speed / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * speed / scaling.number("factor") + kept * speed, size


def _yarn(length, rotary_dim, base, scaling):
    """The same by the index of the pair, and rows a little longer."""
    speed, _ = _plain(length, rotary_dim, base, scaling)
    factor, trained = scaling.number("factor"), scaling.number("original_max_position_embeddings")

    def pair_of(turns):  # that turns so often within the trained length
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = pair_of(scaling.number("beta_fast", 32.0))
    last = pair_of(scaling.number("beta_slow", 1.0))
    if scaling.entries.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    last = first + 0.001 if first == last else last  # as published: no division by zero
    slowed = np.clip((np.arange(rotary_dim // 2) - first) / (last - first), 0, 1)
    size = scaling.number("attention_factor", _yarn_size(factor, scaling))
    return speed / factor * slowed + speed * (1 - slowed), size


def _yarn_size(factor, scaling):
    def size(scale):
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.entries.get("mscale") and scaling.entries.get("mscale_all_dim"):
        return size(scaling.number("mscale")) / size(scaling.number("mscale_all_dim"))
    return size(1.0)


SCALINGS = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
