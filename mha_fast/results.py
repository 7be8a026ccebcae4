"""What is returned where more than one array is asked for: named tuples."""

from collections import namedtuple
from itertools import compress, product
from typing import NamedTuple

import numpy as np

FIELDS = ("lse", "weights")


def named_result(out, *more):
    """`out`, or with those of FIELDS that are not None a named tuple of all."""
    asked = tuple([x is not None for x in more])
    return TYPES[asked]((out, *compress(more, asked))) if any(asked) else out


def _result_type(*fields):
    made = namedtuple("AttentionResult", fields, module="mha_fast")
    made.__doc__ = f"Results of attention: {', '.join(fields)}."
    # Types made at run time have no name that pickle could find.
    made.__reduce__ = lambda self: (_restored, (fields, tuple(self)))
    return made


def _restored(fields, values):
    return TYPES[tuple(name in fields for name in FIELDS)](values)


TYPES = {
    asked: _result_type("out", *compress(FIELDS, asked))._make
    for asked in product([False, True], repeat=len(FIELDS))
}
AttentionResult = TYPES[True, False].__self__


class AttentionStats(NamedTuple):
    """Statistics of attention; arrays in the compute dtype.

    Attributes
    ----------
    max : ndarray, shape (..., heads, seqlen_q)
        The greatest score of each row among its keys, -inf for a row that sees none.
    lse : ndarray, shape (..., heads, seqlen_q)
        The log-sum-exp of its scores, as `attention` returns it.
    entropy : ndarray, shape (..., heads, seqlen_q)
        ``-sum(w * log(w))`` of its weights, in nats: 0 where one key has all, ``log(n)`` where n
        keys share alike.
    received : ndarray, shape (..., heads, seqlen_k)
        What the rows of a head give to each key: the sum of its weights, to 2**-41 a row.
    top_keys : ndarray of int64, shape (..., heads, seqlen_q, top)
        The heaviest keys of each row, the heaviest first, of equal ones the first; -1 where a row
        has no more keys of weight.
    top_weights : ndarray, shape (..., heads, seqlen_q, top)
        Their weights, 0 where there is no key.
    """

    max: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    received: np.ndarray
    top_keys: np.ndarray
    top_weights: np.ndarray


class AttentionGradients(NamedTuple):
    """Gradients of attention's arguments; each has its argument's shape and dtype, and is None
    where the argument was not given or its gradient not wanted.

    Attributes
    ----------
    q, k, v : ndarray or None
    mask, bias : ndarray or None
        Of a float mask, of the bias: 0 where they hide a key. None of a bool mask.
    sinks, alibi_slopes : ndarray or None
    scale : float or None
    """

    q: np.ndarray | None
    k: np.ndarray | None
    v: np.ndarray | None
    mask: np.ndarray | None
    bias: np.ndarray | None
    sinks: np.ndarray | None
    alibi_slopes: np.ndarray | None
    scale: float | None


class LinearGradients(NamedTuple):
    """Gradients of a linear layer's arguments; each has its argument's shape and dtype."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None


class NormResult(NamedTuple):
    """A norm, and the sum that it is of."""

    out: np.ndarray
    sum: np.ndarray


class NormGradients(NamedTuple):
    """Gradients of a layer norm's arguments; each has its argument's shape and dtype."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None


class LayerGradients(NamedTuple):
    """Gradients of a layer's inputs and parameters.

    Attributes
    ----------
    query : ndarray
        In self-attention of all three.
    key, value : ndarray or None
        None where they were not given.
    weights : dict of str to ndarray
        By the names of the layer's weights.
    sinks : ndarray or None
    """

    query: np.ndarray
    key: np.ndarray | None
    value: np.ndarray | None
    weights: dict
    sinks: np.ndarray | None
