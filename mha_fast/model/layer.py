"""The layer: projections, attention, output projection; torch's names for weights and masks."""

import numpy as np

from ..arguments import boolean, compute_dtype, floats, thread_count
from ..attention import attention
from ..results import named_result
from .layer_arguments import cached_attention, check_cache, plain_tokens, rotation, score_terms
from .layer_gradients import layer_vjp
from .layer_weights import (
    initial_weights,
    sizes_of_arguments,
    sizes_of_weights,
    without_heads,
)
from .projection import linear, project_heads, with_extra_keys
from .weights_file import read_tensors, write_tensors


class MultiHeadAttention:
    """Multi-head attention with its projections, as torch's `nn.MultiheadAttention` in eval mode.

    Inputs are batch first: (batch, seqlen, embed_dim), or (seqlen, embed_dim) alone.

    Parameters
    ----------
    embed_dim, num_heads : int
        Width of a token, and heads. `embed_dim` is a multiple of `num_heads` unless there is
        a `head_dim`.
    num_kv_heads : int, optional
        Fewer heads for keys and values, a divisor of `num_heads`: query head ``h`` reads KV head
        ``h // (num_heads // num_kv_heads)``. Default `num_heads`.
    head_dim : int, optional
        Width of a head. Default ``embed_dim // num_heads``.
    kdim, vdim : int, optional
        Widths of key and value tokens, if not `embed_dim`: the projections are separate then.
    bias : bool
        Add biases after the projections, in and out.
    add_bias_kv, add_zero_attn : bool
        Append a learned key and value, or a key and value of zeros, that every query sees.
    dtype : dtype
        float32 or float64: of the weights, the arithmetic and the results.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same weights. They are drawn as torch does: input projections
        from Xavier's uniform distribution (Glorot and Bengio, AISTATS 2010), ``bias_k`` and
        ``bias_v`` from Xavier's normal distribution, the output projection within
        ``1 / sqrt(fan_in)``, biases 0.

    Attributes
    ----------
    weights : dict of str to ndarray
        By torch's names, with ``width = num_heads * head_dim`` and ``kv_width = num_kv_heads *
        head_dim``: ``in_proj_weight (width + 2 * kv_width, embed_dim)``, rows for q, then k, then
        v, or else ``q_proj_weight (width, embed_dim)``, ``k_proj_weight (kv_width, kdim)`` and
        ``v_proj_weight (kv_width, vdim)``; ``in_proj_bias (width + 2 * kv_width,)``; ``bias_k``
        and ``bias_v (1, 1, kv_width)``; ``out_proj.weight (embed_dim, width)``;
        ``out_proj.bias (embed_dim,)``.
    embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim : int
    bias, add_bias_kv, add_zero_attn : bool
    dtype : numpy.dtype

    Raises
    ------
    TypeError, ValueError
        A size is not a positive int, or sizes do not fit.

    Notes
    -----
    Vaswani et al., "Attention is all you need" (arXiv 1706.03762), section 3.2.2; shared key and
    value heads: Ainslie et al. (arXiv 2305.13245).

    Examples
    --------
    >>> layer = MultiHeadAttention(512, 8, seed=0)
    >>> tokens = np.random.default_rng(1).standard_normal((2, 10, 512), np.float32)
    >>> layer(tokens).shape
    (2, 10, 512)
    >>> out, weights = layer(tokens, causal=True, need_weights=True)
    >>> weights.shape, float(weights[0, 0, 1])  # the first word cannot see the second
    ((2, 10, 10), 0.0)
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        *,
        num_kv_heads=None,
        head_dim=None,
        kdim=None,
        vdim=None,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        dtype=np.float32,
        seed=None,
    ):
        sizes = sizes_of_arguments(
            embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim, bias, add_bias_kv
        )
        self._set(sizes, initial_weights(sizes, _real(dtype), seed), add_zero_attn)

    def _set(self, sizes, weights, add_zero_attn):
        vars(self).update(sizes._asdict())  # embed_dim, num_heads and so on
        self._sizes = sizes
        self.weights = weights
        self.add_zero_attn = boolean("add_zero_attn", add_zero_attn)
        self.dtype = weights["out_proj.weight"].dtype

    def __call__(
        self,
        query,
        key=None,
        value=None,
        *,
        key_padding_mask=None,
        attn_mask=None,
        causal=False,
        softcap=None,
        sinks=None,
        rotary=None,
        cache=None,
        need_weights=False,
        average_weights=True,
        threads=None,
    ):
        """Attend from `query` to `key` and mix `value`.

        **Masks mean what they mean in torch's module, the opposite of `attention`'s `mask`: True
        HIDES a key.**

        Parameters
        ----------
        query : array_like, shape (batch, seqlen_q, embed_dim) or (seqlen_q, embed_dim)
            Floats; computed in the layer's dtype.
        key : array_like, shape (batch, seqlen_k, kdim) or (seqlen_k, kdim), optional
            Default `query`: self-attention.
        value : array_like, shape (batch, seqlen_k, vdim) or (seqlen_k, vdim), optional
            Default `key`.
        key_padding_mask : array_like, shape (batch, seqlen_k) or (seqlen_k,), optional
            Bool (True = ignore this key, it is padding) or float (added to the scores).
        attn_mask : array_like, optional
            Bool (True = may NOT attend) or float (added to the scores), of shape (seqlen_q,
            seqlen_k), or (batch * num_heads, seqlen_q, seqlen_k) with the heads of a batch entry
            side by side.
        causal : bool
            Hide the keys after a query's position; the last query sees the last key. Unlike
            torch's ``is_causal`` it needs no `attn_mask`.
        softcap : float, optional
        sinks : array_like of float, shape (num_heads,), optional
            As in `attention`.
        rotary : dict, optional
            ``cos``, ``sin`` and ``interleaved`` of `mha_fast.rotary`, which turns queries and
            keys: key ``j`` stands at position ``j``, the last query at that of the last key.
        cache : KVCache, optional
            Of ``(batch, num_kv_heads, head_dim)``: the tokens are those after the ones that it
            holds, which they see, and are appended. Self-attention without masks alone.
        need_weights : bool
            Also return the attention weights.
        average_weights : bool
            Their mean over heads, or those of each head.
        threads : int, optional
            Upper limit for this call; see `set_num_threads`.

        Returns
        -------
        out : ndarray, shape (batch, seqlen_q, embed_dim) or (seqlen_q, embed_dim)
            Of the layer's dtype. A row that sees no key is ``out_proj.bias``.
        AttentionResult
            With `need_weights`: ``(out, weights)``; ``weights (batch, seqlen_q, seqlen_k)``, or
            ``(batch, num_heads, seqlen_q, seqlen_k)``. The keys of `add_bias_kv` and
            `add_zero_attn` stand after the others. Zeros in a row that sees no key.

        Raises
        ------
        TypeError, ValueError
            An argument has another dtype or shape.
        """
        threads = thread_count("threads", threads)
        causal = boolean("causal", causal)
        need_weights = boolean("need_weights", need_weights)
        average_weights = boolean("average_weights", average_weights)
        query, key, value = plain_tokens(query, key, value, self._sizes, self.dtype)
        extra_keys = self.add_bias_kv + self.add_zero_attn
        mask, bias = score_terms(
            attn_mask, key_padding_mask, causal, (*query.shape[:-1], key.shape[-2]),
            self.num_heads, extra_keys, self.dtype,
        )  # fmt: skip
        if cache is not None:
            check_cache(cache, key is query and mask is None and bias is None and not extra_keys)
        turn = rotation(rotary, query, key, cache, threads)
        q, k, v = turn(*project_heads((query, key, value), self.weights, self._sizes, threads))
        k, v = with_extra_keys(self, k, "bias_k"), with_extra_keys(self, v, "bias_v")
        heads = np.empty((*query.shape[:-1], self.num_heads, self.head_dim), self.dtype)
        attend = attention if cache is None else cached_attention(cache)
        attended = attend(
            q, k, v, mask, bias=bias, causal=causal and not extra_keys, softcap=softcap,
            sinks=sinks,
            out=heads.swapaxes(-2, -3),  # so the output projection reads contiguous rows
            return_weights=need_weights, threads=threads,
        )  # fmt: skip
        heads = heads.reshape(*query.shape[:-1], self.num_heads * self.head_dim)
        out_bias = self.weights.get("out_proj.bias")
        out = linear(heads, self.weights["out_proj.weight"], out_bias, threads=threads)
        if not need_weights:
            return out
        weights = attended.weights
        return named_result(out, None, weights.mean(axis=-3) if average_weights else weights)

    def vjp(
        self, query, key=None, value=None, *, key_padding_mask=None, attn_mask=None, causal=False,
        softcap=None, sinks=None, rotary=None, dropout_p=0.0, seed=None, threads=None,
    ):  # fmt: skip
        """The layer's result, and its vector-Jacobian product.

        Parameters
        ----------
        query, key, value, key_padding_mask, attn_mask, causal, softcap, sinks, rotary, threads
            As in a call; `dropout_p` and `seed` as in `attention`.

        Returns
        -------
        out : ndarray
            As of a call.
        pullback : callable
            ``pullback(d_out)``, an array of the shape of `out`, returns `LayerGradients`: of
            ``query``, ``key`` and ``value`` (None where one was not given) and ``weights``, a dict
            by the names of the layer's weights, so that a step is a loop over both.

        Examples
        --------
        >>> layer = MultiHeadAttention(8, 2, seed=0)
        >>> tokens = np.random.default_rng(1).standard_normal((1, 5, 8), np.float32)
        >>> out, pullback = layer.vjp(tokens, causal=True)
        >>> gradients = pullback(out)  # of half the sum of squares
        >>> for name, weight in layer.weights.items():
        ...     weight -= 0.01 * gradients.weights[name]
        >>> bool((layer(tokens, causal=True) ** 2).sum() < (out**2).sum())
        True
        """
        options = {
            "causal": boolean("causal", causal), "softcap": softcap, "sinks": sinks,
            "dropout_p": dropout_p, "seed": seed,
        }  # fmt: skip
        masks = attn_mask, key_padding_mask
        return layer_vjp(self, query, key, value, rotary, masks, options, threads)

    def __repr__(self):
        defaults = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.embed_dim // self.num_heads,
            "kdim": self.embed_dim,
            "vdim": self.embed_dim,
            "bias": True,
            "add_bias_kv": False,
            "add_zero_attn": False,
            "dtype": "float32",
        }
        own = vars(self) | {"dtype": self.dtype.name}
        more = "".join(f", {n}={own[n]!r}" for n, usual in defaults.items() if own[n] != usual)
        return f"MultiHeadAttention({self.embed_dim}, {self.num_heads}{more})"

    @property
    def num_parameters(self):
        """How many numbers the weights are."""
        return sum(x.size for x in self.weights.values())

    # ---- Weights in and out ----------------------------------------------------------------------

    @classmethod
    def from_state_dict(cls, state, num_heads, prefix="", *, add_zero_attn=False, dtype=None):
        """The layer that has these weights.

        Parameters
        ----------
        state : dict of str to array_like
            By torch's names, such as ``module.state_dict()``. All other sizes follow from the
            shapes. Arrays that are contiguous and of the right dtype are not copied.
        num_heads : int
        prefix : str
            Use only what has a name that starts so, such as ``"encoder.layers.0.self_attn."``.
        add_zero_attn : bool
            As for the class; `state` does not tell.
        dtype : dtype, optional
            Default float64 if one of them is float64, else float32.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        TypeError
            An array holds something else than floats.
        ValueError
            A name is missing or unknown, or a shape does not fit the others and `num_heads`.

        Examples
        --------
        >>> layer = MultiHeadAttention(8, 2, bias=False)
        >>> MultiHeadAttention.from_state_dict(layer.state_dict(), 2)
        MultiHeadAttention(8, 2, bias=False)
        """
        weights = {n: floats(n, x, least=()) for n, x in state.items() if n.startswith(prefix)}
        if dtype is None:
            dtype = compute_dtype(*weights.values())
        weights = {
            name.removeprefix(prefix): np.ascontiguousarray(x, _real(dtype))
            for name, x in weights.items()
        }
        layer = cls.__new__(cls)
        layer._set(sizes_of_weights(weights, num_heads, prefix), weights, add_zero_attn)
        return layer

    def state_dict(self):
        """The layer's own arrays by torch's names, as `from_state_dict` takes them."""
        return dict(self.weights)

    @classmethod
    def load(cls, path, num_heads, prefix="", *, add_zero_attn=False, dtype=None):
        """The layer whose weights are in a file.

        Parameters
        ----------
        path : str or path-like
            Ends in ``.safetensors`` (needs the extra `models`) or ``.npz``.
        num_heads, prefix, add_zero_attn, dtype
            As in `from_state_dict`.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        ValueError
            The file is damaged or hostile, or its weights do not fit. The message names file,
            weight, what was found and what was expected.
        OSError, ImportError
            It cannot be opened; `safetensors` is not installed.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     MultiHeadAttention(8, 2).save(f"{folder}/layer.npz")
        ...     MultiHeadAttention.load(f"{folder}/layer.npz", 2)
        MultiHeadAttention(8, 2)
        """
        tensors = read_tensors(path, prefix)
        try:
            return cls.from_state_dict(
                tensors, num_heads, prefix, add_zero_attn=add_zero_attn, dtype=dtype
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path):
        """Write the weights to a file that `load` and other programs read, whole or not at all."""
        write_tensors(path, self.weights)

    def prune_heads(self, heads):
        """The layer without these heads: what they add to the result is gone, all else stays.

        Parameters
        ----------
        heads : iterable of int
            From 0 to ``num_heads - 1``. Query heads that share a KV head go together.

        Returns
        -------
        MultiHeadAttention
            With arrays of its own.

        Raises
        ------
        ValueError
            There is no such head, none would stay, or a part of a group would.

        Notes
        -----
        Michel et al., "Are sixteen heads really better than one?" (arXiv 1905.10650).

        Examples
        --------
        >>> MultiHeadAttention(8, 4).prune_heads([0, 3])
        MultiHeadAttention(8, 2, head_dim=2)
        """
        heads = set(heads)
        weights = without_heads(self.weights, self._sizes, heads)
        num_heads = self.num_heads - len(heads)
        return self.from_state_dict(weights, num_heads, add_zero_attn=self.add_zero_attn)


def _real(dtype):
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise TypeError(f"dtype is {dtype!r}, expected float32 or float64")
    return np.dtype(dtype)
