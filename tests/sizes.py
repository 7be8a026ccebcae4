"""The sizes, instruction sets and arrays that all tests draw from."""

from contextlib import contextmanager

import ml_dtypes
import numpy as np

from mha_fast import _core

GEOMETRY = _core.geometry()
KEY_BLOCK = GEOMETRY["key_block"]


def of_every_isa(size):
    """The size of a float32 tile for each instruction set."""
    return {isa: tiles["float32"][size] for isa, tiles in GEOMETRY["isas"].items()}


VECTOR = of_every_isa("vector")  # numbers in a vector
TILE = of_every_isa("tile")  # query rows in a tile
FEW = of_every_isa("few")  # rows that decode takes
PRIMES = (3, 5, 13, 31, 67, 101)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
REALS = [np.dtype(np.float32), np.dtype(np.float64)]
DTYPES = [np.dtype(np.float16), BFLOAT16, *REALS]


def around(*sizes):
    return {size + step for size in sizes for step in (-1, 0, 1)}


SEQLENS = sorted(
    {1, *PRIMES, *around(KEY_BLOCK, 2 * KEY_BLOCK)}
    | around(*VECTOR.values(), *TILE.values(), *FEW.values())
)
HEAD_DIMS = sorted({1, *PRIMES, *around(*VECTOR.values(), 64), 128})


def tile(isa, dtype):
    """Query rows in a tile of this ISA and storage dtype."""
    real = "float64" if dtype == np.float64 else "float32"
    return GEOMETRY["isas"][isa][real]["tile"]


@contextmanager
def computing_with(isa):
    """Compute with this instruction set, and then with the one before."""
    before = _core.get_isa()
    _core.use_isa(isa)
    try:
        yield
    finally:
        _core.use_isa(before)


def on_every_isa(function):
    """(name, result) of each instruction set, the fastest first."""
    for isa in _core.isa_names():
        with computing_with(isa):
            result = function()
        yield isa, result


def random(*shape, dtype=np.float32, seed=0):
    """Standard normal numbers, rounded to the storage dtype."""
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(dtype)


def qkv(seqlen_q, seqlen_k, head_dim=8, head_dim_v=None, **more):
    """q, k, v of `batch`, `heads` and `kv_heads`; `dtype` and `seed` as in random."""
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    dtype, seed = more.get("dtype", np.float32), more.get("seed", 0)
    batch, heads = more.get("batch", (2,)), more.get("heads", 2)
    kv_heads = more.get("kv_heads", heads)
    q = random(*batch, heads, seqlen_q, head_dim, dtype=dtype, seed=seed)
    k = random(*batch, kv_heads, seqlen_k, head_dim, dtype=dtype, seed=seed + 1)
    v = random(*batch, kv_heads, seqlen_k, head_dim_v, dtype=dtype, seed=seed + 2)
    return q, k, v


def random_mask(*shape, seed=0, visible=0.7):
    """True where a key may be seen."""
    return np.random.default_rng([seed, *shape]).random(shape) < visible


def additive(mask, dtype, seed=0):
    """A float mask that hides the same keys by -inf and adds numbers elsewhere."""
    terms = random(*mask.shape, dtype=dtype, seed=seed)
    return np.where(mask, terms, -np.inf).astype(dtype)


def lowest(dtype):
    """The finite number furthest below zero."""
    return ml_dtypes.finfo(dtype).min


def smallest_normal(dtype):
    return ml_dtypes.finfo(dtype).smallest_normal


def epsilon(dtype):
    return float(ml_dtypes.finfo(dtype).eps)
