"""What attention heads look at, and what a model loses without them.

The statistics take weights ``(..., heads, seqlen_q, seqlen_k)`` and give one number a head, the
mean over its rows. `importance` and `pruning_curve` take any model, as a function of the heads
that are kept. A weight tells where a head reads, not why a model decides as it does (Jain and
Wallace, "Attention is not explanation", arXiv 1902.10186).

Rows that see nothing, which are all 0, and rows that `rows` leaves out never count. A head
without a row that counts has no statistics: NaN. A NaN in a row that counts makes its head's
number NaN. All is computed in float64, in memory for one head's matrix at a time.
"""

import numbers
from typing import NamedTuple

import numpy as np

from ._core import FARTHEST
from .arguments import check_broadcast, floats, integers, plain_array


def normalised_entropy(weights, *, rows=None):
    """How evenly a head spreads its weight: 0 on one key, 1 on all that a row sees alike.

    The entropy of a row, divided by the largest it could have: the logarithm of the number of
    keys that the row sees, which are those whose weight is not 0. A row that sees one key has
    entropy 0.

    Parameters
    ----------
    weights : array_like, shape (..., heads, seqlen_q, seqlen_k)
        Attention weights of any float dtype. A two-dimensional array is one head.
    rows : array_like of bool, broadcast to (..., seqlen_q), optional
        True where a row counts; False, for padding, leaves it out. Default: all.

    Returns
    -------
    ndarray of float64, shape (..., heads)

    Raises
    ------
    TypeError
        `weights` are no floats, or `rows` is not bool.
    ValueError
        `weights` has fewer than two axes, or `rows` does not broadcast.

    Notes
    -----
    Clark et al., "What does BERT look at?" (arXiv 1906.04341), section 3.3, compare heads by
    entropy; the division makes rows of different lengths comparable.

    Examples
    --------
    >>> normalised_entropy([[[1, 0, 0, 0.0]], [[0.5, 0.5, 0, 0]], [[0.5, 0.25, 0.25, 0]]])
    array([0.        , 1.        , 0.94639463])
    """

    def of_rows(p, _):
        keys = np.count_nonzero(p, axis=-1)
        return np.minimum(_entropy(p) / np.log2(np.maximum(keys, 2)), 1)

    return _mean_over_rows(of_rows, weights, rows)


def peak_weight(weights, *, rows=None):
    """The largest weight of a row: how sure a head is of one key.

    Parameters, result and errors as in `normalised_entropy`.

    Notes
    -----
    Called confidence by Voita et al., "Analyzing multi-head self-attention" (arXiv 1905.09418),
    section 4.

    Examples
    --------
    >>> peak_weight([[[1, 0, 0, 0.0]], [[0.5, 0.25, 0.25, 0]]])
    array([1. , 0.5])
    """
    return _mean_over_rows(lambda p, _: p.max(axis=-1), weights, rows)


def mean_distance(weights, *, rows=None, q_offset=None):
    """How far away a head looks, in positions: the mean of ``|position - key|`` by weight.

    Parameters
    ----------
    weights, rows
        As in `normalised_entropy`; so are the result and the errors.
    q_offset : int or array_like of int, broadcast to the batch axes, optional
        Query ``i`` stands at position ``i + q_offset``, as in `attention`. Default
        ``seqlen_k - seqlen_q``: the last query stands at the last key.

    Notes
    -----
    Vig and Belinkov, "Analyzing the structure of attention in a transformer language model"
    (arXiv 1906.04284).

    Examples
    --------
    >>> mean_distance(np.eye(4))
    np.float64(0.0)
    >>> mean_distance([[[0.5, 0.25, 0.25]]])
    array([1.25])
    """

    def of_rows(p, position):
        return np.sum(p * np.abs(position[:, None] - np.arange(p.shape[-1])), axis=-1)

    return _mean_over_rows(of_rows, weights, rows, q_offset)


def previous_token_share(weights, *, rows=None, q_offset=None):
    """The weight on the key before the query's own position.

    Rows that have no such key, like the first of a text, do not count. Parameters, result and
    errors as in `mean_distance`.

    Notes
    -----
    Heads that always look at the previous token are among those found by Clark et al.
    (arXiv 1906.04341), section 3.1, and Voita et al. (arXiv 1905.09418), section 5.1.

    Examples
    --------
    >>> previous_token_share(np.eye(4, k=-1) + np.eye(4, k=3))
    np.float64(1.0)
    """

    def of_rows(p, position):
        here = np.flatnonzero((position > 0) & (position <= p.shape[-1]))
        return p[here, position[here] - 1]

    return _mean_over_rows(of_rows, weights, rows, q_offset)


def first_token_share(weights, *, rows=None):
    """The weight on the first key, where heads put what they have no use for.

    Parameters, result and errors as in `normalised_entropy`.

    Notes
    -----
    Called an attention sink by Xiao et al., "Efficient streaming language models with attention
    sinks" (arXiv 2309.17453).

    Examples
    --------
    >>> first_token_share([[[1.0, 0], [0.25, 0.75]]])
    array([0.625])
    """
    return _mean_over_rows(lambda p, _: p[:, 0], weights, rows)


def similarity(weights, *, rows=None):
    """How alike heads look: 1 for the same weights, 0 where no key has weight from both.

    1 minus the Jensen-Shannon divergence in bits, the mean over the rows that see a key in both
    heads.

    Parameters
    ----------
    weights, rows
        As in `normalised_entropy`, with at least three axes.

    Returns
    -------
    ndarray of float64, shape (..., heads, heads)
        Symmetric; the diagonal is 1.

    Raises
    ------
    TypeError, ValueError
        As in `normalised_entropy`.

    Notes
    -----
    Lin, "Divergence measures based on the Shannon entropy" (doi 10.1109/18.61115). Clark et al.
    (arXiv 1906.04341), section 6, cluster heads by it.

    Examples
    --------
    >>> similarity([[[1, 0.0]], [[0, 1]], [[1, 0]]])
    array([[1., 0., 1.],
           [0., 1., 0.],
           [1., 0., 1.]])
    """
    weights, rows = _checked(weights, rows, ("heads", "seqlen_q", "seqlen_k"))
    result = np.empty((*weights.shape[:-2], weights.shape[-3]))
    for entry in np.ndindex(weights.shape[:-3]):
        result[entry] = _similarity(weights[entry], rows[entry])
    return result


def _similarity(weights, rows):
    """Of one batch entry: (heads, seqlen_q, seqlen_k) and (heads, seqlen_q) to (heads, heads)."""
    counted = rows & _sees(weights)
    entropy = np.zeros(counted.shape)
    for p, rows_of_head, bits in zip(weights, counted, entropy, strict=True):
        bits[rows_of_head] = _entropy(_float64(p[rows_of_head]))
    result = np.empty((len(weights), len(weights)))
    for a, b in zip(*np.triu_indices(len(weights)), strict=True):
        both = counted[a] & counted[b]
        middle = (_float64(weights[a, both]) + _float64(weights[b, both])) / 2
        divergence = _entropy(middle) - (entropy[a, both] + entropy[b, both]) / 2
        result[a, b] = result[b, a] = np.clip(1 - _mean(divergence), 0, 1)
    return result


def importance(loss, heads):
    """What a model loses when one head is left out, for each head.

    Parameters
    ----------
    loss : callable
        ``loss(kept) -> float``: how bad the model is with these heads. `kept` is a bool array
        of shape `heads`, a new one in each call.
    heads : int or tuple of ints
        The number of heads, or for several layers ``(layers, heads)``.

    Returns
    -------
    ndarray of float64, shape `heads`
        ``loss(all but this one) - loss(all)``. Negative: the model is better without it. The
        function is called once more than there are heads, in the order of their indices.

    Raises
    ------
    TypeError
        `heads` is no int or tuple of ints, or `loss` returns no number.
    ValueError
        `heads` holds a negative number, or `loss` returns no finite number.

    Notes
    -----
    Michel et al., "Are sixteen heads really better than one?" (arXiv 1905.10650), section 3.2.

    Examples
    --------
    >>> use = np.array([3, 0, 1])
    >>> importance(lambda kept: -use[kept].sum(), 3)
    array([3., 0., 1.])
    """
    every = _all_heads(heads)
    result = np.empty(every.shape)
    for head in np.ndindex(every.shape):
        result[head] = _loss_without(loss, every, head)
    return result - _loss(loss, every)


class PruningCurve(NamedTuple):
    """What `pruning_curve` finds."""

    removed: np.ndarray  # (steps, axes of heads): indices of the heads, first removed first
    losses: np.ndarray  # (steps + 1,): the loss before the first step and after each


def pruning_curve(loss, heads, *, steps=None):
    """Remove the head that is missed least, again and again.

    Each step tries every head that is left and removes the one without which the loss is least;
    of equals, the one with the lowest index. What one head does another may do too, so this
    keeps a loss lower than an order by `importance`, which is measured once.

    Parameters
    ----------
    loss, heads
        As in `importance`; so are the errors.
    steps : int, optional
        How many heads to remove; default all. Removing all of n calls `loss`
        ``1 + n (n + 1) / 2`` times.

    Returns
    -------
    PruningCurve
        ``(removed, losses)``: the indices ``(steps, 1)``, or ``(steps, 2)`` for heads of several
        layers, and the ``steps + 1`` losses.
        ``kept[tuple(removed[:n].T)] = False`` marks the first n in a bool array.

    Notes
    -----
    Michel et al. (arXiv 1905.10650), section 4, remove heads in the order of a score that is
    computed once; the greedy search here measures anew at each step.

    Examples
    --------
    >>> use = np.array([3, 0, 1])
    >>> pruning_curve(lambda kept: -use[kept].sum(), 3, steps=2)
    PruningCurve(removed=array([[1],
           [2]]), losses=array([-4., -4., -3.]))
    """
    kept = _all_heads(heads)
    steps = kept.size if steps is None else steps
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool):
        raise TypeError(f"steps is {steps!r}, expected an int or None")
    if not 0 <= steps <= kept.size:
        raise ValueError(f"steps is {steps}, expected 0 to {kept.size}, the number of heads")
    removed, losses = np.empty((steps, kept.ndim), np.intp), [_loss(loss, kept)]
    for step in range(steps):
        candidates = np.argwhere(kept)
        trials = [_loss_without(loss, kept, tuple(head)) for head in candidates]
        best = int(np.argmin(trials))
        removed[step] = candidates[best]
        kept[tuple(candidates[best])] = False
        losses.append(trials[best])
    return PruningCurve(removed, np.array(losses))


def _checked(weights, rows, least=("seqlen_q", "seqlen_k")):
    """`weights` as a float array, and which rows count as bool (..., heads, seqlen_q)."""
    weights = floats("weights", weights, least)
    rows = np.True_ if rows is None else plain_array("rows", rows)
    if rows.dtype != np.bool_:
        raise TypeError(f"rows has dtype {rows.dtype}, expected bool (True = the row counts)")
    target = (*weights.shape[:-3], weights.shape[-2])
    check_broadcast("rows", rows.shape, target, "(..., seqlen_q)")
    rows = np.broadcast_to(rows, target)
    if weights.ndim > 2:
        rows = rows[..., None, :]
    return weights, np.broadcast_to(rows, weights.shape[:-1])


def _mean_over_rows(statistic, weights, rows, q_offset=None):
    """The mean of ``statistic(p, position)`` over the rows that count, for each head."""
    weights, rows = _checked(weights, rows)
    batch, (seqlen_q, seqlen_k) = weights.shape[:-3], weights.shape[-2:]
    if q_offset is None:
        q_offset = seqlen_k - seqlen_q
    offset = np.broadcast_to(integers("q_offset", q_offset, batch, -FARTHEST, FARTHEST), batch)
    result = np.full(weights.shape[:-2], np.nan)
    for head in np.ndindex(result.shape):
        counted = np.flatnonzero(rows[head] & _sees(weights[head]))
        if counted.size:
            p = _float64(weights[head][counted])
            result[head] = _mean(statistic(p, counted + offset[head[:-1]]))
    return result[()]


def _sees(p):
    """Which rows see a key; a row of NaN does."""
    return (p != 0).any(axis=-1)


def _float64(p):
    """Rows side by side, so that no stride changes the order in which they are added."""
    return p.astype(np.float64, order="C")


def _mean(x):
    return np.sum(x, initial=0.0) / x.size if x.size else np.nan


def _entropy(p):
    """In bits, of each row."""
    return -np.sum(p * np.log2(np.where(p > 0, p, 1)), axis=-1)


def _all_heads(heads):
    shape = heads if isinstance(heads, tuple) else (heads,)
    if not all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in shape):
        raise TypeError(f"heads is {heads!r}, expected an int or a tuple of ints")
    if any(n < 0 for n in shape):
        raise ValueError(f"heads is {heads!r}, expected numbers of at least 0")
    return np.ones(shape, bool)


def _loss_without(loss, kept, head):
    fewer = kept.copy()
    fewer[head] = False
    return _loss(loss, fewer)


def _loss(loss, kept):
    """One call of the user's function, on an array that it may keep or change."""
    value = loss(kept.copy())
    if not isinstance(value, numbers.Real):
        raise TypeError(f"loss returned {value!r}, expected a number")
    if not np.isfinite(value):
        raise ValueError(f"loss returned {value!r}, expected a finite number")
    return float(value)
