"""The products around attention, computed by its kernel and its threads."""

import itertools
import math

import numpy as np

from .. import _core
from ..arguments import compute_dtype, floats, thread_count
from .layer_weights import PACKED, SEPARATE


def linear(x, weight, bias=None, *, threads=None):
    """A linear layer, ``x @ weight.T + bias``: what stands before and after attention.

    The products are computed as attention's scores are, by the same threads. So they do not
    wake a second pool of threads, as NumPy's ``@`` does, and each row of the result depends on
    that row of `x` alone: not on threads, the other rows, strides or instruction set.

    Parameters
    ----------
    x : array_like, shape (..., width)
        float16, bfloat16 (`ml_dtypes`), float32 or float64. Copied where its leading axes cannot
        be one axis of a view.
    weight : array_like, shape (outputs, width)
        One row per output, as torch and safetensors files have it; any strides.
    bias : array_like, shape (outputs,), optional
        Added in the compute dtype.
    threads : int, optional
        Upper limit for this call; see `set_num_threads`. It changes no bit of the result.

    Returns
    -------
    ndarray, shape (..., outputs)
        Of dtype ``np.result_type(x, weight)``. 16-bit floats are computed in float32.

    Raises
    ------
    TypeError
        An argument has an unsupported dtype or kind.
    ValueError
        Shapes do not fit.
    MemoryError
        No memory for the result or for the scratch space of a thread.

    Notes
    -----
    Goto and van de Geijn, "Anatomy of high-performance matrix multiplication"
    (doi 10.1145/1356052.1356053), with rows of `x` in the SIMD lanes.

    Examples
    --------
    >>> linear([[1.0, 2.0]], [[1.0, 0.0], [1.0, 1.0]])
    array([[1., 3.]])
    """
    x, weight, bias, threads = plain_linear(x, weight, bias, threads)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _core.linear(rows, weight, bias, threads).reshape(*x.shape[:-1], len(weight))


def project_heads(inputs, weights, sizes, threads):
    """q, k and v of (query, key, value), shape (..., heads, seqlen, head_dim): views of as few
    products as can be."""
    edges, parts = sizes.edges, []
    for _, run in itertools.groupby(range(3), lambda i: id(inputs[i]) if sizes.packed else i):
        first, *others = run
        heads = slice(edges[first], edges[first + len(others) + 1])
        rows = slice(heads.start * sizes.head_dim, heads.stop * sizes.head_dim)
        weight = weights[PACKED][rows] if sizes.packed else weights[SEPARATE[first]]
        bias = weights["in_proj_bias"][rows] if sizes.bias else None
        y = linear(inputs[first], weight, bias, threads=threads)
        y = y.reshape(*y.shape[:-1], heads.stop - heads.start, sizes.head_dim).swapaxes(-2, -3)
        for i in (first, *others):
            parts.append(y[..., edges[i] - heads.start : edges[i + 1] - heads.start, :, :])
    return parts


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
