"""`attention` for torch tensors on the CPU, differentiable, under `torch.compile` and export.

>>> import torch
>>> from mha_fast.torch import scaled_dot_product_attention
>>> q, k, v = torch.ones(3, 2, 5, 4)
>>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
torch.Size([2, 5, 4])

It needs ``pip install "mha_fast[torch]"``; ``import mha_fast`` does not load it.
"""

import ml_dtypes
import numpy as np
import torch

from ._core import FARTHEST, ask, attend_for_gradients
from .attention import attention as attend
from .gradients import gradients_of
from .options import checked
from .results import named_result

__all__ = ["attention", "scaled_dot_product_attention"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
OPEN = FARTHEST + 1  # a side of a window without an end: a schema has no lists with None in them
# Tensors among the arguments: those with a gradient, then numbers, one or one a batch row.
DIFFERENTIABLE = ("q", "k", "v", "mask", "bias", "sinks", "alibi_slopes")
NUMBERS = ("q_offset", "kv_lengths", "seed")
TENSORS = DIFFERENTIABLE + NUMBERS
VALUES = ("causal", "window", "scale", "softcap", "dropout_p")
DEFAULTS = {"causal": False, "dropout_p": 0.0}
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor? q_offset, Tensor? kv_lengths, Tensor? seed, "
    "bool causal, SymInt[]? window, float? scale, float? softcap, float dropout_p"
)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **options
):
    """`torch.nn.functional.scaled_dot_product_attention`, with its signature and its meaning.

    Parameters
    ----------
    query : Tensor, shape (..., heads, seqlen_q, head_dim)
        float16, bfloat16, float32 or float64, on the CPU, with any strides; not copied.
    key : Tensor, shape (..., kv_heads, seqlen_k, head_dim)
    value : Tensor, shape (..., kv_heads, seqlen_k, head_dim_v)
    attn_mask : Tensor, broadcast to (..., heads, seqlen_q, seqlen_k), optional
        Bool (True = attend) or float (added).
    dropout_p : float
        0 to less than 1. The seed comes from torch's generator, so `torch.manual_seed` repeats it;
        other weights are dropped than by torch.
    is_causal : bool
        Query i sees keys 0 to i, as torch has it. Not beside an `attn_mask`.
    scale : float, optional
    enable_gqa : bool, optional
        heads may be a multiple of kv_heads.

    Returns
    -------
    Tensor, shape (..., heads, seqlen_q, head_dim_v)

    Raises
    ------
    TypeError, ValueError
        As `attention`.

    Notes
    -----
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention

    Examples
    --------
    >>> x = torch.arange(4.0).reshape(1, 2, 2)
    >>> scaled_dot_product_attention(x, x, x, is_causal=True)[0, 0]
    tensor([0., 1.])
    """
    enable_gqa = options.pop("enable_gqa", False)
    if options:
        raise TypeError(f"{next(iter(options))} is no argument of scaled_dot_product_attention")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask is given, expected None beside is_causal=True")
    tensors = {"query": query, "key": key, "value": value}
    _check(tensors if attn_mask is None else tensors | {"attn_mask": attn_mask})
    if len({x.dtype for x in tensors.values()}) > 1:
        found = ", ".join(str(x.dtype) for x in tensors.values())
        raise TypeError(f"query, key and value have dtypes {found}, expected one")
    batches = [x.shape[:-2] for x in tensors.values()]
    if not enable_gqa and not batches[0] == batches[1] == batches[2]:
        batch = torch.broadcast_shapes(*batches)
        query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in tensors.values())
    seed = torch.randint(2**62, ()) if dropout_p else None
    q_offset = 0 if query.shape[-2] != key.shape[-2] else None  # one tensor less to make
    return attention(
        query, key, value, attn_mask, causal=is_causal, q_offset=q_offset, scale=scale,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


def attention(q, k, v, mask=None, *, return_lse=False, return_weights=False, **options):
    """`mha_fast.attention` of tensors.

    Parameters
    ----------
    q, k, v, mask
        As in `mha_fast.attention`, as tensors on the CPU. They are not copied.
    return_lse, return_weights : bool
        As there. The log-sum-exp has a gradient, weights have none.
    **options
        bias, causal, q_offset, window, kv_lengths, scale, softcap, sinks, alibi_slopes, dropout_p,
        seed, as there; arrays as tensors. q, k, v, float masks, bias, sinks and slopes are
        differentiable, once.

    Returns
    -------
    Tensor or AttentionResult of tensors

    Raises
    ------
    TypeError
        A tensor is not on the CPU, is sparse, nested or quantised, or has an unsupported dtype.
    ValueError
        Shapes do not fit, or a value is out of range.
    RuntimeError
        A gradient of a gradient is asked for.

    Examples
    --------
    >>> q = torch.zeros(1, 2, requires_grad=True)
    >>> attention(q, torch.eye(2), torch.eye(2), scale=1.0)[0, 0].backward()
    >>> q.grad
    tensor([[ 0.2500, -0.2500]])
    """
    if unknown := sorted(set(options).difference(TENSORS, VALUES)):
        raise TypeError(f"{unknown[0]} is no option of attention, expected {(*TENSORS, *VALUES)}")
    given = {"q": q, "k": k, "v": v, "mask": mask} | options
    tensors = {name: x for name, x in given.items() if name in TENSORS and x is not None}
    _check(tensors)
    keeps = torch.is_grad_enabled() and any(
        x.requires_grad for name, x in tensors.items() if name in DIFFERENTIABLE
    )
    if not keeps and not torch.compiler.is_compiling():
        arrays = {name: _plain(name, x) for name, x in tensors.items()}
        given = given | arrays | {"return_lse": return_lse, "return_weights": return_weights}
        result = attend(**given)
        if isinstance(result, np.ndarray):
            return tensor_of(result)
        return result._replace(**{n: tensor_of(x) for n, x in result._asdict().items()})
    numbers = {name: torch.as_tensor(tensors[name]) for name in NUMBERS if name in tensors}
    if isinstance(window := given.get("window"), (tuple, list)):
        given["window"] = [OPEN if side is None else side for side in window]
    arguments = map((DEFAULTS | given | numbers).get, (*TENSORS, *VALUES))
    run = _Attention.apply if keeps else _opaque.attend.default
    out, lse, _, weights = run(*arguments, keeps, return_weights)
    dtype = _result_dtype(q, k, v)
    out = out if out.dtype == dtype else out.to(dtype)
    return named_result(out, lse if return_lse else None, weights if return_weights else None)


def _check(tensors):
    """Are they what NumPy can read? Of NUMBERS, ints too."""
    for name, x in tensors.items():
        if isinstance(x, int) and name in NUMBERS:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, expected a tensor")
        if not x.is_cpu:
            raise TypeError(f"{name} is on {x.device}, expected the CPU: {name}.cpu()")
        if x.layout is not torch.strided or x.is_nested or x.is_quantized:
            kind = "nested" if x.is_nested else "quantised" if x.is_quantized else x.layout
            raise TypeError(f"{name} is {kind}, expected a dense tensor")


def _result_dtype(*tensors):
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else _compute_dtype(*tensors)


def _compute_dtype(*tensors):
    return torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32


# ---- Arrays --------------------------------------------------------------------------------------


def array_of(x):
    """A view of a tensor as an array; of bfloat16 by way of the integers in its memory."""
    if x.dtype is torch.bfloat16:
        return x.detach().view(torch.int16).numpy().view(BFLOAT16)
    return x.numpy(force=True)  # detached, its sign resolved


def tensor_of(x):
    """The way back."""
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _plain(name, x):
    """An argument of `mha_fast.attention`."""
    if not isinstance(x, torch.Tensor):
        return x
    return int(x) if name in NUMBERS and x.ndim == 0 else array_of(x)


def _options_of(arguments):
    """Arguments of an operator as those of `mha_fast.attention`."""
    given = dict(zip((*TENSORS, *VALUES), arguments, strict=True))
    return {name: _plain(name, x) for name, x in given.items() if x is not None}


def _question(arguments):
    question = ask(**_options_of(arguments))
    return question if question.plain else checked(question)


# ---- Operators -----------------------------------------------------------------------------------
# Opaque to torch.compile, which has to know the shapes of their results alone.


def _attend(*arguments):
    """out, lse, sums, weights. With `keeps` out is in the compute dtype and sums are what the
    backward pass needs; else sums are empty, and so are weights unless they are asked for."""
    *arguments, keeps, return_weights = arguments
    sums = weights = np.empty(0, np.float32)
    if keeps:
        out, lse, sums = attend_for_gradients(_question(arguments), None)
    if return_weights or not keeps:
        found = attend(**_options_of(arguments), return_lse=True, return_weights=return_weights)
        weights = found.weights if return_weights else weights
    if not keeps:
        out, lse = found[:2]
    return tuple(map(tensor_of, (out, lse, sums, weights)))


def _shapes(*arguments):
    *arguments, keeps, return_weights = arguments
    q, k, v = arguments[:3]
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    heads = q.shape[-3:-2] if max(q.ndim, k.ndim, v.ndim) > 2 else ()
    rows, real = (*batch, *heads, q.shape[-2]), _compute_dtype(q, k, v)
    sums = (*batch, *(heads or (1,)), q.shape[-2], 3)
    return (
        q.new_empty((*rows, v.shape[-1]), dtype=real if keeps else _result_dtype(q, k, v)),
        q.new_empty(rows, dtype=real),
        q.new_empty(sums if keeps else 0, dtype=real),
        q.new_empty((*rows, k.shape[-2]) if return_weights else 0, dtype=real),
    )


def _pull_back(*arguments):
    """Gradients of those of DIFFERENTIABLE that are wanted."""
    *arguments, out, lse, sums, d_out, d_lse, wanted = arguments
    forward = tuple(map(array_of, (out, lse, sums)))
    d_lse = None if d_lse is None else array_of(d_lse)
    wrt = [name for name, x in zip(DIFFERENTIABLE, wanted, strict=True) if x]
    found = gradients_of(_question(arguments), forward, array_of(d_out), d_lse, set(wrt), None)
    return [tensor_of(getattr(found, name)) for name in wrt]


def _gradient_shapes(*arguments):
    pairs = zip(arguments, arguments[-1], strict=False)
    return [x.new_empty(x.shape) for x, wanted in pairs if wanted]


_opaque, _library = torch.ops.mha_fast, torch.library.Library("mha_fast", "DEF")
_library.define(
    f"attend({ARGUMENTS}, bool keeps, bool return_weights) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"pull_back({ARGUMENTS}, Tensor out, Tensor lse, Tensor sums, Tensor d_out, Tensor? d_lse, "
    "bool[] wanted) -> Tensor[]"
)
for _name, _run, _fake in (
    ("attend", _attend, _shapes),
    ("pull_back", _pull_back, _gradient_shapes),
):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"mha_fast::{_name}", _fake, lib=_library)


class _Attention(torch.autograd.Function):
    """The operators, and how one is the gradient of the other."""

    @staticmethod
    def forward(ctx, *arguments):
        found = (_opaque.attend.default if torch.compiler.is_compiling() else _attend)(*arguments)
        out, lse, sums, weights = found
        *arguments, _, _ = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[: len(TENSORS)], out, lse, sums)
        ctx.values = arguments[len(TENSORS) :]
        ctx.mark_non_differentiable(sums, weights)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_lse, *_):
        *tensors, out, lse, sums = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        d_out = torch.zeros_like(out) if d_out is None else d_out
        run = _opaque.pull_back.default if torch.compiler.is_compiling() else _pull_back
        found = run(*tensors, *ctx.values, out, lse, sums, d_out, d_lse, wanted)
        found, others = iter(found), len(ctx.needs_input_grad) - len(wanted)
        return (*(next(found) if x else None for x in wanted), *[None] * others)
