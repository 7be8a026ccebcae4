"""Which keys a query sees, as a few numbers and the padding, where transformers has a matrix."""

from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from transformers import masking_utils as theirs

ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(eq=False)
class Mask:
    """What `mask` hands to `attend`, through models that do not look inside.

    A model that does gets transformers' own matrix of bools (True = attend), made at that moment.
    One that adds it to scores has attention of its own, which takes bools for numbers: an error.
    """

    shape: tuple  # (batch, 1, seqlen_q, seqlen_k)
    make: partial = field(repr=False)
    options: dict | None  # of `mha_fast.attention`; None: only the matrix says it
    ndim, dtype = 4, torch.bool

    @cached_property
    def tensor(self):
        return self.make()

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor, name)

    def __getitem__(self, index):
        return self.tensor[index]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ADDS:
            raise NotImplementedError(
                "this model adds masks to scores in attention of its own, where mha_fast has no "
                "part; load it with attn_implementation='eager' or 'sdpa'"
            )
        args, kwargs = (_with_tensors(x) for x in (args, kwargs or {}))
        return function(*args, **kwargs)


def _with_tensors(x):
    if isinstance(x, Mask):
        return x.tensor
    if isinstance(x, dict):
        return {name: _with_tensors(value) for name, value in x.items()}
    return type(x)(map(_with_tensors, x)) if type(x) in (list, tuple) else x


def mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, **options):
    """What `AttentionMaskInterface` asks for: Mask, or None where every query sees every key.

    Arguments as of ``transformers.masking_utils.sdpa_mask``.
    """
    check_device(options.get("device", "cpu"))
    padding = options.get("attention_mask")
    if isinstance(padding, Mask):  # made early, for a static cache
        return padding
    make = partial(
        theirs.sdpa_mask,
        **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
    )
    if torch.compiler.is_compiling():
        return make()
    seen = None
    if not options.get("use_vmap"):
        seen = interval_of(options.get("mask_function", theirs.causal_mask_function))
    if seen is not None:
        padding = _padding(padding, kv_offset, kv_length)
        if not seen and padding is None and options.get("allow_is_bidirectional_skip"):
            return None
        seen |= {} if padding is None else {"mask": padding}
        seen["q_offset"] = int(q_offset) - kv_offset
    return Mask((batch_size, 1, q_length, kv_length), make, seen)


def check_device(device):
    """NotImplementedError where tensors are not in this machine's memory."""
    if torch.device(device).type != "cpu":
        raise NotImplementedError(
            f"mha_fast computes attention on CPUs, found tensors on {str(device)!r}; use "
            "model.to('cpu') or model.set_attn_implementation('sdpa')"
        )


def interval_of(function):
    """The options of attention that mean the same as a mask function of transformers, or None."""
    if function is theirs.causal_mask_function:
        return {"causal": True}
    if function is theirs.bidirectional_mask_function:
        return {}
    parts = _kept(function, theirs.and_masks()).get("mask_functions", ())
    if len(parts) != 2:
        return None
    overlay, inner = parts
    size = _kept(overlay, theirs.sliding_window_overlay(1)).get("sliding_window")
    if size is not None and inner is theirs.causal_mask_function:
        return {"causal": True, "window": (size - 1, None)}
    size = _kept(overlay, theirs.sliding_window_bidirectional_overlay(1)).get("sliding_window")
    if size is not None and inner is theirs.bidirectional_mask_function:
        return {"window": (size, size)}
    return None


def _kept(function, like):
    """The variables that a function keeps, if the same lines made it as `like`; else none."""
    code = getattr(function, "__code__", None)
    if code is not like.__code__:
        return {}
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(code.co_freevars, cells, strict=True))


def _padding(padding, kv_offset, kv_length):
    """Which keys are there, (batch, 1, 1, seqlen_k), or None: all."""
    if padding is None:
        return None
    padding = theirs.prepare_padding_mask(padding, kv_length, kv_offset)
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return None if padding.all() else padding[:, None, None]
