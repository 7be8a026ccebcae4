"""Hashes of the results of random calls: a change that may change no bit gives the same file.

    python tests/fingerprints.py > before     (the old build)
    python tests/fingerprints.py | diff before -

A line for each call and instruction set: option names, dtypes, layout, threads, SHA-256 of the
results. Nothing here may depend on what is being changed: only public names, and `use_isa`.
"""

import hashlib
import sys

import numpy as np
import sizes

import mha_fast
from mha_fast import _core

CALLS = 1000
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 23, 24, 25, 31, 63, 64, 65, 101, 191, 192, 193, 300]
LONG = [385, 577, 1200, 3073, 6500]  # keys: several blocks, and runs of blocks
DIMS = [1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 63, 64, 65, 80, 128]
LAYOUTS = {
    "dense": np.copy,
    "reversed": lambda x: np.flip(np.flip(x).copy()),
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "transposed": lambda x: x.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    "interleaved": lambda x: x.swapaxes(-2, -3).copy().swapaxes(-2, -3) if x.ndim > 2 else x,
}


def call(rng):
    """A name, and the arguments of a random call of attention."""

    def pick(choices):
        return choices[rng.integers(len(choices))]

    keys = pick(LONG if rng.random() < 0.2 else [0, *LENGTHS])
    rows = pick([0, *LENGTHS]) if rng.random() < 0.7 else pick([1, 2, 4, 8])
    batch, kv_heads = pick([(), (1,), (2,), (2, 1)]), int(rng.integers(1, 3))
    heads, seed = kv_heads * pick([1, 1, 2, 3]), int(rng.integers(2**31))
    dtypes = [pick(sizes.DTYPES)] * 3 if rng.random() < 0.7 else [pick(sizes.DTYPES) for _ in "qkv"]
    dim, dim_v = pick(DIMS), pick(DIMS)
    shapes = [(heads, rows, dim), (kv_heads, keys, dim), (kv_heads, keys, dim_v)]
    arrays = [
        sizes.random(*batch, *shape, dtype=dtype, seed=seed + i)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    if batch and rng.random() < 0.3:  # broadcast
        i = rng.integers(3)
        arrays[i] = arrays[i][:1]
    layout = pick(list(LAYOUTS))
    options = draw_options(rng, pick, np.broadcast_shapes(*(x.shape[:-3] for x in arrays)),
                           heads, rows, keys, seed)  # fmt: skip
    if len(batch) == 0 and heads == kv_heads == 1 and rng.random() < 0.5:
        arrays = [x[0] for x in arrays]
        for name in ("mask", "bias"):
            if name in options and options[name].ndim > 2:
                options[name] = options[name].reshape(options[name].shape[-2:])
    options["threads"] = int(rng.integers(1, 4))
    options["return_lse"] = True
    if rows * keys < 100_000 and rng.random() < 0.5:
        options["return_weights"] = True
    names = "+".join(sorted(options))
    dtypes = "+".join(np.dtype(x.dtype).name for x in arrays)
    return f"{names} {dtypes} {layout}", [LAYOUTS[layout](x) for x in arrays], options


def draw_options(rng, pick, batch, heads, rows, keys, seed):
    options = {}
    if rng.random() < 0.4:
        options["causal"] = True
    if rng.random() < 0.3:
        options["window"] = tuple(pick([None, 0, 3, 50, 200]) for _ in range(2))
    if rng.random() < 0.3:
        options["q_offset"] = rng.integers(-5, keys + 5, batch if rng.random() < 0.5 else ())
    if rng.random() < 0.3:
        options["kv_lengths"] = rng.integers(0, keys + 1, batch if rng.random() < 0.5 else ())
    if rng.random() < 0.3:
        options["scale"] = pick([0.3, -0.7, 0.0, 1.0])
    for name in ("mask", "bias"):
        if rng.random() < 0.35:
            shape = [1 if rng.random() < 0.4 else n for n in (*batch, heads, rows, keys)]
            mask = sizes.random_mask(*shape, seed=seed, visible=pick([0.02, 0.5, 0.9, 1.0]))
            if name == "bias" or rng.random() < 0.5:
                mask = sizes.additive(mask, pick(sizes.DTYPES), seed=seed)
            options[name] = LAYOUTS[pick(["dense", "strided", "reversed"])](mask)
    return options


def linear_call(rng):
    rows, outputs, width = (int(rng.choice(LENGTHS)) for _ in range(3))
    dtype, seed = sizes.DTYPES[rng.integers(4)], int(rng.integers(2**31))
    x = sizes.random(rows, width, dtype=dtype, seed=seed)
    weight = sizes.random(outputs, width, dtype=dtype, seed=seed + 1)
    layout = list(LAYOUTS)[rng.integers(len(LAYOUTS))]
    bias = sizes.random(outputs, dtype=dtype) if rng.random() < 0.5 else None
    return f"linear {dtype} {layout}", (LAYOUTS[layout](x), LAYOUTS[layout](weight), bias)


def layer_call(rng):
    layer = mha_fast.MultiHeadAttention(
        24, 4, num_kv_heads=int(rng.choice([1, 2, 4])), seed=int(rng.integers(9)),
        add_bias_kv=bool(rng.integers(2)), add_zero_attn=bool(rng.integers(2)),
    )  # fmt: skip
    tokens = sizes.random(2, int(rng.choice(LENGTHS)), 24)
    return layer, tokens, {"causal": bool(rng.integers(2)), "need_weights": True}


def digest(result):
    arrays = result if isinstance(result, tuple) else (result,)
    whole = hashlib.sha256()
    for x in arrays:
        whole.update(repr((x.dtype.name, x.shape)).encode() + np.ascontiguousarray(x).tobytes())
    return whole.hexdigest()


def main():
    for isa in _core.isa_names():
        _core.use_isa(isa)
        rng = np.random.default_rng(0)
        for i in range(CALLS):
            name, arrays, options = call(rng)
            print(i, isa, name, digest(mha_fast.attention(*arrays, **options)))
            if i % 5 == 0:
                name, arrays = linear_call(rng)
                print(i, isa, name, digest(mha_fast.linear(*arrays)))
            if i % 20 == 0:
                layer, tokens, options = layer_call(rng)
                print(i, isa, "layer", digest(layer(tokens, **options)))
    print(CALLS * len(_core.isa_names()), "calls of attention", file=sys.stderr)


main()
