"""Results over parts of the keys, put together."""

import numpy as np

from .arguments import compute_dtype, floats, result_dtype
from .results import AttentionResult


def merge(outs, lses):
    """The result over all keys, from results over parts of them.

    Each part is ``attention(..., return_lse=True)`` of the same queries over keys that no other
    part has: a prefix that many texts share, a chunk of a file, what another machine holds.

    Parameters
    ----------
    outs : sequence of array_like, each of shape (..., heads, seqlen_q, head_dim_v)
        One or more, in any order: float16, bfloat16 (`ml_dtypes`), float32 or float64. All but
        their last axes broadcast, among each other and with `lses`.
    lses : sequence of array_like, each of shape (..., heads, seqlen_q)
        The log-sum-exp of each part. A part weighs nothing in a row where it is -inf, and what
        `outs` has there is not read.

    Returns
    -------
    AttentionResult
        The named tuple ``(out, lse)``. ``out (..., heads, seqlen_q, head_dim_v)`` is of dtype
        ``np.result_type(*outs)``, ``lse (..., heads, seqlen_q)`` of the compute dtype. A row that
        saw nothing in any part is 0, with lse -inf.

    Raises
    ------
    TypeError
        An array has an unsupported dtype or kind.
    ValueError
        There is no part, `lses` has more or fewer, or shapes do not fit.

    Notes
    -----
    The mathematics is exact, and sums are taken in float64. But each part has been rounded, so
    the last bits may differ from those of one call over all keys, which `AttentionState` has. With
    `sinks`, which are part of the lse, only one of the parts may have them.

    Examples
    --------
    >>> import mha_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 10, 4)) for _ in range(3))
    >>> parts = [slice(0, 3), slice(3, 10)]
    >>> results = [mha_fast.attention(q, k[:, p], v[:, p], return_lse=True) for p in parts]
    >>> out, lse = merge(*zip(*results))
    >>> bool(np.abs(out - mha_fast.attention(q, k, v)).max() < 1e-14)
    True
    """
    outs, lses, shape = plain_parts(outs, lses)
    total_lse = np.full(shape[:-1], -np.inf)
    for lse in lses:
        np.maximum(total_lse, lse, out=total_lse)  # of NaN: NaN
    top = np.where(total_lse == -np.inf, 0, total_lse)
    total, out = np.zeros(shape[:-1]), np.zeros(shape)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for part, lse in zip(outs, lses, strict=True):
            weight = np.exp(lse - top)
            total += weight
            out += weight[..., None] * np.where(np.isneginf(lse)[..., None], 0, part)
        out /= np.where(total == 0, 1, total)[..., None]
        lse = top + np.log(total)
        return AttentionResult(
            out.astype(result_dtype(*outs), copy=False),
            lse.astype(compute_dtype(*outs), copy=False),
        )


def plain_parts(outs, lses):
    """The arrays, checked, lses in float64; and the shape of the result."""
    outs = [floats(f"outs[{i}]", x, ("seqlen_q", "head_dim_v")) for i, x in enumerate(outs)]
    lses = [floats(f"lses[{i}]", x, ("seqlen_q",)) for i, x in enumerate(lses)]
    if not outs:
        raise ValueError("outs has 0 parts, expected at least one")
    if len(lses) != len(outs):
        raise ValueError(f"lses has {len(lses)} parts, expected {len(outs)} as in outs")
    for i, x in enumerate(outs):
        if x.shape[-1] != outs[0].shape[-1]:
            wanted = outs[0].shape[-1]
            raise ValueError(
                f"outs[{i}] has head_dim_v {x.shape[-1]}, expected {wanted} as outs[0]"
            )
    rows = [x.shape[:-1] for x in outs] + [x.shape for x in lses]
    try:
        rows = np.broadcast_shapes(*rows)
    except ValueError:
        raise ValueError(
            f"rows of outs and lses do not broadcast: found {', '.join(map(str, rows))}, "
            "expected shapes (..., heads, seqlen_q)"
        ) from None
    return outs, [x.astype(np.float64) for x in lses], (*rows, outs[0].shape[-1])
