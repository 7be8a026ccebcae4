"""The weights of a layer by torch's names: their shapes, first values, and heads taken out."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from ..arguments import boolean, positive_int

PACKED = "in_proj_weight"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class Sizes(NamedTuple):
    """What the shapes of all weights follow from."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kdim: int
    vdim: int
    bias: bool
    add_bias_kv: bool
    packed: bool  # q, k and v are projected by one matrix

    @property
    def edges(self):
        """Numbers of the first head of q, of k, of v, counted on from one to the next, and the
        end. Times `head_dim` they are rows of the packed matrix."""
        return (0, *itertools.accumulate((self.num_heads, self.num_kv_heads, self.num_kv_heads)))

    def shapes(self):
        """The shape of every weight, in torch's order."""
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = width + 2 * kv_width
        if self.packed:
            shapes = {PACKED: (rows, self.embed_dim)}
        else:
            q, k, v = SEPARATE
            shapes = {
                q: (width, self.embed_dim),
                k: (kv_width, self.kdim),
                v: (kv_width, self.vdim),
            }
        if self.bias:
            shapes["in_proj_bias"] = (rows,)
        if self.add_bias_kv:
            shapes["bias_k"] = shapes["bias_v"] = (1, 1, kv_width)
        shapes["out_proj.weight"] = (self.embed_dim, width)
        if self.bias:
            shapes["out_proj.bias"] = (self.embed_dim,)
        return shapes


def sizes_of_arguments(
    embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim, bias, add_bias_kv
):  # fmt: skip
    """The arguments of the layer, defaults filled in; raises TypeError or ValueError."""
    embed_dim = positive_int("embed_dim", embed_dim)
    num_heads = positive_int("num_heads", num_heads)
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            f"embed_dim is {embed_dim}, expected a multiple of num_heads, {num_heads}, "
            "or a head_dim beside it"
        )
    num_kv_heads, head_dim, kdim, vdim = (
        default if x is None else positive_int(name, x)
        for name, x, default in (
            ("num_kv_heads", num_kv_heads, num_heads),
            ("head_dim", head_dim, embed_dim // num_heads),
            ("kdim", kdim, embed_dim),
            ("vdim", vdim, embed_dim),
        )
    )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads is {num_kv_heads}, expected a divisor of num_heads, {num_heads}"
        )
    return Sizes(
        embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim, boolean("bias", bias),
        boolean("add_bias_kv", add_bias_kv),
        packed=kdim == vdim == embed_dim,
    )  # fmt: skip


def sizes_of_weights(weights, num_heads, prefix):
    """The sizes that these weights have. ValueError if they do not fit together; `prefix` is for
    its message."""
    num_heads = positive_int("num_heads", num_heads)
    packed = SEPARATE[0] not in weights
    for name in ("out_proj.weight", *((PACKED,) if packed else SEPARATE)):
        _check(weights, name, None, prefix)
    embed_dim, width = weights["out_proj.weight"].shape
    head_dim = width // num_heads
    if head_dim * num_heads != width:
        raise ValueError(
            f"{prefix}out_proj.weight has {width} columns, expected a multiple of num_heads, "
            f"{num_heads}"
        )
    if packed:
        kv_width, kdim, vdim = (len(weights[PACKED]) - width) // 2, embed_dim, embed_dim
    else:
        (kv_width, kdim), (_, vdim) = (weights[name].shape for name in SEPARATE[1:])
    num_kv_heads = kv_width // head_dim
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        num_kv_heads = num_heads  # so that the check below names the matrix that is wrong
    bias, add_bias_kv = (
        any(name in weights for name in pair)
        for pair in (("in_proj_bias", "out_proj.bias"), ("bias_k", "bias_v"))
    )
    sizes = Sizes(
        embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim, bias, add_bias_kv, packed
    )
    shapes = sizes.shapes()
    for name, shape in shapes.items():
        _check(weights, name, shape, prefix)
    for name in weights:
        if name not in shapes:
            raise ValueError(f"{prefix}{name} is unknown, expected only {', '.join(shapes)}")
    return sizes


def _check(weights, name, shape, prefix):
    """Is it there, and of this shape? None is any matrix."""
    if name not in weights:
        raise ValueError(f"{prefix}{name} is missing, found {', '.join(weights) or 'nothing'}")
    found = weights[name].shape
    if shape is None and (len(found) != 2 or 0 in found):
        raise ValueError(f"{prefix}{name} has shape {found}, expected a matrix")
    if shape not in (None, found):
        raise ValueError(f"{prefix}{name} has shape {found}, expected {shape} beside the others")


def initial_weights(sizes, dtype, seed):
    """Drawn as torch draws them."""
    rng = np.random.default_rng(seed)
    return {name: _draw(rng, name, shape).astype(dtype) for name, shape in sizes.shapes().items()}


def _draw(rng, name, shape):
    if name.endswith("_bias") or name.endswith(".bias"):
        return np.zeros(shape)
    if name in ("bias_k", "bias_v"):
        return rng.normal(0, math.sqrt(1 / shape[-1]), shape)
    rows, columns = shape
    limit = math.sqrt(1 / columns if name == "out_proj.weight" else 6 / (rows + columns))
    return rng.uniform(-limit, limit, shape)


def without_heads(weights, sizes, heads):
    """Copies of the weights without what belongs to this set of query heads, of whole groups."""
    group_size = sizes.num_heads // sizes.num_kv_heads
    if not heads < set(range(sizes.num_heads)):
        raise ValueError(
            f"heads holds {sorted(heads)}, expected some of 0 to {sizes.num_heads - 1}, not all"
        )
    kept = np.array([h for h in range(sizes.num_heads) if h not in heads])
    kv_kept = np.unique(kept // group_size)
    if len(kept) != len(kv_kept) * group_size:
        raise ValueError(
            f"heads holds {sorted(heads)}, expected whole groups of the {group_size} heads that "
            "share a KV head"
        )

    def rows_of(numbers):
        return np.add.outer(numbers * sizes.head_dim, np.arange(sizes.head_dim)).ravel()

    _, first_k, first_v, _ = sizes.edges
    q, kv = rows_of(kept), rows_of(kv_kept)
    qkv = rows_of(np.concatenate([kept, first_k + kv_kept, first_v + kv_kept]))
    numbers_and_axis = {
        PACKED: (qkv, 0),
        "in_proj_bias": (qkv, 0),
        **dict(zip(SEPARATE, ((q, 0), (kv, 0), (kv, 0)), strict=True)),
        "bias_k": (kv, -1),
        "bias_v": (kv, -1),
        "out_proj.weight": (q, -1),
    }
    return {
        name: x.take(*numbers_and_axis[name]) if name in numbers_and_axis else x.copy()
        for name, x in weights.items()
    }
