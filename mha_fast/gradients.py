"""Gradients of attention: the result, and a function from its cotangents to those of arguments."""

from collections.abc import Collection

import numpy as np

from ._core import ask, attend_for_gradients, pull_back_through
from .arguments import boolean, check_broadcast, floats, result_dtype, stored, thread_count
from .options import checked
from .results import AttentionGradients, named_result

TERMS = ("mask", "bias")


def attention_vjp(
    q, k, v, mask=None, *, wrt=AttentionGradients._fields, return_lse=False, threads=None, **options
):
    """`attention`, and its vector-Jacobian product.

    Parameters
    ----------
    q, k, v, mask
        As in `attention`.
    wrt : sequence of str
        Arguments whose gradients are wanted; by default all that were given. A mask or a bias with
        a number for each query and key takes time and memory. It changes no bit of the others.
    return_lse : bool
        The result is ``(out, lse)``, and the pullback takes a cotangent of both.
    threads : int, optional
        As in `attention`; it limits the pullback too. It changes no bit of either.
    **options
        The options of `attention`.

    Returns
    -------
    result : ndarray or AttentionResult
        What `attention` returns, to the bit.
    pullback : callable
        ``pullback(d_out)`` or ``pullback(d_out, d_lse)``, arrays of floats that broadcast to the
        shapes of the results, returns `AttentionGradients`. It may be called more than once, and
        by several threads. It keeps the arguments, `out` and four numbers a row, not copies: who
        changes these arrays in between gets gradients of something else.

    Raises
    ------
    TypeError, ValueError
        As `attention`; `wrt` has another name; the pullback where a cotangent has another dtype or
        shape.
    MemoryError
        No memory for the result, the gradients or the scratch space of a thread.

    Notes
    -----
    The weights are computed again, block by block (Dao et al., arXiv 2205.14135, algorithm 4), in
    one pass of five products. A key's gradient sums over rows, and a row's over keys, in an order
    that is written down (csrc/gradient.inc.h), so they have the same bits for any number of threads
    and any instruction set. A hidden key gets nothing from a row, whatever either of them holds.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[0.0]]), np.array([[1.0], [-1.0]])
    >>> v = np.array([[1.0], [0.0]])
    >>> out, pullback = attention_vjp(q, k, v)
    >>> gradients = pullback([[1.0]])
    >>> out, gradients.q, gradients.v
    (array([[0.5]]), array([[0.5]]), array([[0.5],
           [0.5]]))
    """
    threads, return_lse = thread_count("threads", threads), boolean("return_lse", return_lse)
    wrt = _names(wrt)
    question = ask(q, k, v, mask, **options)
    if not question.plain:
        question = checked(question)
    forward = attend_for_gradients(question, threads)
    out, lse, _ = forward
    result = stored(out, result_dtype(question.q, question.k, question.v))

    def pullback(d_out, d_lse=None):
        """Gradients of the arguments, from those of the results."""
        if d_lse is not None and not return_lse:
            raise ValueError("d_lse is given, expected None without return_lse=True")
        d_out = _cotangent("d_out", d_out, out.shape)
        d_lse = None if d_lse is None else _cotangent("d_lse", d_lse, lse.shape)
        return gradients_of(question, forward, d_out, d_lse, wrt, threads)

    return named_result(result, lse if return_lse else None, None), pullback


def _names(wrt):
    """`wrt` as a set of fields of AttentionGradients."""
    known = AttentionGradients._fields
    if not isinstance(wrt, Collection):
        raise TypeError(f"wrt is {wrt!r}, expected names among {', '.join(known)}")
    wrt = {wrt} if isinstance(wrt, str) else set(wrt)
    if unknown := sorted(map(repr, wrt.difference(known))):
        raise ValueError(f"wrt has {', '.join(unknown)}, expected names among {', '.join(known)}")
    return wrt


def _cotangent(name, x, shape):
    x = floats(name, x, least=())
    check_broadcast(name, x.shape, shape, "the result")
    return np.broadcast_to(x, shape)


def gradients_of(question, forward, d_out, d_lse, wrt, threads):
    """AttentionGradients; of what is no array of floats, or not wanted, None."""
    given = {name: x for name in wrt if (x := getattr(question, name)) is not None}
    terms = {name: given[name] for name in TERMS if name in given}
    terms = {name: x for name, x in terms.items() if x.dtype != np.bool_}
    whole = {name: x for name, x in terms.items() if _sums_for(x, question) is None}
    wanted = {_sums_for(x, question) for name, x in terms.items() if name not in whole}
    wanted |= {"rows"} if "alibi_slopes" in given else set()
    totals = _Totals(whole, forward[1]) if whole else None
    wanted = dict.fromkeys(wanted) | ({"scores": totals.add} if whole else {})
    # The gradient of a scale, which may be 0, is that of q before it is multiplied.
    scale = question.effective_scale() if question.scale is None else 1.0
    found = pull_back_through(question, forward, d_out, d_lse, scale, wanted, threads)
    of = dict.fromkeys(AttentionGradients._fields)
    if "scale" in given:
        of["scale"] = float((found["q"] * question.q).sum(dtype=np.float64))
    if question.scale is not None:
        for name in "qk":
            found[name] *= found[name].dtype.type(question.scale)
    for name in wrt.intersection("qkv"):
        of[name] = _sum_to(found[name], given[name])
    for name, term in terms.items():
        of[name] = (
            totals.of(name) if name in whole else _sum_to(_of_sums(found, term, question), term)
        )
    if "alibi_slopes" in given:
        of["alibi_slopes"] = _sum_to(found["rows"][..., 1].sum(axis=-1), question.alibi_slopes)
    if "sinks" in given:
        of["sinks"] = _sum_to(_sinks(question, forward, d_out, d_lse), question.sinks)
    return AttentionGradients(**of)


def _sums_for(term, question):
    """Which sums of the scores' gradient are enough for a term of this shape; None: all of it."""
    shape = (1,) * (2 - term.ndim) + term.shape[-2:]
    if shape[-1] == 1 and question.k.shape[-2] != 1:
        return "rows"
    return "keys" if shape[-2] == 1 and question.q.shape[-2] != 1 else None


def _of_sums(found, term, question):
    name = _sums_for(term, question)
    return found[name][..., :1] if name == "rows" else found[name][..., None, :]


class _Totals:
    """Gradients of terms that have a number for each query and key, from those of one batch entry
    after another, which are never kept together."""

    def __init__(self, terms, lse):
        self.terms = terms
        self.batch = lse.shape[:-2]
        self.sums = {name: np.zeros(x.shape, lse.dtype) for name, x in terms.items()}

    def add(self, entry, scores):
        index = np.unravel_index(entry, self.batch) if self.batch else ()
        for total in self.sums.values():
            own = total.reshape((1,) * (len(self.batch) + 3 - total.ndim) + total.shape)
            own = own[tuple(0 if n == 1 else i for i, n in zip(index, own.shape, strict=False))]
            own += scores if len(own) == len(scores) else scores.sum(axis=0, keepdims=True)

    def of(self, name):
        return stored(self.sums[name], self.terms[name].dtype)


def _sinks(question, forward, d_out, d_lse):
    """A sink takes its share of each row's d_lse, less what the row gets from its values."""
    out, lse, _ = forward
    less = (d_out * out).sum(axis=-1, dtype=lse.dtype)
    share = np.exp(question.sinks[..., None] - np.where(lse == -np.inf, np.inf, lse))
    return (share * ((0 if d_lse is None else d_lse) - less)).sum(axis=-1, dtype=lse.dtype)


def _sum_to(x, like):
    """`x` summed over the axes along which an array of the shape and dtype of `like` broadcasts."""
    extra = x.ndim - like.ndim
    axes = (
        *range(extra),
        *(i + extra for i, n in enumerate(like.shape) if n != x.shape[i + extra]),
    )
    if axes:
        x = x.sum(axis=axes, keepdims=True).reshape(like.shape)
    return stored(x, like.dtype)
