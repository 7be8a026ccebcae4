"""`attention` for programs that differentiate themselves with the autograd package.

>>> import autograd
>>> import autograd.numpy as np
>>> import mha_fast.autograd
>>> def loss(q, k, v):
...     return np.sum(mha_fast.autograd.attention(q, k, v, causal=True) ** 2)
>>> q, k, v = np.ones((3, 2, 5, 4))
>>> autograd.grad(loss, argnum=2)(q, k, v).shape
(2, 5, 4)

It needs ``pip install "mha_fast[autograd]"``; ``import mha_fast`` does not load it.
"""

from autograd.extend import defvjp_argnums, primitive
from autograd.tracer import isbox

import mha_fast

__all__ = ["attention"]

NAMES = ("q", "k", "v", "mask", "bias", "sinks", "alibi_slopes")


@primitive
def attention(q, k, v, mask=None, bias=None, sinks=None, alibi_slopes=None, **options):
    """`mha_fast.attention`, differentiable by all of its arrays.

    Parameters
    ----------
    q, k, v, mask, bias, sinks, alibi_slopes
        As in `mha_fast.attention`. What is to be differentiated is passed by position: autograd
        does not look at keywords.
    **options
        Those of `mha_fast.attention_vjp`, `return_lse` included.

    Returns
    -------
    ndarray, or with `return_lse` the tuple (out, lse)

    Raises
    ------
    NotImplementedError
        A gradient of a gradient is asked for.
    TypeError, ValueError, MemoryError
        As `mha_fast.attention`.

    Examples
    --------
    >>> import autograd
    >>> scores = [[1.0]]  # one query and one key: their weight is 1 whatever they are
    >>> autograd.grad(lambda q: attention(q, scores, scores)[0, 0])(autograd.numpy.eye(1))
    array([[0.]])
    """
    arrays = {"mask": mask, "bias": bias, "sinks": sinks, "alibi_slopes": alibi_slopes}
    result = mha_fast.attention(q, k, v, **arrays, **options)
    return tuple(result) if options.get("return_lse") else result


def _vjp(argnums, _, arguments, options):
    arguments = dict(zip(NAMES, arguments, strict=False))
    if any(isbox(x) for x in arguments.values()):
        raise NotImplementedError("attention has a gradient, but no gradient of that gradient")
    wrt = [NAMES[i] for i in argnums]
    _, pullback = mha_fast.attention_vjp(**arguments, wrt=wrt, **options)

    def gradients(cotangent):
        found = pullback(*cotangent) if options.get("return_lse") else pullback(cotangent)
        return tuple(getattr(found, name) for name in wrt)

    return gradients


defvjp_argnums(attention, _vjp)
