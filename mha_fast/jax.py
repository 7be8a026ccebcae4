"""`attention` for JAX arrays on CPUs, under `jit` and `grad`.

>>> import jax
>>> import mha_fast.jax
>>> def loss(q, k, v):
...     return (mha_fast.jax.attention(q, k, v, causal=True) ** 2).sum()
>>> q, k, v = jax.numpy.ones((3, 2, 5, 4))
>>> jax.jit(jax.grad(loss, argnums=2))(q, k, v).shape
(2, 5, 4)

It needs ``pip install "mha_fast[jax]"``; ``import mha_fast`` does not load it.
"""

from functools import partial

import jax
import numpy as np

import mha_fast

__all__ = ["attention"]


def attention(q, k, v, bias=None, **options):
    """`mha_fast.attention`, called back from JAX; differentiable once by its arrays.

    Parameters
    ----------
    q, k, v, bias
        As in `mha_fast.attention`.
    **options
        Numbers, booleans and tuples as in `mha_fast.attention`: they are constants of a compiled
        function.

    Returns
    -------
    jax.Array, shape (..., heads, seqlen_q, head_dim_v)

    Raises
    ------
    TypeError
        An option is an array.
    ValueError
        Shapes do not fit. In a compiled function it comes as JAX's own error.

    Notes
    -----
    Arrays go through host callbacks (`jax.pure_callback`), so it belongs on CPUs. Under `vmap`
    entries are computed one after another: use batch axes instead.

    Examples
    --------
    >>> attention(*jax.numpy.ones((3, 1, 2)))
    Array([[1., 1.]], dtype=float32)
    """
    return _attention(q, k, v, bias, tuple(sorted(options.items())))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, bias, options):
    return _forward(q, k, v, bias, options)[0]


def _forward(q, k, v, bias, options):
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    shape = (*batch, *q.shape[-3:-1], v.shape[-1])
    dtype = q.dtype if q.dtype == k.dtype == v.dtype else np.result_type(q, k, v)
    result = jax.ShapeDtypeStruct(shape, dtype)
    run = partial(_call, dict(options))
    return _back(run, result, (q, k, v, bias)), (q, k, v, bias)


def _backward(options, arrays, d_out):
    like = tuple(None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    return _back(partial(_gradients, dict(options)), like, (*arrays, d_out))


def _back(function, result, arrays):
    return jax.pure_callback(function, result, *arrays, vmap_method="sequential")


def _call(options, *arrays):
    q, k, v, bias = map(_plain, arrays)
    return mha_fast.attention(q, k, v, bias=bias, **options)


def _gradients(options, *arrays):
    q, k, v, bias, d_out = map(_plain, arrays)
    _, pullback = mha_fast.attention_vjp(q, k, v, bias=bias, **options)
    found = pullback(d_out)
    return found.q, found.k, found.v, found.bias


def _plain(x):
    return None if x is None else np.asarray(x)


_attention.defvjp(_forward, _backward)
