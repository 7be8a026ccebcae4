"""What each argument means: defaults, conversions, every check and its message.

`plain_arguments` turns what a user may pass into what `_core.forward` takes, or raises.
"""

import math
import numbers

import numpy as np

from . import _core

FLOATS = "float16, bfloat16, float32 or float64"
FARTHEST = 2**53  # positions and windows beyond this are mistakes, and could overflow


def plain_arguments(
    q, k, v, mask, bias, causal, scale, threads, return_lse, out, q_offset, kv_lengths,
    window, return_weights, weights_heads, weights_rows,
):  # fmt: skip
    """The arguments of `_core.forward`, in its order; raises TypeError or ValueError."""
    q, k, v = (floats(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    batch, heads = _batch_and_heads(q, k, v)
    rows = (*batch, *heads, q.shape[-2])
    mask = _term("mask", mask, (*rows, k.shape[-2]))
    bias = _term("bias", bias, (*rows, k.shape[-2]))
    q_offset = integers("q_offset", q_offset, batch, -FARTHEST, FARTHEST)
    kv_lengths = integers("kv_lengths", kv_lengths, batch, 0, k.shape[-2])
    if out is not None:
        inputs = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias}
        out = _out(out, (*rows, v.shape[-1]), result_dtype(q, k, v), inputs)
    for name, chosen in (("weights_heads", weights_heads), ("weights_rows", weights_rows)):
        if chosen is not None and not return_weights:
            raise ValueError(f"{name} is {chosen!r}, expected None without return_weights=True")
    if weights_heads is not None and not heads:
        raise ValueError("weights_heads needs a heads axis, found two-dimensional q, k and v")
    return (
        q, k, v, mask, bias, boolean("causal", causal), _scale(scale),
        thread_count("threads", threads), bool(return_lse), out, q_offset, kv_lengths,
        _window(window), bool(return_weights),
        places_of("weights_heads", weights_heads, *heads),
        places_of("weights_rows", weights_rows, q.shape[-2]),
    )  # fmt: skip


def plain_linear(x, weight, bias, threads):
    """The arguments of `linear`, checked; bias dense and aligned, in the compute dtype."""
    x = floats("x", x, ("width",))
    weight = floats("weight", weight, ("outputs", "width"))
    if weight.ndim > 2:
        raise ValueError(f"weight has shape {weight.shape}, expected (outputs, width)")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has width {weight.shape[1]}, expected {x.shape[-1]} as in x")
    if bias is not None:
        bias = floats("bias", bias, ("outputs",))
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {bias.shape}, expected {weight.shape[:1]}")
        bias = np.require(bias, compute_dtype(x, weight), ["C", "ALIGNED"])
    return x, weight, bias, thread_count("threads", threads)


def result_dtype(*arrays):
    """NumPy's promotion of floats, where float16 beside bfloat16 is float32."""
    dtypes = {x.dtype for x in arrays}
    return dtypes.pop() if len(dtypes) == 1 else compute_dtype(*arrays)


def compute_dtype(*arrays):
    """float64 where one of them is, else float32."""
    wide = np.dtype(np.float64) in {x.dtype for x in arrays}
    return np.dtype(np.float64 if wide else np.float32)


def is_float(dtype):
    """Is it one of the storage dtypes? Shows the extension which number bfloat16 has."""
    if dtype.kind == "f":
        return dtype.itemsize <= 8
    if dtype.name == "bfloat16":  # after the others: NumPy takes 4 us to spell a name
        _core.set_bfloat16(dtype.num)
        return True
    return False


def plain_array(name, x):
    """`x` as an exact, native ndarray; no copy unless it is a list or byte-swapped."""
    if type(x) is np.ndarray and x.dtype.isnative:
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: pass {name}.data and a mask= of your own")
    if hasattr(x, "toarray"):
        raise TypeError(f"{name} is sparse ({type(x).__name__}): pass {name}.toarray()")
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        x = np.from_dlpack(x)
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} is a {type(x).__name__} that is no array: {error}") from None
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def floats(name, x, least=("seqlen", "head_dim")):
    """`x` as a plain array of a storage dtype with at least these axes."""
    x = plain_array(name, x)
    if not is_float(x.dtype):
        raise TypeError(f"{name} has dtype {x.dtype}, expected {FLOATS}: {name}.astype(np.float32)")
    if x.ndim < len(least):
        raise ValueError(f"{name} has shape {x.shape}, expected at least ({', '.join(least)})")
    return x


def _batch_and_heads(q, k, v):
    """Broadcast batch shape, and the heads axis as a tuple: () for two-dimensional arrays."""
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
    return batch, (heads,) if max(q.ndim, k.ndim, v.ndim) > 2 else ()


def check_broadcast(name, shape, target, axes):
    try:
        fits = np.broadcast_shapes(shape, target) == target
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {shape}, expected one that broadcasts to {axes} = {target}"
        )


def _term(name, term, target):
    """A mask or a bias."""
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
    axes = "(..., heads, seqlen_q, seqlen_k)" if len(target) > 2 else "(seqlen_q, seqlen_k)"
    check_broadcast(name, term.shape, target, axes)
    return term


def integers(name, x, batch, low, high):
    """An int or ints per batch row, as int64."""
    if x is None:
        return None
    x = np.asarray(x)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {x.dtype}, expected integers")
    check_broadcast(name, x.shape, batch, "the batch axes")
    if x.size and not (low <= int(x.min()) and int(x.max()) <= high):
        raise ValueError(f"{name} holds {int(x.min())} to {int(x.max())}, expected {low} to {high}")
    return x.astype(np.int64)


def places_of(name, chosen, length=1):
    """Where each of `length` entries goes in a result of the chosen ones, -1: nowhere."""
    if chosen is None:
        return None
    chosen = np.asarray(chosen)
    if chosen.ndim != 1:
        raise ValueError(f"{name} has shape {chosen.shape}, expected a list of ints")
    if chosen.size and chosen.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {chosen.dtype}, expected ints")
    if chosen.size and not (-length <= int(chosen.min()) and int(chosen.max()) < length):
        raise ValueError(
            f"{name} holds {int(chosen.min())} to {int(chosen.max())}, "
            f"expected {-length} to {length - 1}"
        )
    chosen = chosen.astype(np.int64) % max(length, 1)
    places = np.full(length, -1, np.int64)
    places[chosen] = np.arange(len(chosen))
    if np.count_nonzero(places >= 0) < len(chosen):
        raise ValueError(f"{name} names an entry twice: {chosen.tolist()}")
    return places


def _scale(scale):
    if scale is None:
        return None
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise TypeError(f"scale is {scale!r}, expected a number or None")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"scale is {value!r}, expected a finite number")
    return value


def boolean(name, x):
    """`x` as a bool, if it is one."""
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name} is {x!r}, expected True or False")
    return bool(x)


def positive_int(name, x, expected="a positive int"):
    """`x` as an int of at least 1."""
    if not isinstance(x, numbers.Integral) or isinstance(x, bool):
        raise TypeError(f"{name} is {x!r}, expected {expected}")
    if x < 1:
        raise ValueError(f"{name} is {x}, expected at least 1")
    return int(x)


def thread_count(name, count):
    """A positive int, or None."""
    if count is None:
        return None
    return min(positive_int(name, count, "a positive int or None"), 2**20)


def _window(window):
    """Both sides as ints for `_core`, or None where all is open."""
    if window is None:
        return None
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window is {window!r}, expected a tuple (left, right)")
    if len(window) != 2:
        raise ValueError(f"window has {len(window)} entries, expected (left, right)")
    sides = []
    for side in window:
        if side is not None and (not isinstance(side, numbers.Integral) or isinstance(side, bool)):
            raise TypeError(f"window is {window!r}, expected ints or None as sides")
        if side is not None and side < 0:
            raise ValueError(f"window is {window!r}, expected sides of at least 0")
        sides.append(_core.OPEN if side is None or side > FARTHEST else int(side))
    return tuple(sides)


def _out(out, shape, dtype, inputs):
    """`out` as an exact ndarray, writeable and on its own."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out is a {type(out).__name__}, expected an ndarray")
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"out has dtype {out.dtype.str}, expected {dtype}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, expected {shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only, expected a writeable array")
    reach = out.itemsize
    for step, length in sorted(zip(map(abs, out.strides), out.shape, strict=True)):
        if out.size and length > 1 and step < reach:
            raise ValueError("out overlaps itself: two of its elements share memory")
        reach += step * (length - 1)
    for name, x in inputs.items():
        if x is not None and _overlap(out, x):
            raise ValueError(f"out overlaps {name}, expected memory of its own")
    return np.asarray(out)


def _overlap(a, b):
    try:
        return np.shares_memory(a, b, max_work=1000)
    except np.exceptions.TooHardError:
        return True
