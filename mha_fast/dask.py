"""`attention` of Dask arrays, chunked along batch, heads, queries and keys alike.

>>> import dask.array as da
>>> import mha_fast.dask
>>> q = da.ones((8, 12_288, 64), chunks=(4, 6_144, 64), dtype="float32")
>>> out = mha_fast.dask.attention(q, q, q, causal=True)
>>> out.chunks
((4, 4), (6144, 6144), (64,))

It needs ``pip install "mha_fast[dask]"``; ``import mha_fast`` does not load it.
"""

import copy
import itertools
import math
import operator
import warnings
from functools import partial
from typing import NamedTuple

import dask.array as da
import numpy as np
from dask.array.core import PerformanceWarning
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from ._core import ask
from .arguments import boolean, compute_dtype, result_dtype
from .options import OPTIONS, checked
from .results import AttentionResult
from .state import RUN, SHARED, AttentionState

__all__ = ["attention"]

ARRAYS = ("q", "k", "v", "mask", "bias")
# The axes of each, the last first; those before are the batch.
AXES = {
    "q": ("head_dim", "seqlen_q", "heads"),
    "k": ("head_dim", "seqlen_k", "kv_heads"),
    "v": ("head_dim_v", "seqlen_k", "kv_heads"),
    "mask": ("seqlen_k", "seqlen_q", "heads"),
    "bias": ("seqlen_k", "seqlen_q", "heads"),
    "q_offset": (),
    "kv_lengths": (),
    "sinks": ("heads",),
    "alibi_slopes": ("heads",),
}


def attention(q, k, v, mask=None, *, return_lse=False, **options):
    """`mha_fast.attention`, computed chunk by chunk by Dask's workers.

    The result has the bits of one call, whatever the chunks. Nothing is computed before `compute`,
    `store` or the like.

    Parameters
    ----------
    q : dask.array.Array or array_like, shape (..., heads, seqlen_q, head_dim)
    k : dask.array.Array or array_like, shape (..., kv_heads, seqlen_k, head_dim)
    v : dask.array.Array or array_like, shape (..., kv_heads, seqlen_k, head_dim_v)
    mask : dask.array.Array or array_like, broadcast to (..., heads, seqlen_q, seqlen_k), optional
    return_lse : bool
    **options
        bias, as `mask`; causal, q_offset, window, kv_lengths, scale, softcap, sinks, alibi_slopes,
        as in `mha_fast.attention`.

    Returns
    -------
    dask.array.Array, shape (..., heads, seqlen_q, head_dim_v)
        Chunked along batch and queries as `q`, along heads as `q` where that cuts no group.
    AttentionResult
        With `return_lse`: ``(out, lse)``, both Dask arrays.

    Raises
    ------
    TypeError, ValueError
        As `mha_fast.attention`, before anything is computed.

    Warns
    -----
    dask.array.PerformanceWarning
        Keys are chunked at other places than multiples of 3072, and get other chunks.

    Notes
    -----
    A chunk of queries goes from one chunk of keys to the next as an `AttentionState`. Chunks of
    keys that none of its rows can see by position get no task. `head_dim` is one chunk. Calls use
    as many threads as their worker has.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((2, 7000, 4))
    >>> chunked = da.from_array(x, chunks=(1, 3072, 4))
    >>> out = attention(chunked, chunked, chunked, window=(100, 0)).compute()
    >>> bool((out == __import__("mha_fast").attention(x, x, x, window=(100, 0))).all())
    True
    """
    return_lse = boolean("return_lse", return_lse)
    if unknown := sorted(set(options).difference(SHARED, ARRAYS)):
        raise TypeError(f"{unknown[0]} is no option of mha_fast.dask.attention")
    given = {"q": q, "k": k, "v": v, "mask": mask, "bias": options.pop("bias", None)}
    arrays = {name: da.asarray(x) for name, x in given.items() if x is not None}
    question = _checked(arrays, options)
    for name in "qkv":
        arrays[name] = arrays[name] if arrays[name].ndim > 2 else arrays[name][None]
    chunks = _chunks(arrays)
    arrays = {name: _rechunked(name, x, chunks) for name, x in arrays.items()}
    out, lse = _lazy(arrays, chunks, _options(question))
    if question.q.ndim == question.k.ndim == question.v.ndim == 2:
        out, lse = out[0], lse[0]
    return AttentionResult(out, lse) if return_lse else out


def _checked(arrays, options):
    """The question, of arrays of the same shapes and dtypes that take no memory."""
    for name, x in arrays.items():
        if math.isnan(sum(x.shape)):
            raise ValueError(f"{name} has chunks of unknown size: {name}.compute_chunk_sizes()")
    hollow = {n: np.broadcast_to(np.zeros((), x.dtype), x.shape) for n, x in arrays.items()}
    return checked(ask(**hollow, **options))


def _options(question):
    """Those of a state, with a q_offset from key 0."""
    found = {name: getattr(question, name) for name in SHARED}
    if question.q_offset is None:
        length = question.k.shape[-2] if question.kv_lengths is None else question.kv_lengths
        found["q_offset"] = np.asarray(length) - question.q.shape[-2]
    return {name: x for name, x in found.items() if x is not OPTIONS[name][0]}


# ---- Chunks --------------------------------------------------------------------------------------


def _axes(name, ndim):
    """The axes of an array in order. Those of the batch are numbers from the last one, -1."""
    core = AXES[name][:ndim][::-1]
    return (*range(len(core) - ndim, 0), *core)


def _chunks(arrays):
    """Sizes of the chunks along each axis of the question."""
    found = {}
    for name, x in arrays.items():
        for axis, sizes in zip(_axes(name, x.ndim), x.chunks, strict=True):
            if axis not in found or sum(found[axis]) == 1 < sum(sizes):
                found[axis] = sizes
    for axis in ("head_dim", "head_dim_v"):
        found[axis] = (sum(found[axis]),)
    group = sum(found["heads"]) // max(sum(found["kv_heads"]), 1)
    found["heads"] = _at_multiples(found["heads"], group)
    found["kv_heads"] = tuple(n // max(group, 1) for n in found["heads"])
    whole = _at_multiples(found["seqlen_k"], RUN)
    if whole != found["seqlen_k"]:
        warnings.warn(
            f"k is rechunked from {max(found['seqlen_k'])} keys a chunk to {max(whole)}: chunks of "
            f"keys begin at multiples of {RUN}",
            PerformanceWarning,
            stacklevel=4,
        )
    return found | {"seqlen_k": whole}


def _at_multiples(sizes, step):
    """The same chunks, which begin at the nearest multiples of a step."""
    step, total = max(step, 1), sum(sizes)
    starts = (min(round(start / step) * step, total) for start in itertools.accumulate(sizes[:-1]))
    return tuple(b - a for a, b in itertools.pairwise(sorted({0, *starts, total}))) or (0,)


def _rechunked(name, x, chunks):
    """An array in these chunks, where it is not broadcast."""
    axes = _axes(name, x.ndim)
    return x.rechunk(
        tuple(
            chunks[axis] if n == sum(chunks[axis]) else (n,)
            for axis, n in zip(axes, x.shape, strict=True)
        )
    )


class _Block(NamedTuple):
    """A place in the question: number, first entry and past the last one, of each axis."""

    number: dict
    first: dict
    past: dict

    def key_of(self, name, x):
        """Of the chunk of an array."""
        numbers = (
            self.number.get(axis, 0) if len(sizes) > 1 else 0
            for axis, sizes in zip(_axes(name, x.ndim), x.chunks, strict=True)
        )
        return (x.name, *numbers)

    def part_of(self, name, x):
        """Of an option that has an entry for each batch row, or head."""
        if name not in AXES or np.ndim(x) == 0:
            return x
        cuts = (
            slice(self.first[axis], self.past[axis]) if n > 1 else slice(None)
            for axis, n in zip(_axes(name, x.ndim), x.shape, strict=True)
        )
        return x[tuple(cuts)]


def _blocks(chunks, axes):
    """All blocks along some axes."""
    bounds = {axis: [0, *itertools.accumulate(chunks[axis])] for axis in axes}
    for numbers in itertools.product(*(range(len(chunks[axis])) for axis in axes)):
        number = dict(zip(axes, numbers, strict=True))
        yield _Block(
            number,
            {axis: bounds[axis][n] for axis, n in number.items()},
            {axis: bounds[axis][n + 1] for axis, n in number.items()},
        )


def _is_seen(rows, keys, options):
    """May some of these rows see some of these keys by their positions?"""
    first, past = keys.first["seqlen_k"], keys.past["seqlen_k"]
    left, right = options.get("window", (None, None))
    right = right if not options.get("causal") else 0
    low = np.min(options["q_offset"])
    high = np.max(options["q_offset"]) + rows.past["seqlen_q"] - rows.first["seqlen_q"] - 1
    return (
        first < np.max(options.get("kv_lengths", past))
        and (right is None or first <= high + right)
        and (left is None or past > low - left)
    )


# ---- The graph -----------------------------------------------------------------------------------


def _lazy(arrays, chunks, options):
    """out and lse."""
    name = "attention-" + tokenize(*arrays.items(), options)
    axes = (*sorted(axis for axis in chunks if isinstance(axis, int)), "heads", "seqlen_q")
    states, ends = {}, {}
    for rows in _blocks(chunks, axes):
        number = tuple(rows.number.values())
        chain = _chain(f"{name}-states", rows, arrays, chunks, options)
        states |= chain
        ends[(f"{name}-results", *number)] = (_result, list(chain)[-1])
    states = MaterializedLayer(states, annotations={"priority": _later_rows_first})
    graph = HighLevelGraph.from_collections(f"{name}-states", states, list(arrays.values()))
    graph = _extended(graph, f"{name}-results", ends, f"{name}-states")
    q, k, v = (arrays[n] for n in "qkv")
    rows = tuple(chunks[axis] for axis in axes)
    parts = ("out", (*rows, chunks["head_dim_v"]), result_dtype(q, k, v)), (
        "lse", rows, compute_dtype(q, k, v))  # fmt: skip
    for i, (part, sizes, dtype) in enumerate(parts):
        part = f"{name}-{part}"
        layer = {(part, *key[1:], *[0] * (1 - i)): (operator.itemgetter(i), key) for key in ends}
        meta = np.empty((0,) * len(sizes), dtype)
        yield da.Array(_extended(graph, part, layer, f"{name}-results"), part, sizes, meta=meta)


def _extended(graph, name, layer, before):
    """A graph with a layer more."""
    return HighLevelGraph(
        {**graph.layers, name: MaterializedLayer(layer)}, {**graph.dependencies, name: {before}}
    )


def _chain(name, rows, arrays, chunks, options):
    """The tasks of a chunk of queries: from one chunk of keys to the next that it sees."""
    own = {n: rows.part_of(n, x) for n, x in options.items()}
    own["q_offset"] = own["q_offset"] + rows.first["seqlen_q"]
    number = tuple(rows.number.values())
    rows.number["kv_heads"] = rows.number["heads"]
    tasks, before = {}, None
    for keys in _blocks(chunks, ("seqlen_k",)):
        here = rows._replace(number=rows.number | keys.number)
        found = [here.key_of(n, arrays[n]) if n in arrays else None for n in ARRAYS]
        if before is None:
            nothing = (name, *number, 0), (partial(_begin_without_keys, own), *found[:3])
        if not _is_seen(rows, keys, own):
            continue
        run = partial(_begin, own, keys.first["seqlen_k"]) if before is None else _carry_on
        key = (name, *number, keys.number["seqlen_k"])
        tasks[key] = (run, found[0] if before is None else before, *found[1:])
        before = key
    return tasks or dict([nothing])


def _later_rows_first(key):
    """With a causal mask they have the longest way."""
    return key[-2]


def _begin(options, first_key, q, k, v, mask, bias):
    """The state after the first keys that a chunk of queries sees."""
    return AttentionState(q, first_key=first_key, **options).update(k, v, mask, bias=bias)


def _carry_on(state, k, v, mask, bias):
    """After the next ones. A task may run again, so the state before stays as it is."""
    return copy.copy(state).update(k, v, mask, bias=bias)


def _begin_without_keys(options, q, k, v):
    """Of rows that see no chunk of keys."""
    return AttentionState(q, **options).update(k[..., :0, :], v[..., :0, :])


def _result(state):
    return tuple(state.result(return_lse=True))
