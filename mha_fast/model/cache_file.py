"""The arrays of a KVCache in one file, mapped into memory.

The file is a safetensors file (https://github.com/huggingface/safetensors) whose header has a fixed
size, so that any program with that library reads it, and this one maps it and writes in place.
"""

import contextlib
import json
import math
import os
from typing import NamedTuple

import numpy as np

from ..arguments import is_float

HEADER = 4096  # bytes, the 8 of its size included: a page, so that arrays begin aligned
FORMAT = "mha_fast.KVCache 1"
INT64 = np.dtype(np.int64)
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int64": "I64"}


class Store(NamedTuple):
    """What a cache holds, in memory or in a file."""

    lengths: np.ndarray  # (batch,) int64: tokens of each row, the forgotten ones included
    forgotten: np.ndarray  # (1,) int64: keys that are gone from the front
    k: np.ndarray  # (batch, kv_heads, capacity, head_dim)
    v: np.ndarray
    mapped: np.memmap | None = None


def in_memory(shapes, dtype):
    """An empty store with k and v of these two shapes."""
    k, v = (np.empty(shape, dtype) for shape in shapes)
    return Store(np.zeros(len(k), INT64), np.zeros(1, INT64), k, v)


def in_file(path, shapes, dtype, window):
    """The same in a new file, which replaces another one of that name once `keep` is called."""
    arrays = {"lengths": (shapes[0][:1], INT64), "forgotten": ((1,), INT64)}
    arrays |= {name: (shape, np.dtype(dtype)) for name, shape in zip("kv", shapes, strict=True)}
    header, end = {"__metadata__": {"format": FORMAT, "window": json.dumps(window)}}, 0
    for name, (shape, kind) in arrays.items():
        begin, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": CODES[kind.name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode().ljust(HEADER - 8)
    with open(path, "xb") as file:
        file.write((HEADER - 8).to_bytes(8, "little") + text)
        file.truncate(HEADER + end)
    return _mapped(path, header, "r+")


@contextlib.contextmanager
def replacing(path):
    """A name beside `path` for a new file, which takes its place if all goes well."""
    beside = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def opened(path, mode):
    """The store in a file, and its window; ValueError if it is none of ours."""
    try:
        header = _header(path)
        return _mapped(path, header, mode), json.loads(header["__metadata__"]["window"])
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path} is no file of a KVCache: {error or type(error).__name__}"
        ) from None


def _header(path):
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size != HEADER - 8:
            raise ValueError(f"its header has {size} bytes, expected {HEADER - 8}")
        header = json.loads(file.read(size))
    if header["__metadata__"]["format"] != FORMAT:
        raise ValueError(f"its format is {header['__metadata__']['format']!r}, expected {FORMAT!r}")
    if set(header) != {"__metadata__", *Store._fields[:4]}:
        raise ValueError(f"it has {sorted(header)}, expected {', '.join(Store._fields[:4])}")
    return header


def _mapped(path, header, mode):
    """Views of the mapped file, after a look at what the header says of them."""
    mapped = np.memmap(path, np.uint8, mode)
    arrays, expected = {}, 0
    for name in Store._fields[:4]:
        entry = header[name]
        dtype, shape, (begin, end) = _dtype(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**62 for n in (begin, end, *shape)):
            raise ValueError(f"{name} has shape {shape} at {begin} to {end}")
        if begin != expected or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of shape {shape} lies at {begin} to {end}")
        if HEADER + end > mapped.size:
            raise ValueError(f"{name} ends at {HEADER + end}, expected at most {mapped.size}")
        expected = end
        view = np.asarray(mapped[HEADER + begin : HEADER + end])
        arrays[name] = view.view(dtype).reshape(shape)
    store = Store(**arrays, mapped=mapped)
    _check(store)
    return store


def _dtype(code):
    name = {code: name for name, code in CODES.items()}[code]
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _check(store):
    """Do the arrays fit together, and the numbers them?"""
    lengths, forgotten, k, v, _ = store
    if not (k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3] and k.dtype == v.dtype):
        raise ValueError(f"k has shape {k.shape}, v {v.shape}, of {k.dtype} and {v.dtype}")
    if not is_float(k.dtype) or lengths.dtype != INT64 or forgotten.dtype != INT64:
        raise ValueError(f"k is {k.dtype}, lengths are {lengths.dtype}")
    if lengths.shape != k.shape[:1] or forgotten.shape != (1,) or 0 in k.shape[:2]:
        raise ValueError(f"lengths has shape {lengths.shape}, forgotten {forgotten.shape}")
    first = int(forgotten[0])
    if not 0 <= first <= int(lengths.min()) or int(lengths.max()) - first > k.shape[2]:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()} after {first} forgotten")
