"""The cases of attention: one row each, used by everything else in this folder.

A case says what is computed, never how. Names are stable keys: results of different
commits are compared by them. To add a case, add one row to ``CASES``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from problem import ITEM_BYTES, Problem, normal
from truth import check_attention

MASKS = ("padding", "lengths", "tril", "bias")
UNITS = ("flops", "bandwidth", "latency")
LAYOUTS = ("heads_first", "seq_first", "transposed")
# Arguments of attention by the number of heads, as Gemma 2, BLOOM, gpt-oss and training set them.
OPTIONS = {
    "softcap": lambda heads: {"softcap": 50.0},
    "alibi": lambda heads: {"alibi_slopes": 2.0 ** (-8 * np.arange(1, heads + 1) / heads)},
    "sinks": lambda heads: {"sinks": np.linspace(-2, 2, heads)},
    "dropout": lambda heads: {"dropout_p": 0.1, "seed": 7},
}


@dataclass(frozen=True)
class Case(Problem):
    """One attention problem.

    Parameters
    ----------
    name : str
    batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim : int
    head_dim_v : int, optional
        Default ``head_dim``.
    causal : bool
        The last query sees the last key.
    window : (int or None, int or None), optional
    mask : str, optional
        'padding': a boolean mask over keys, per batch row, lengths from half to full.
        'lengths': the same lengths, given to mha_fast as ``kv_lengths``.
        'tril': the causal rule given as a boolean (seqlen_q, seqlen_k) array.
        'bias': a float array per head is added to the scores.
    options : tuple of str
        Of OPTIONS: what today's models ask for besides.
    weights : bool
        Return the attention weights too.
    dtype : str
    layout : str
        'seq_first' passes views of arrays stored (batch, seqlen, heads, head_dim),
        'transposed' views of K and V stored (batch, kv_heads, head_dim, seqlen).
    unit : str
        What limits the case: 'flops' (share of the FMA peak), 'bandwidth' (KV bytes
        read per second) or 'latency' (microseconds a call).
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: str | None = None
    options: tuple[str, ...] = ()
    weights: bool = False
    dtype: str = "float32"
    layout: str = "heads_first"
    unit: str = "flops"

    def __post_init__(self):
        if self.head_dim_v is None:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        for value, allowed in (
            (self.mask, (None, *MASKS)),
            (self.unit, UNITS),
            (self.layout, LAYOUTS),
            (self.dtype, ITEM_BYTES),
        ):
            if value not in allowed:
                raise ValueError(f"{self.name}: {value!r} is not one of {tuple(allowed)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: heads is not a multiple of kv_heads")
        if unknown := set(self.options) - set(OPTIONS):
            raise ValueError(f"{self.name}: {unknown} are not in {tuple(OPTIONS)}")

    @property
    def group_size(self):
        return self.heads // self.kv_heads

    def lengths(self):
        """Keys that exist in each batch row, shape (batch,)."""
        if self.mask not in ("padding", "lengths"):
            return np.full(self.batch, self.seqlen_k)
        return np.linspace(self.seqlen_k // 2, self.seqlen_k, self.batch).astype(int)

    def spans(self):
        """Visible keys ``[lo, hi)`` of every query row, both (batch, seqlen_q)."""
        lengths = self.lengths()[:, None]
        ends = lengths if self.mask == "lengths" else self.seqlen_k
        position = np.arange(self.seqlen_q) + (ends - self.seqlen_q)
        lo = np.zeros((self.batch, self.seqlen_q), int)
        hi = np.broadcast_to(lengths, lo.shape)
        left, right = self.window or (None, None)
        if left is not None:
            lo = np.maximum(lo, position - left)
        if right is not None:
            hi = np.minimum(hi, position + right + 1)
        if self.causal or self.mask == "tril":
            hi = np.minimum(hi, position + 1)
        return lo, np.maximum(hi, lo)

    def visible(self):
        """Boolean mask (1 or batch, 1, seqlen_q, seqlen_k), or None if all is seen.

        For systems that know masks but not causal, windows or lengths.
        """
        lo, hi = self.spans()
        if (lo == 0).all() and (hi == self.seqlen_k).all():
            return None
        if (lo == lo[0]).all() and (hi == hi[0]).all():
            lo, hi = lo[:1], hi[:1]
        key = np.arange(self.seqlen_k)
        return ((key >= lo[..., None]) & (key < hi[..., None]))[:, None]

    def visible_pairs(self):
        """Number of (query, key) pairs that the mask leaves, over batch and heads."""
        lo, hi = self.spans()
        return self.heads * int((hi - lo).sum())

    def flops(self):
        """FLOPs of both products over the visible pairs."""
        return self.visible_pairs() * 2 * (self.head_dim + self.head_dim_v)

    def flops_with_padding(self):
        """Like `flops`, as if every batch row had its full length."""
        if self.mask not in ("padding", "lengths"):
            return self.flops()
        return replace(self, mask=None).flops()

    def kv_bytes(self):
        """Bytes of K and V that at least one query sees."""
        lo, hi = self.spans()
        keys = int((hi.max(axis=1) - lo.min(axis=1)).sum())
        width = self.head_dim + self.head_dim_v
        return keys * self.kv_heads * width * ITEM_BYTES[self.dtype]

    def score_bytes(self):
        """Bytes of the score matrix, for systems that store it."""
        itemsize = max(4, ITEM_BYTES[self.dtype])
        return self.batch * self.heads * self.seqlen_q * self.seqlen_k * itemsize

    def columns(self):
        return {
            "batch": str(self.batch),
            "heads/kv": f"{self.heads}/{self.kv_heads}",
            "seqlen_q x k": f"{self.seqlen_q} x {self.seqlen_k}",
            "head_dim": str(self.head_dim),
            "GFLOP": f"{self.flops() / 1e9:.3g}",
            "KV MB": f"{self.kv_bytes() / 1e6:.3g}",
        }

    def make_inputs(self, seed=0):
        """Keyword arguments for ``mha_fast.attention``."""
        rng = np.random.default_rng(seed)
        inputs = {
            "q": self._tensor(rng, self.heads, self.seqlen_q, self.head_dim),
            "k": self._tensor(rng, self.kv_heads, self.seqlen_k, self.head_dim),
            "v": self._tensor(rng, self.kv_heads, self.seqlen_k, self.head_dim_v),
        }
        if self.layout == "transposed":
            inputs["k"], inputs["v"] = transposed(inputs["k"]), transposed(inputs["v"])
        if self.causal:
            inputs["causal"] = True
        if self.window is not None:
            inputs["window"] = self.window
        if self.mask == "padding":
            inputs["mask"] = np.arange(self.seqlen_k) < self.lengths().reshape(-1, 1, 1, 1)
        elif self.mask == "lengths":
            inputs["kv_lengths"] = self.lengths()
        elif self.mask == "tril":
            inputs["mask"] = np.ascontiguousarray(self.visible()[0, 0])
        elif self.mask == "bias":
            shape = (self.heads, self.seqlen_q, self.seqlen_k)
            inputs["bias"] = normal(rng, shape, self.dtype)
        if self.weights:
            inputs["return_weights"] = True
        for option in self.options:
            inputs |= OPTIONS[option](self.heads)
        return inputs

    def check(self, inputs, output):
        check_attention(self, inputs, output)

    def _tensor(self, rng, heads, seqlen, width):
        if self.layout == "seq_first":
            return normal(rng, (self.batch, seqlen, heads, width), self.dtype).swapaxes(1, 2)
        return normal(rng, (self.batch, heads, seqlen, width), self.dtype)


def transposed(x):
    """The same numbers, stored with the last two axes swapped."""
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


# fmt: off
CASES = (
    # name, batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, ...
    # The table of the project's targets.
    Case("paper512_s64", 1, 8, 8, 64, 64, 64),
    Case("bert_b8_s128", 8, 12, 12, 128, 128, 64),
    Case("bert_b8_s512pad", 8, 12, 12, 512, 512, 64, mask="padding"),
    Case("vit_b16_s197", 16, 12, 12, 197, 197, 64),
    Case("gpt2_s1024", 1, 12, 12, 1024, 1024, 64, causal=True),
    Case("llama_s2048", 1, 32, 8, 2048, 2048, 128, causal=True),
    Case("long_s8192", 1, 8, 8, 8192, 8192, 64),
    Case("long_causal8k", 1, 8, 8, 8192, 8192, 128, causal=True),
    Case("bias_s1024", 1, 12, 12, 1024, 1024, 64, mask="bias"),
    Case("decode_b1_4k", 1, 32, 8, 1, 4096, 128, unit="bandwidth"),
    Case("decode_b16_2k", 16, 32, 8, 1, 2048, 128, unit="bandwidth"),
    Case("decode_mha_1k", 1, 12, 12, 1, 1024, 64, unit="bandwidth"),
    Case("tiny_s16", 1, 8, 8, 16, 16, 64, unit="latency"),
    Case("chunk_q64_k4k", 1, 32, 8, 64, 4096, 128),
    # Head dims that are no power of two, large, or different for V.
    Case("diffusion_d40_s1024", 2, 8, 8, 1024, 1024, 40),
    Case("siglip_d72_s729", 1, 16, 16, 729, 729, 72),
    Case("diffusion_d80_s1024", 2, 8, 8, 1024, 1024, 80),
    Case("phi_d96_s1024", 1, 32, 32, 1024, 1024, 96, causal=True),
    Case("gemma_d256_s1024", 1, 8, 4, 1024, 1024, 256, causal=True),
    Case("mla_d192_v128", 1, 16, 16, 1024, 1024, 192, 128, causal=True),
    # The same work said in another way: layout, dtype, mask.
    Case("bert_b8_s512len", 8, 12, 12, 512, 512, 64, mask="lengths"),
    Case("gpt2_tril_s1024", 1, 12, 12, 1024, 1024, 64, mask="tril"),
    Case("gpt2_strided_s1024", 1, 12, 12, 1024, 1024, 64, causal=True,
         layout="seq_first"),
    Case("window_s4096_w1024", 1, 32, 8, 4096, 4096, 128, causal=True,
         window=(1023, 0)),
    Case("transposed_s1024", 1, 12, 12, 1024, 1024, 64, layout="transposed"),
    Case("weights_s512", 1, 12, 12, 512, 512, 64, weights=True),
    Case("float64_s1024", 1, 12, 12, 1024, 1024, 64, dtype="float64"),
    Case("float16_s1024", 1, 12, 12, 1024, 1024, 64, dtype="float16"),
    Case("cross_s1024_k77", 2, 8, 8, 1024, 77, 64),
    # Few queries against a cache.
    Case("chunk_q4_k4k", 1, 32, 8, 4, 4096, 128, causal=True, unit="bandwidth"),
    Case("chunk_q16_k4k", 1, 32, 8, 16, 4096, 128, causal=True),
    Case("chunk_q256_k4k", 1, 32, 8, 256, 4096, 128, causal=True),
    Case("decode_group8_8k", 1, 64, 8, 1, 8192, 128, unit="bandwidth"),
    Case("decode_mqa_8k", 1, 32, 1, 1, 8192, 128, unit="bandwidth"),
    Case("decode_b8_1k_len", 8, 32, 8, 1, 1024, 128, mask="lengths",
         unit="bandwidth"),
    Case("decode_float16", 16, 32, 8, 1, 2048, 128, dtype="float16",
         unit="bandwidth"),
    Case("decode_bfloat16", 16, 32, 8, 1, 2048, 128, dtype="bfloat16",
         unit="bandwidth"),
    Case("decode_transposed", 1, 12, 12, 1, 1024, 64, layout="transposed",
         unit="bandwidth"),
    # Options: each, and all together, against the plain call.
    Case("plain_s1024", 1, 8, 8, 1024, 1024, 64),
    Case("softcap_s1024", 1, 8, 8, 1024, 1024, 64, options=("softcap",)),
    Case("alibi_s1024", 1, 8, 8, 1024, 1024, 64, options=("alibi",)),
    Case("sinks_s1024", 1, 8, 8, 1024, 1024, 64, options=("sinks",)),
    Case("dropout_s1024", 1, 8, 8, 1024, 1024, 64, options=("dropout",)),
    Case("options_s1024", 1, 8, 8, 1024, 1024, 64, options=tuple(OPTIONS)),
    # What one call costs.
    Case("tiny_h1_s16", 1, 1, 1, 16, 16, 64, unit="latency"),
    Case("tiny_decode", 1, 8, 8, 1, 64, 64, unit="latency"),
)
# fmt: on


def heads_sweep(d_models=(512, 768, 1024), seqlen=512):
    """Cases that split one model width among 1 to 64 heads."""
    return [
        Case(
            f"heads{heads}_d{d_model}",
            1,
            heads,
            heads,
            seqlen,
            seqlen,
            d_model // heads,
        )
        for d_model in d_models
        for heads in (1, 2, 4, 8, 12, 16, 32, 64)
        if d_model % heads == 0
    ]


def lengths_sweep(longest=65536, heads=4, head_dim=64):
    """Cases whose sequence length doubles from 256 to `longest`."""
    return [
        Case(f"length{seqlen}", 1, heads, heads, seqlen, seqlen, head_dim)
        for seqlen in (2**power for power in range(8, 17))
        if seqlen <= longest
    ]
