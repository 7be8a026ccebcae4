"""The public function. What its options mean in detail is in options.py."""

from ._core import ask
from .arguments import boolean, own_array, places_of, result_dtype, thread_count
from .options import checked, shape_of
from .results import named_result


def attention(
    q,
    k,
    v,
    mask=None,
    *,
    bias=None,
    causal=False,
    q_offset=None,
    window=None,
    kv_lengths=None,
    scale=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
    dropout_p=0.0,
    seed=None,
    out=None,
    return_lse=False,
    return_weights=False,
    weights_heads=None,
    weights_rows=None,
    threads=None,
):
    """Attention of every query over the keys it may see.

    Computes ``softmax(scale * q @ k.T + bias) @ v`` for each batch entry and head, exactly,
    without storing the scores. A row's result depends on that row, the keys it sees and the
    options alone: not on threads, batch, other rows, padding, strides or instruction set.

    Parameters
    ----------
    q : array_like, shape (..., heads, seqlen_q, head_dim)
        Queries, float16, bfloat16 (`ml_dtypes`), float32 or float64, with any strides. A
        two-dimensional array is one head. Leading axes of `q`, `k`, `v` broadcast.
    k : array_like, shape (..., kv_heads, seqlen_k, head_dim)
        Keys. ``heads`` must be a multiple of `kv_heads`; query head ``h`` reads KV head
        ``h // (heads // kv_heads)``.
    v : array_like, shape (..., kv_heads, seqlen_k, head_dim_v)
        Values.
    mask : array_like, broadcast to (..., heads, seqlen_q, seqlen_k), optional
        Bool (True = attend) or float (added to the scores). A -inf hides a key like False.
    bias : array_like of float, broadcast like `mask`, optional
        Added to the scores, also beside a `mask`.
    causal : bool
        Hide the keys after a query's position. Query ``i`` stands at ``i + q_offset``, so by
        default the last query sees the last key::

            seqlen_q=2, seqlen_k=4      x x x .
                                        x x x x

    q_offset : int or array_like of int, broadcast to the batch axes, optional
        Default ``seqlen_k - seqlen_q``, or ``kv_lengths - seqlen_q``. 0 aligns the first query
        with the first key.
    window : tuple (left, right), optional
        Query at position ``p`` sees keys ``p - left`` to ``p + right``; None is an open side.
    kv_lengths : int or array_like of int, broadcast to the batch axes, optional
        Keys and values from that length on do not exist and are never read.
    scale : float, optional
        Any finite number; default ``1 / sqrt(head_dim)``.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``, before bias and mask; 2**-64 to 2**64.
    sinks : array_like of float, broadcast to (..., heads), optional
        A logit more in each head's denominator, without a value: unscaled, uncapped. The lse
        includes it, and a row that sees no key has ``lse = sink``.
    alibi_slopes : array_like of float, broadcast to (..., heads), optional
        Adds ``-slope * abs(position - key)``.
    dropout_p : float
        The share of weights that are dropped, 0 to less than 1, rounded to 1 / 65536; the others
        are divided by the share that is kept. The same `seed` drops the same ones: which, is a
        function of seed, batch row, head, query row and key alone.
    seed : int, optional
        0 to 2**63 - 1; required with a `dropout_p` above 0.
    out : ndarray, shape (..., heads, seqlen_q, head_dim_v), optional
        Written and returned. Any strides; it may not overlap an input.
    return_lse : bool
        Also return the log-sum-exp of the scores.
    return_weights : bool
        Also return what each query gives to each key: the softmax before dropout, 0 where a key
        is hidden. They are computed after `out`, whose bits they leave alone, and take memory for
        every pair.
    weights_heads, weights_rows : list of int, optional
        Weights of these heads, of these query rows alone; negative numbers count from the end.
    threads : int, optional
        Upper limit for this call; see `set_num_threads`. It changes no bit of the result.

    Returns
    -------
    out : ndarray, shape (..., heads, seqlen_q, head_dim_v)
        Of dtype ``np.result_type(q, k, v)``. 16-bit floats are computed in float32. A row that
        sees no key is 0.
    AttentionResult
        With `return_lse` or `return_weights` the named tuple ``(out, lse)``, ``(out, weights)``
        or ``(out, lse, weights)``. ``lse (..., heads, seqlen_q)`` is in the compute dtype, natural
        logarithm, -inf for a row that sees no key. ``weights (..., heads, seqlen_q, seqlen_k)``
        are in the compute dtype, 0 in a row that sees no key.

    Raises
    ------
    TypeError
        An argument has an unsupported dtype or kind.
    ValueError
        Shapes do not fit, or a value is out of range.
    MemoryError
        No memory for the result or for the scratch space of a thread.

    Notes
    -----
    Vaswani et al., "Attention is all you need" (arXiv 1706.03762), computed with the online
    softmax of Milakov and Gimelshein (arXiv 1805.02867) over blocks of keys, as in
    FlashAttention (Dao et al., arXiv 2205.14135). Softcap: Gemma 2 (arXiv 2408.00118). Sinks:
    gpt-oss (arXiv 2508.10925), after Xiao et al. (arXiv 2309.17453). Slopes: Press et al.
    (arXiv 2108.12409). Dropout: Threefry-4x32-20 (Salmon et al., SC 2011), 16 bits a weight.

    Examples
    --------
    An indifferent query returns the mean of the values:

    >>> import numpy as np
    >>> q = np.zeros((1, 2), np.float32)
    >>> k = np.ones((3, 2), np.float32)
    >>> v = np.arange(6, dtype=np.float32).reshape(3, 2)
    >>> attention(q, k, v)
    array([[2., 3.]], dtype=float32)
    """
    question = ask(
        q, k, v, mask, bias=bias, causal=causal, q_offset=q_offset, window=window,
        kv_lengths=kv_lengths, scale=scale, softcap=softcap, sinks=sinks,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    if not question.plain:
        question = checked(question)
    results = NotImplemented
    if weights_heads is None and weights_rows is None:
        results = question.attend(out, return_lse, return_weights, threads)
    if results is NotImplemented:
        plain = checked_answers(question, out, return_lse, return_weights, threads)
        results = question.attend(*plain, *places(question, plain[2], weights_heads, weights_rows))
    if type(results) is not tuple:
        return results if out is None else out
    result, lse, weights = results
    return named_result(result if out is None else out, lse, weights)


def checked_answers(question, out, return_lse, return_weights, threads):
    """What is wanted of a question, plain; raises TypeError or ValueError."""
    inputs = {name: getattr(question, name) for name in ("q", "k", "v", "mask", "bias")}
    arrays = question.q, question.k, question.v
    if out is not None:
        shape = (*shape_of(*arrays).scores[:-1], question.v.shape[-1])
        out = own_array("out", out, shape, result_dtype(*arrays), inputs)
    return (
        out,
        boolean("return_lse", return_lse),
        boolean("return_weights", return_weights),
        thread_count("threads", threads),
    )


def places(question, return_weights, weights_heads, weights_rows):
    """Where the weights of each head and row go: `places_of` both."""
    shape = shape_of(question.q, question.k, question.v)
    for name, chosen in (("weights_heads", weights_heads), ("weights_rows", weights_rows)):
        if chosen is not None and not return_weights:
            raise ValueError(f"{name} is {chosen!r}, expected None without return_weights=True")
    if weights_heads is not None and not shape.heads:
        raise ValueError("weights_heads needs a heads axis, found two-dimensional q, k and v")
    return (
        places_of("weights_heads", weights_heads, *shape.heads),
        places_of("weights_rows", weights_rows, shape.seqlen_q),
    )
