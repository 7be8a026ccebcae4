"""What is right: float64 results, and how far from them a result may be.

On purpose without ``mha_fast.reference``: peers are checked in processes that never load
mha_fast. The bounds are the project's own error measure with room for peers whose exp or
order of sums is coarser; they are far below what a wrong mask or scale would cause.
"""

from __future__ import annotations

import math

import numpy as np

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# In 16 bits the rounding of a weight or a result counts, not the order of sums.
ROOM = {"float64": 64, "float32": 64, "float16": 4, "bfloat16": 4}


def sample(rows, most=256):
    """Up to `most` of so many rows, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(int))


def require_shape(output, shape):
    if output.shape != shape:
        raise ValueError(f"result has shape {output.shape}, expected {shape}")


def require_near(output, exact, bound, where):
    """Raise ValueError unless every error is within its bound. A NaN is not."""
    error = np.abs(output.astype(float) - exact)
    if not (error <= bound).all():
        raise ValueError(f"wrong result: error {error.max():.1e} in {where}")


def softmax(scores, sink=-np.inf):
    most = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - most)
    return weights / (weights.sum(axis=-1, keepdims=True) + np.exp(sink - most))


def kept_weights(inputs, keys, row):
    """Of one row: what dropout makes of each weight, 0 or 1 over the share that is kept. Only
    mha_fast draws so, so this needs its reference."""
    if "dropout_p" not in inputs:
        return np.ones(keys)
    from mha_fast.reference import threefry

    threshold = round(inputs["dropout_p"] * 2**16)
    counter = [np.arange(-(-keys // 8)), *(np.full(-(-keys // 8), x) for x in row)]
    words = np.stack(threefry(counter, [inputs["seed"], 0, 0, 0]), axis=-1)
    drawn = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1)[:keys]
    return np.where(drawn < threshold, 0, 2**16 / (2**16 - threshold))


def tolerance(dtype, scores):
    """The bound of a weighted sum, relative to the sum of its terms' sizes."""
    return ROOM[dtype] * EPS[dtype] * (1 + np.abs(scores).max(axis=-1, keepdims=True))


def check_attention(case, inputs, output):
    """Raise ValueError unless `output` is the attention of `case`: a sample of its rows."""
    output, weights = output if case.weights else (output, None)
    shape = case.batch, case.heads, case.seqlen_q, case.head_dim_v
    require_shape(output, shape)
    if case.weights:
        require_shape(weights, (*shape[:3], case.seqlen_k))
    lo, hi = case.spans()
    rows = np.unravel_index(sample(math.prod(shape[:3])), shape[:3])
    for b, h, i in zip(*rows, strict=True):
        keys = slice(lo[b, i], hi[b, i])
        k = inputs["k"][b, h // case.group_size, keys].astype(float)
        v = inputs["v"][b, h // case.group_size, keys].astype(float)
        s = k @ inputs["q"][b, h, i].astype(float) / math.sqrt(case.head_dim)
        if "softcap" in inputs:
            s = inputs["softcap"] * np.tanh(s / inputs["softcap"])
        if "alibi_slopes" in inputs:
            position = i + case.seqlen_k - case.seqlen_q
            s -= inputs["alibi_slopes"][h] * np.abs(position - np.arange(case.seqlen_k)[keys])
        if "bias" in inputs:
            s += inputs["bias"][h, i, keys]
        p = softmax(s, inputs["sinks"][h] if "sinks" in inputs else -np.inf)
        room, where = tolerance(case.dtype, s), f"batch {b}, head {h}, row {i}"
        kept = p * kept_weights(inputs, case.seqlen_k, (i, h, b))[keys]
        require_near(output[b, h, i], kept @ v, room * (kept @ np.abs(v)), where)
        if case.weights:
            require_near(weights[b, h, i, keys], p, room * p, f"weights of {where}")


def check_product(case, inputs, output):
    """Raise ValueError unless `output` is ``x @ weight.T + bias``: a sample of its rows."""
    x, weight = inputs["x"], inputs["weight"]
    require_shape(output, (len(x), len(weight)))
    rows = sample(len(x))
    x, weight, bias = x[rows].astype(float), weight.astype(float), inputs.get("bias", 0.0)
    size = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    room = ROOM[case.dtype] * EPS[case.dtype]
    require_near(output[rows], x @ weight.T + bias, room * size, "a product")
