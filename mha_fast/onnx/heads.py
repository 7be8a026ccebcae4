"""The two layouts of ONNX: heads as an axis, or packed into the last one."""


def split_heads(name, x, attribute, heads):
    """`x` with its heads before the sequence; `attribute` is the name of their number."""
    if x.ndim == 4:
        if heads not in (None, x.shape[1]):
            raise ValueError(f"{attribute} is {heads}, expected {x.shape[1]} as in {name}, or none")
        return x
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {x.shape}, expected three or four axes")
    if heads is None:
        raise ValueError(f"{attribute} is missing, expected it beside {name} of three axes")
    hidden = x.shape[2]
    if heads < 1 or hidden % heads:
        raise ValueError(f"{attribute} is {heads}, expected a divisor of {name}'s {hidden} columns")
    return unpack_heads(x, heads)


def unpack_heads(x, heads):
    """A view of three axes as four."""
    batch, seqlen, hidden = x.shape
    return x.reshape(batch, seqlen, heads, hidden // heads).swapaxes(1, 2)


def pack_heads(x):
    """Heads back into the last axis."""
    batch, heads, seqlen, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, seqlen, heads * head_dim)
