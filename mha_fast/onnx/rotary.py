"""The operator RotaryEmbedding."""

from onnx.reference.op_run import OpRun

from ..arguments import integers
from ..model.rotary import rotary
from .heads import pack_heads, split_heads


class RotaryEmbedding(OpRun):
    """Rotary positions of the domain "", opset 23.

    All inputs and attributes, with X of four axes or packed into three. A class for
    ``onnx.reference.ReferenceEvaluator(model, new_ops=[RotaryEmbedding])``.

    Raises
    ------
    TypeError
        An input has an unsupported dtype.
    ValueError
        Shapes do not fit, attributes contradict them, or an entry of `position_ids` is no row of
        the caches.

    Notes
    -----
    Su et al., "RoFormer" (arXiv 2104.09864). 16-bit floats are computed in float32, with one
    rounding at the end.

    Examples
    --------
    A quarter turn at position 1:

    >>> import numpy as np
    >>> x = np.array([[[[1, 2], [3, 4]]]], np.float32)
    >>> cos, sin = np.array([[1], [0]], np.float32), np.array([[0], [1]], np.float32)
    >>> RotaryEmbedding.eval(x, cos, sin, np.array([[0, 1]]))
    array([[[[ 1.,  2.],
             [-4.,  3.]]]], dtype=float32)
    """

    op_domain = ""

    def _run(
        self,
        X,
        cos_cache,
        sin_cache,
        position_ids=None,
        *,
        interleaved=0,
        rotary_embedding_dim=0,
        num_heads=None,
    ):
        x = split_heads("X", X, "num_heads", num_heads)
        width = rotary_embedding_dim or x.shape[-1]
        if width % 2 or not 0 <= width <= x.shape[-1]:
            raise ValueError(
                f"rotary_embedding_dim is {width}, expected an even number up to the head's "
                f"{x.shape[-1]}, or 0 for all of it"
            )
        rows = (x.shape[0], x.shape[2])
        check_caches(cos_cache, sin_cache, rows if position_ids is None else None, width // 2)
        last = len(cos_cache) - 1
        positions = integers("position_ids", position_ids, rows, 0, last, "(batch, sequence)")
        y = rotary(x, cos_cache, sin_cache, interleaved=bool(interleaved), positions=positions)
        return (y if X.ndim == 4 else pack_heads(y),)


def check_caches(cos, sin, rows, half):
    """Two axes where positions choose a row, else (batch_size, sequence_length, half)."""
    for name, cache in (("cos_cache", cos), ("sin_cache", sin)):
        expected = (*(rows or cos.shape[:1]), half)
        if cache.shape != expected:
            raise ValueError(f"{name} has shape {cache.shape}, expected {expected}")
