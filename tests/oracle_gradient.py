"""Gradients once more, from the definitions, in the widest float, and what an error is measured by.

Every number is a sum of products. Its size is the same sum of absolute values, without the
subtractions that cancel, so that an error of each factor moves it by no more than its share.
"""

from typing import NamedTuple

import numpy as np
import oracle


class Gradient(NamedTuple):
    exact: np.ndarray
    size: np.ndarray


def attention_vjp(q, k, v, d_out, d_lse, mask=None, *, wide=np.float64, **options):
    """name: Gradient, of every argument that has one; options as in `mha_fast.attention`."""
    answer = oracle.attention(q, k, v, mask, wide=wide, **options)
    without_heads = max(x.ndim for x in (q, k, v)) == 2
    p, out = (x[None] if without_heads else x for x in (answer.weights, answer.out))
    arrays = {"q": q, "k": k, "v": v, "mask": mask, **options}
    own = {name: x for name, x in arrays.items() if np.ndim(x) and np.asarray(x).dtype != bool}
    q, k, v = (oracle.with_heads(x, wide) for x in (q, k, v))
    group_size = q.shape[-3] // max(k.shape[-3], 1)
    k, v = (np.repeat(x, group_size, axis=-3) for x in (k, v))
    scale = options.get("scale")
    if scale is None:
        scale = 1 / np.sqrt(wide(q.shape[-1])) if q.shape[-1] else 1
    kept = oracle.kept_weights(p.shape, options.get("dropout_p", 0), options.get("seed"))
    d_out = np.broadcast_to(np.asarray(d_out, np.float64).astype(wide), answer.out.shape)
    d_lse = np.broadcast_to(np.asarray(d_lse, np.float64).astype(wide), answer.lse.shape)
    d_out, d_lse = d_out.reshape(out.shape), d_lse.reshape(p.shape[:-1])

    def each(f):
        """f of the numbers, and of their sizes."""
        return f(lambda x: x), f(np.abs)

    dp = each(lambda a: kept * (a(d_out) @ a(v).swapaxes(-1, -2)))
    delta = (d_out * out).sum(-1) - d_lse, (p * dp[1]).sum(-1) + np.abs(d_lse)
    ds = p * (dp[0] - delta[0][..., None]), p * (dp[1] + delta[1][..., None])
    steep = derivative_of_cap(q, k, scale, options.get("softcap"), wide)
    dz = ds[0] * steep, ds[1] * steep
    distance = np.abs(oracle.distance(q.shape[-2], k.shape[-2], **structure(options)))
    found = {
        "q": each(lambda a: a(wide(scale)) * (dz[a is np.abs] @ a(k))),
        "k": each(lambda a: a(wide(scale)) * (dz[a is np.abs].swapaxes(-1, -2) @ a(q))),
        "v": each(lambda a: (p * kept).swapaxes(-1, -2) @ a(d_out)),
        "mask": ds,
        "bias": ds,
        "alibi_slopes": (-(ds[0] * distance).sum((-2, -1)), (ds[1] * distance).sum((-2, -1))),
    }
    if "sinks" in options:
        sink = np.asarray(options["sinks"], np.float64).astype(wide)[..., None]
        share = np.exp(sink - answer.lse.reshape(p.shape[:-1]))
        found["sinks"] = -(share * delta[0]).sum(-1), (share * delta[1]).sum(-1)
    result = {
        name: Gradient(*(sum_to(x, own[name].shape) for x in found[name]))
        for name in own
        if name in found
    }
    if options.get("scale") is not None:
        exact, size = (a((dz[i] @ a(k)) * a(q)) for i, a in enumerate((lambda x: x, np.abs)))
        result["scale"] = Gradient(exact.sum(), size.sum())
    return result, answer


def structure(options):
    return {name: options.get(name) for name in ("q_offset", "kv_lengths")}


def derivative_of_cap(q, k, scale, cap, wide):
    if cap is None:
        return wide(1)
    return 1 - np.tanh(wide(scale) * (q @ k.swapaxes(-1, -2)) / wide(cap)) ** 2


def sum_to(x, shape):
    """Summed over the axes along which such an array was broadcast, or heads that share one."""
    shape = (1,) * (x.ndim - len(shape)) + shape
    for axis, want in enumerate(shape):
        if x.shape[axis] != want:
            parts = (*x.shape[:axis], want, x.shape[axis] // want, *x.shape[axis + 1 :])
            x = x.reshape(parts).sum(axis + 1)
    return x.reshape(shape)
