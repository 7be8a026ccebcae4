"""What attention did, without its weights: statistics of rows and keys, streamed."""

import numpy as np

from ._core import ask
from .arguments import non_negative_int, thread_count
from .options import checked, shape_of
from .results import AttentionStats

LN_2 = 0.6931471805599453
# csrc/measure.inc.h counts the mass of keys in these units, so that no order of rows matters.
MASS_UNITS = 2**40
MOST_ROWS = 2**22


def attention_stats(q, k, v, mask=None, *, top=0, threads=None, **options):
    """Statistics of the weights that `attention` gives, which are never held.

    Scores are computed twice: once for the sums of rows, once for the statistics. The values of
    `v` are not read. Memory grows with seqlen_q and seqlen_k, not with their product.

    Parameters
    ----------
    q, k, v, mask
        As in `attention`; up to 2**22 rows.
    top : int
        How many of the heaviest keys of each row to return.
    threads : int, optional
        As in `attention`. It changes no bit of the result.
    **options
        The options of `attention`. Weights are those before dropout.

    Returns
    -------
    AttentionStats

    Raises
    ------
    TypeError, ValueError
        As `attention`, and for a `top` that is no int of at least 0.
    MemoryError
        No memory for the result or for the scratch space of a thread.

    Notes
    -----
    Rows are measured as in FlashAttention's second pass (arXiv 2205.14135, appendix B): from the
    row's maximum and sum each weight follows without its neighbours. Received mass is what caches
    are pruned by (Zhang et al., "H2O", arXiv 2306.14048).

    Examples
    --------
    >>> import numpy as np
    >>> q = np.array([[4.0, 0.0], [0.0, 0.0]])
    >>> k = np.array([[2.0, 0.0], [0.0, 1.0]])
    >>> stats = attention_stats(q, k, k, scale=1, top=1)
    >>> stats.top_keys[0], stats.top_weights.round(4)[0], stats.entropy.round(4)
    (array([0]), array([0.9997]), array([0.003 , 0.6931]))
    """
    top = non_negative_int("top", top)
    threads = thread_count("threads", threads)
    question = ask(q, k, v, mask, **options)
    if not question.plain:
        question = checked(question)
    shape = shape_of(question.q, question.k, question.v)
    if shape.seqlen_q > MOST_ROWS:
        raise ValueError(f"q has {shape.seqlen_q} rows, expected at most {MOST_ROWS}")
    given = {name: getattr(question, name) for name in options}
    without_values = ask(question.q, question.k, question.v[..., :0], question.mask, **given)
    lse, rows, received, top_keys, top_weights = without_values.measure(top, threads)
    unknown = np.isnan(lse)
    mass, nans = received[..., 0], received[..., 1]
    return AttentionStats(
        max=np.where(unknown, lse, rows[..., 0] * lse.dtype.type(LN_2)),
        lse=lse,
        entropy=np.maximum(rows[..., 1] * lse.dtype.type(LN_2), 0),
        received=np.where(nans > 0, np.nan, mass / MASS_UNITS).astype(lse.dtype),
        top_keys=top_keys,
        top_weights=top_weights,
    )
