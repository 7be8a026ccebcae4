"""The operator TensorScatter, which writes into the caches that Attention reads."""

import numpy as np
from onnx.reference.op_run import OpRun

from ..arguments import integers


class TensorScatter(OpRun):
    """Write new keys or values into a cache; domain "", opset 24.

    Both modes, any axis but the first, any dtype. A class for
    ``onnx.reference.ReferenceEvaluator(model, new_ops=[TensorScatter])``.

    Raises
    ------
    TypeError
        `write_indices` has an unsupported dtype.
    ValueError
        Shapes do not fit, or an entry of `write_indices` is negative or leaves no room.

    Examples
    --------
    >>> cache = np.zeros((1, 4, 1))
    >>> TensorScatter.eval(cache, np.ones((1, 2, 1)), np.array([3]), mode="circular")[0, :, 0]
    array([1., 0., 0., 1.])
    """

    op_domain = ""

    def _run(self, past_cache, update, write_indices=None, *, mode="linear", axis=-2):
        rank = past_cache.ndim
        if not -rank <= axis < rank or axis % rank == 0:
            raise ValueError(f"axis is {axis}, expected one of past_cache's {rank}, not the first")
        if mode not in ("linear", "circular"):
            raise ValueError(f"mode is {mode!r}, expected 'linear' or 'circular'")
        if update.ndim != rank:
            raise ValueError(f"update has {update.ndim} axes, expected {rank} as in past_cache")
        present = past_cache.copy()
        past, new = (np.moveaxis(x, axis, 1) for x in (present, update))
        batch, room, seqlen = len(past), past.shape[1], new.shape[1]
        if new.shape != (batch, seqlen, *past.shape[2:]) or seqlen > room:
            raise ValueError(
                f"update has shape {update.shape}, expected {past_cache.shape}, "
                f"or shorter along axis {axis}"
            )
        last = room - seqlen if mode == "linear" else np.iinfo(np.int64).max
        starts = np.zeros(batch, np.int64)
        if write_indices is not None:
            starts = integers("write_indices", write_indices, (batch,), 0, last)
        rows = np.broadcast_to(starts, batch)[:, None] % max(room, 1) + np.arange(seqlen)
        past[np.arange(batch)[:, None], rows % max(room, 1)] = new
        return (present,)
