"""Layer norm, its gradients, and RMS norm."""

import math

import numpy as np

from .. import _core
from ..arguments import compute_dtype, floats, stored, thread_count
from ..options import finite
from ..results import NormGradients, NormResult


def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None, threads=None):
    """Rows of mean 0 and variance 1, times `weight`, plus `bias`.

    Parameters
    ----------
    x : array_like, shape (..., width)
        float16, bfloat16 (`ml_dtypes`), float32 or float64.
    weight : array_like, shape (width,)
    bias : array_like, shape (width,), optional
    eps : float
        Added to the variance.
    residual : array_like, of the shape of `x`, optional
        Added to `x` before.
    threads : int, optional
        Upper limit for this call; see `set_num_threads`. It changes no bit of the result.

    Returns
    -------
    ndarray, shape (..., width)
        Of the dtype of `x`; 16-bit floats are computed in float32.
    NormResult
        With a `residual`: ``(out, sum)``. The norm is that of the sum before it was rounded to the
        dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        An argument has another dtype or shape, or `eps` is below 0.

    Notes
    -----
    Ba et al., "Layer normalization" (arXiv 1607.06450).

    Examples
    --------
    >>> layer_norm([[1.0, 3.0]], [1.0, 1.0], eps=0.0)
    array([[-1.,  1.]])
    >>> layer_norm([[1.0, 3.0]], [1.0, 1.0], residual=[[0.0, 4.0]], eps=0.0).sum
    array([[1., 7.]])
    """
    return _norm(x, residual, weight, bias, eps, True, threads)


def rms_norm(x, weight, *, eps=1e-6, residual=None, threads=None):
    """Rows of mean square 1, times `weight`.

    Parameters
    ----------
    x, weight, residual, threads
        As in `layer_norm`.
    eps : float
        Added to the mean square.

    Returns
    -------
    ndarray, or NormResult
        As `layer_norm`.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm`.

    Notes
    -----
    Zhang and Sennrich, "Root mean square layer normalization" (arXiv 1910.07467).

    Examples
    --------
    >>> rms_norm([[3.0, -3.0]], [1.0, 2.0], eps=0.0)
    array([[ 1., -2.]])
    """
    return _norm(x, residual, weight, None, eps, False, threads)


def _norm(x, residual, weight, bias, eps, centred, threads):
    x, weight, bias, eps = _plain(x, weight, bias, eps)
    threads = thread_count("threads", threads)
    arrays = [x, None, weight, bias]
    if residual is not None:
        arrays[1] = residual = floats("residual", residual, ("width",))
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {residual.shape}, expected {x.shape} as in x")
    rows, added, weight, bias = _dense(*arrays)
    out, summed, _ = _core.norm_rows(rows, added, weight, bias, eps, centred, threads)
    out, summed = (stored(a, x.dtype).reshape(x.shape) for a in (out, summed))
    return out if residual is None else NormResult(out, summed)


def _dense(x, residual, weight, bias):
    """The arrays as the kernel reads them: x and residual as rows, all in the compute dtype."""
    real = compute_dtype(*(a for a in (x, residual) if a is not None))
    shape = math.prod(x.shape[:-1]), x.shape[-1]
    x, residual, weight, bias = (
        None if a is None else np.require(a, real, ["C", "ALIGNED"])
        for a in (x, residual, weight, bias)
    )
    return x.reshape(shape), None if residual is None else residual.reshape(shape), weight, bias


def layer_norm_vjp(x, weight, bias=None, *, eps=1e-5, threads=None):
    """`layer_norm`, and its vector-Jacobian product.

    Parameters
    ----------
    x, weight, bias, eps, threads
        As in `layer_norm`.

    Returns
    -------
    result : ndarray
        What `layer_norm` returns.
    pullback : callable
        ``pullback(d_out)``, an array of floats of the shape of the result, returns
        `NormGradients`: ``x``, ``weight``, ``bias``.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm`; the pullback for a cotangent of another dtype or shape.

    Examples
    --------
    >>> out, pullback = layer_norm_vjp([[1.0, 3.0]], [2.0, 1.0], eps=0.0)
    >>> pullback([[1.0, 1.0]]).weight
    array([-1.,  1.])
    """
    x, weight, bias, eps = _plain(x, weight, bias, eps)
    threads = thread_count("threads", threads)
    rows, _, scale, shift = _dense(x, None, weight, bias)
    out, _, stats = _core.norm_rows(rows, None, scale, shift, eps, True, threads)

    def pullback(d_out):
        """Gradients of x, weight and bias."""
        d_out = floats("d_out", d_out, ("width",))
        if d_out.shape != x.shape:
            raise ValueError(f"d_out has shape {d_out.shape}, expected {x.shape}")
        d_rows = np.require(d_out, rows.dtype, ["C", "ALIGNED"]).reshape(rows.shape)
        d_x, d_weight, d_bias = _core.pull_back_norm(rows, scale, stats, d_rows, threads)
        d_bias = None if bias is None else stored(d_bias, bias.dtype)
        return NormGradients(
            stored(d_x, x.dtype).reshape(x.shape), stored(d_weight, weight.dtype), d_bias
        )

    return stored(out, x.dtype).reshape(x.shape), pullback


def _plain(x, weight, bias, eps):
    x = floats("x", x, ("width",))
    weight = floats("weight", weight, ("width",))
    bias = None if bias is None else floats("bias", bias, ("width",))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {parameter.shape}, expected {x.shape[-1:]}")
    eps = finite("eps", eps, None)
    if eps is None or eps < 0:
        raise ValueError(f"eps is {eps}, expected a number of at least 0")
    return x, weight, bias, eps
