"""The products around attention, computed by its kernel and its threads."""

import itertools
import math

import numpy as np

from .. import _core
from ..arguments import compute_dtype, floats, stored, thread_count
from ..results import LinearGradients
from .layer_weights import PACKED, SEPARATE
from .packed import PackedWeight

# Rows of a layer whose part of the weight's gradient is one chain: longer ones round more, and
# leave the cache.
ROWS_IN_CHAIN = 1024


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
    weight : array_like, shape (outputs, width), or PackedWeight
        One row per output, as torch and safetensors files have it; any strides. What `pack` made of
        it gives the same bits, faster for few rows.
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
    if isinstance(weight, PackedWeight):
        panels, real = weight.panels, compute_dtype(x, weight)
        if panels.dtype == np.float32 != real:
            panels = panels.astype(real)
        out = _core.linear_packed(rows, panels, len(weight), bias, threads)
    else:
        out = _core.linear(rows, weight, bias, threads)
    return out.reshape(*x.shape[:-1], len(weight))


def linear_vjp(x, weight, bias=None, *, threads=None):
    """`linear`, and its vector-Jacobian product.

    Parameters
    ----------
    x, weight, bias, threads
        As in `linear`.

    Returns
    -------
    result : ndarray
        What `linear` returns.
    pullback : callable
        ``pullback(d_out)``, an array of floats of the shape of the result, returns
        `LinearGradients`: ``x``, ``weight`` and ``bias``, each of its argument's shape and dtype,
        None where there is no bias. It keeps `x` and `weight`, not copies.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `linear`; the pullback for a cotangent of another dtype or shape.

    Notes
    -----
    Both products run as `linear` does. The gradient of the weight sums over rows: a chain over each
    `ROWS_IN_CHAIN` of them, and these in order, whatever the threads.

    Examples
    --------
    >>> out, pullback = linear_vjp([[1.0, 2.0]], [[3.0, 4.0]])
    >>> pullback([[1.0]])
    LinearGradients(x=array([[3., 4.]]), weight=array([[1., 2.]]), bias=None)
    """
    if isinstance(weight, PackedWeight):
        raise TypeError("weight is packed, expected an array: a packed one has no gradient")
    bias = None if bias is None else floats("bias", bias, ("outputs",))
    x, weight, plain_bias, threads = plain_linear(x, weight, bias, threads)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = _core.linear(rows, weight, plain_bias, threads).reshape(*x.shape[:-1], len(weight))

    def pullback(d_out):
        """Gradients of x, weight and bias."""
        d_out = floats("d_out", d_out, ("outputs",))
        if d_out.shape != out.shape:
            raise ValueError(f"d_out has shape {d_out.shape}, expected {out.shape}")
        d_rows = d_out.reshape(len(rows), len(weight)).astype(compute_dtype(x, weight), copy=False)
        d_x = _core.linear(d_rows, np.ascontiguousarray(weight.T), None, threads)
        d_weight = _sum_of_products(d_rows, rows, threads)
        d_bias = None if bias is None else stored(d_rows.sum(axis=0), bias.dtype)
        return LinearGradients(
            stored(d_x, x.dtype).reshape(x.shape), stored(d_weight, weight.dtype), d_bias
        )

    return out, pullback


def _sum_of_products(d_rows, rows, threads):
    """d_rows.T @ rows, summed over chunks of the rows."""
    total = np.zeros((d_rows.shape[1], rows.shape[1]), d_rows.dtype)
    for first in range(0, len(rows), ROWS_IN_CHAIN):
        part = slice(first, first + ROWS_IN_CHAIN)
        total += _core.linear(d_rows[part].T, rows[part].T, None, threads)
    return total


def project_heads(inputs, weights, sizes, threads):
    """q, k and v of (query, key, value), shape (..., heads, seqlen, head_dim): views of as few
    products as can be."""
    found = {}
    for run, x, weight, bias in head_products(inputs, weights, sizes):
        found |= heads_of(linear(x, weight, bias, threads=threads), run, sizes)
    return [found[i] for i in range(3)]


def head_products(inputs, weights, sizes):
    """The products that make q, k and v, one for inputs in a row that are the same array: which of
    the three, the input, and its rows of weight and bias."""
    for _, run in itertools.groupby(range(3), lambda i: id(inputs[i]) if sizes.packed else i):
        run = list(run)
        rows = slice(*(sizes.edges[i] * sizes.head_dim for i in (run[0], run[-1] + 1)))
        weight = weights[PACKED][rows] if sizes.packed else weights[SEPARATE[run[0]]]
        yield run, inputs[run[0]], weight, weights["in_proj_bias"][rows] if sizes.bias else None


def heads_of(y, run, sizes):
    """{number: (..., heads, seqlen, head_dim)} of a product (..., seqlen, rows): views."""
    first, end = sizes.edges[run[0]], sizes.edges[run[-1] + 1]
    y = y.reshape(*y.shape[:-1], end - first, sizes.head_dim).swapaxes(-2, -3)
    return {i: y[..., sizes.edges[i] - first : sizes.edges[i + 1] - first, :, :] for i in run}


def with_extra_keys(layer, x, name):
    """Keys or values, and after them the learned one and zeros: not part of the sequence."""
    parts, shape = [x], (*x.shape[:-2], 1, layer.head_dim)
    if layer.add_bias_kv:
        learned = layer.weights[name].reshape(layer.num_kv_heads, 1, layer.head_dim)
        parts.append(np.broadcast_to(learned, shape))
    if layer.add_zero_attn:
        parts.append(np.zeros(shape, layer.dtype))
    return np.concatenate(parts, axis=-2) if len(parts) > 1 else x


def plain_linear(x, weight, bias, threads):
    """The arguments of `linear`, checked; bias dense and aligned, in the compute dtype."""
    x = floats("x", x, ("width",))
    if not isinstance(weight, PackedWeight):
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
