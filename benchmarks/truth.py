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


def kept_weights(inputs, keys, b, h, rows):
    """Of some rows: what dropout makes of each weight, 0 or 1 over the share that is kept. Only
    mha_fast draws so, so this needs its reference."""
    if "dropout_p" not in inputs:
        return np.ones(keys)
    from mha_fast.reference import threefry

    threshold = round(inputs["dropout_p"] * 2**16)
    counter = [np.arange(-(-keys // 8)), rows[:, None], h, b]
    words = np.stack(threefry(counter, [inputs["seed"], 0, 0, 0]), axis=-1)
    drawn = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(len(rows), -1)[:, :keys]
    return np.where(drawn < threshold, 0, 2**16 / (2**16 - threshold))


def tolerance(dtype, scores):
    """The bound of a weighted sum, relative to the sum of its terms' sizes."""
    largest = np.abs(scores).max(axis=-1, keepdims=True, where=scores > -np.inf, initial=0)
    return ROOM[dtype] * EPS[dtype] * (1 + largest)


def sampled_rows(case):
    """Of a sample of all rows: (batch, head, array of rows)."""
    shape = case.batch, case.heads, case.seqlen_q
    heads, rows = np.divmod(sample(math.prod(shape)), case.seqlen_q)
    for head in np.unique(heads):
        yield *divmod(int(head), case.heads), rows[heads == head]


def row_scores(case, inputs, b, h, rows):
    """Scores of some rows of one head, (rows, seqlen_k); -inf where a key is hidden."""
    k = inputs["k"][b, h // case.group_size].astype(float)
    s = inputs["q"][b, h, rows].astype(float) @ k.T / math.sqrt(case.head_dim)
    key = np.arange(case.seqlen_k)
    if "softcap" in inputs:
        s = inputs["softcap"] * np.tanh(s / inputs["softcap"])
    if "alibi_slopes" in inputs:
        position = rows[:, None] + case.seqlen_k - case.seqlen_q
        s -= inputs["alibi_slopes"][h] * np.abs(position - key)
    if "bias" in inputs:
        s += inputs["bias"][h, rows]
    lo, hi = (x[b, rows, None] for x in case.spans())
    return np.where((lo <= key) & (key < hi), s, -np.inf)


def row_weights(case, inputs, b, h, rows):
    """Weights of some rows of one head before dropout, what dropout makes of each, and the
    tolerance of a sum that they weigh."""
    s = row_scores(case, inputs, b, h, rows)
    p = softmax(s, inputs["sinks"][h] if "sinks" in inputs else -np.inf)
    return p, kept_weights(inputs, case.seqlen_k, b, h, rows), tolerance(case.dtype, s)


def check_attention(case, inputs, output):
    """Raise ValueError unless `output` is the attention of `case`: a sample of its rows."""
    output, weights = output if case.weights else (output, None)
    shape = case.batch, case.heads, case.seqlen_q, case.head_dim_v
    require_shape(output, shape)
    if case.weights:
        require_shape(weights, (*shape[:3], case.seqlen_k))
    for b, h, rows in sampled_rows(case):
        v = inputs["v"][b, h // case.group_size].astype(float)
        p, kept, room = row_weights(case, inputs, b, h, rows)
        size, where = (p * kept) @ np.abs(v), f"batch {b}, head {h}"
        require_near(output[b, h, rows], (p * kept) @ v, room * size, where)
        if case.weights:
            require_near(weights[b, h, rows], p, room * p, f"weights of {where}")


def check_gradients(case, inputs, output):
    """Raise ValueError unless `output` is the gradients of q, k and v for the cotangent `d_out`:
    of a sample of rows, and of a sample of the keys of a few KV heads."""
    for name, gradient in zip("qkv", output, strict=True):
        require_shape(gradient, inputs[name].shape)
    scale = 1 / math.sqrt(case.head_dim)
    for b, h, rows in sampled_rows(case):
        k = scale * inputs["k"][b, h // case.group_size].astype(float)
        _, d_scores, size, room = score_gradients(case, inputs, b, h, rows)
        where = f"the gradient of q, batch {b}, head {h}"
        require_near(output[0][b, h, rows], d_scores @ k, room * (size @ np.abs(k)), where)
    keys = sample(case.seqlen_k, most=64)
    for head in sample(case.batch * case.kv_heads, most=4):
        b, kv_head = divmod(int(head), case.kv_heads)
        found = key_gradients(case, inputs, b, kv_head, keys)
        for name, (exact, bound) in found.items():
            gradient = output["qkv".index(name)][b, kv_head, keys]
            where = f"the gradient of {name}, batch {b}, KV head {kv_head}"
            require_near(gradient, exact, bound, where)


def score_gradients(case, inputs, b, h, rows):
    """Of some rows: the weights that are kept, the gradients of the scores, the sizes of these
    without what cancels, and the tolerance."""
    p, kept, room = row_weights(case, inputs, b, h, rows)
    v = inputs["v"][b, h // case.group_size].astype(float)
    d_out = inputs["d_out"][b, h, rows].astype(float)
    d_weights = kept * (d_out @ v.T)
    sizes = kept * (np.abs(d_out) @ np.abs(v).T)
    d_scores = p * (d_weights - (p * d_weights).sum(axis=-1, keepdims=True))
    return p * kept, d_scores, p * (sizes + (p * sizes).sum(axis=-1, keepdims=True)), room


def key_gradients(case, inputs, b, kv_head, keys, block=512):
    """Of some keys of one KV head: gradients and bounds, of "k" and "v"."""
    sums = {name: [0, 0] for name in "kv"}
    heads = range(kv_head * case.group_size, (kv_head + 1) * case.group_size)
    for h in heads:
        for first in range(0, case.seqlen_q, block):
            rows = np.arange(first, min(first + block, case.seqlen_q))
            weights, d_scores, size, room = score_gradients(case, inputs, b, h, rows)
            q = inputs["q"][b, h, rows].astype(float) / math.sqrt(case.head_dim)
            d_out = inputs["d_out"][b, h, rows].astype(float)
            for name, left, bound, right in (
                ("k", d_scores, size, q),
                ("v", weights, weights, d_out),
            ):
                sums[name][0] += left[:, keys].T @ right
                sums[name][1] += (room * bound)[:, keys].T @ np.abs(right)
    return sums


def check_product(case, inputs, output):
    """Raise ValueError unless `output` is ``x @ weight.T + bias``: a sample of its rows."""
    x, weight = inputs["x"], inputs["weight"]
    require_shape(output, (len(x), len(weight)))
    rows = sample(len(x))
    x, weight, bias = x[rows].astype(float), weight.astype(float), inputs.get("bias", 0.0)
    size = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    room = ROOM[case.dtype] * EPS[case.dtype]
    require_near(output[rows], x @ weight.T + bias, room * size, "a product")
