"""Checks of one argument, each with its message: what was found, and what was expected."""

import numbers

import numpy as np

from ._core import overlap, overlaps_itself

FLOATS = "float16, bfloat16, float32 or float64"


def result_dtype(*arrays):
    """NumPy's promotion of floats, where float16 beside bfloat16 is float32."""
    dtypes = {x.dtype for x in arrays}
    return dtypes.pop() if len(dtypes) == 1 else compute_dtype(*arrays)


def compute_dtype(*arrays):
    """float64 where one of them is, else float32."""
    wide = np.dtype(np.float64) in {x.dtype for x in arrays}
    return np.dtype(np.float64 if wide else np.float32)


def stored(x, dtype):
    """`x` rounded to a storage dtype, where what is too large is infinite."""
    with np.errstate(over="ignore"):
        return x.astype(dtype, copy=False)


def is_float(dtype):
    """Is it one of the storage dtypes?"""
    if dtype.kind == "f":
        return dtype.itemsize <= 8
    return dtype.name == "bfloat16"  # last: NumPy takes 4 us to spell a name


def plain_array(name, x):
    """`x` as an exact, native ndarray; no copy unless it is a list or byte-swapped."""
    if type(x) is np.ndarray and x.dtype.isnative:
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: pass {name}.data and a mask= of your own")
    if hasattr(x, "toarray"):
        raise TypeError(f"{name} is sparse ({type(x).__name__}): pass {name}.toarray()")
    if type(x).__module__.partition(".")[0] == "dask":
        raise TypeError(f"{name} is a Dask array: mha_fast.dask.attention, or {name}.compute()")
    try:
        dlpack = hasattr(x, "__dlpack__") and not hasattr(x, "__array__")
        x = np.from_dlpack(x) if dlpack else np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} is a {type(x).__name__} that is no array: {error}") from None
    except (TypeError, RuntimeError, BufferError) as error:  # of a GPU, with a gradient, symbolic
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        raise TypeError(f"{name} is a {kind}, which NumPy cannot read: {error}") from None
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def floats(name, x, least=("seqlen", "head_dim")):
    """`x` as a plain array of a storage dtype with at least these axes."""
    x = plain_array(name, x)
    if not is_float(x.dtype):
        raise TypeError(f"{name} has dtype {x.dtype}, expected {FLOATS}: {name}.astype(np.float32)")
    if x.ndim < len(least):
        raise ValueError(f"{name} has shape {x.shape}, expected at least ({', '.join(least)})")
    return x


def check_broadcast(name, shape, target, axes):
    try:
        fits = np.broadcast_shapes(shape, target) == target
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {shape}, expected one that broadcasts to {axes} = {target}"
        )


def integers(name, x, target, low, high, axes="the batch axes"):
    """An int, or ints that broadcast to the shape `target`, as int64."""
    if x is None:
        return None
    x = np.asarray(x)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {x.dtype}, expected integers")
    check_broadcast(name, x.shape, target, axes)
    if x.size and not (low <= int(x.min()) and int(x.max()) <= high):
        raise ValueError(f"{name} holds {int(x.min())} to {int(x.max())}, expected {low} to {high}")
    return x.astype(np.int64, order="C")


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


def non_negative_int(name, x):
    """`x` as an int of at least 0."""
    if not isinstance(x, numbers.Integral) or isinstance(x, bool):
        raise TypeError(f"{name} is {x!r}, expected an int")
    if x < 0:
        raise ValueError(f"{name} is {x}, expected at least 0")
    return int(x)


def thread_count(name, count):
    """A positive int, or None."""
    if count is None:
        return None
    return min(positive_int(name, count, "a positive int or None"), 2**20)


def own_array(name, out, shape, dtype, inputs):
    """An array to write to as an exact ndarray: writeable, without an overlap."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{name} is a {type(out).__name__}, expected an ndarray")
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"{name} has dtype {out.dtype.str}, expected {dtype}")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}, expected {shape}")
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only, expected a writeable array")
    if overlaps_itself(out):
        raise ValueError(f"{name} overlaps itself: two of its elements share memory")
    for other, x in inputs.items():
        if overlap(out, x):
            raise ValueError(f"{name} overlaps {other}, expected memory of its own")
    return np.asarray(out)
