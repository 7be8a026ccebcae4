"""Weights of linear layers, laid out once for the kernel."""

import numpy as np

from .. import _core
from ..arguments import floats, positive_int
from .weights_file import read_tensors, write_tensors

PANEL = _core.PANEL
LINE = 64  # bytes of a cache line, at which panels begin


def pack(weight):
    """Lay out a weight for `linear`, which then reads it at the speed of memory.

    Few rows of x are what this is for: a model that writes a text multiplies one row by every
    weight it has. The results have the same bits as those of the weight itself.

    Parameters
    ----------
    weight : array_like, shape (outputs, width)
        float16, bfloat16 (`ml_dtypes`), float32 or float64; any strides. It is copied.

    Returns
    -------
    PackedWeight
        Of the same dtype.

    Raises
    ------
    TypeError, ValueError
        It has another dtype or shape.

    Notes
    -----
    Panels of 48 outputs, [width][48] each, as the B of Goto and van de Geijn, "Anatomy of
    high-performance matrix multiplication" (doi 10.1145/1356052.1356053). The layout is the same
    for every instruction set.

    Examples
    --------
    >>> packed = pack(np.eye(3, dtype=np.float32))
    >>> packed
    PackedWeight(3 x 3, float32, 576 bytes)
    >>> from mha_fast import linear
    >>> linear([[1.0, 2.0, 3.0]], packed)
    array([[1., 2., 3.]])
    """
    weight = floats("weight", weight, ("outputs", "width"))
    if weight.ndim > 2:
        raise ValueError(f"weight has shape {weight.shape}, expected (outputs, width)")
    outputs, width = weight.shape
    panels = _on_lines((-(-outputs // PANEL), width, PANEL), weight.dtype)
    for i, panel in enumerate(panels):
        rows = weight[i * PANEL : (i + 1) * PANEL]
        panel[:, : len(rows)] = rows.T
        panel[:, len(rows) :] = 0
    return PackedWeight(panels, outputs)


class PackedWeight:
    """A weight that `pack` has laid out. NumPy takes it for the array that it was.

    Attributes
    ----------
    shape : tuple
        (outputs, width)
    dtype : dtype
    nbytes : int
        With what the last panel is filled up.
    """

    ndim = 2

    def __init__(self, panels, outputs):
        outputs = positive_int("outputs", outputs) if outputs else 0
        if panels.ndim != 3 or panels.shape[2] != PANEL or len(panels) != -(-outputs // PANEL):
            raise ValueError(
                f"panels have shape {panels.shape}, expected "
                f"{(-(-outputs // PANEL), 'width', PANEL)} for {outputs} outputs"
            )
        if panels.ctypes.data % LINE or not panels.flags.c_contiguous:
            panels, other = _on_lines(panels.shape, panels.dtype), panels
            panels[...] = other
        self.panels = panels
        self.shape = (outputs, panels.shape[1])
        self.dtype = panels.dtype
        self.nbytes = panels.nbytes

    def __repr__(self):
        outputs, width = self.shape
        return f"PackedWeight({outputs} x {width}, {self.dtype}, {self.nbytes:,} bytes)"

    def __len__(self):
        return self.shape[0]

    def __reduce__(self):
        return PackedWeight, (self.panels, self.shape[0])

    def __array__(self, dtype=None, copy=None):
        return self.unpack().astype(dtype or self.dtype, copy=False)

    def unpack(self):
        """The weight, as a new array of shape (outputs, width)."""
        rows = self.panels.swapaxes(1, 2).reshape(-1, self.shape[1])
        return np.ascontiguousarray(rows[: self.shape[0]])

    def save(self, path):
        """Write it to a file, ``.npz`` or ``.safetensors`` (which takes bfloat16 too).

        Raises
        ------
        ValueError, OSError
            As `write_tensors` of a layer's files: another suffix, or the file cannot be written.
        """
        write_tensors(path, {"panels": self.panels, "outputs": np.float64(self.shape[0])})

    @classmethod
    def open(cls, path):
        """Read what `save` has written.

        Raises
        ------
        ValueError, OSError
            The file is damaged or holds something else, or it cannot be opened.
        """
        found = read_tensors(path)
        if set(found) != {"panels", "outputs"} or found["outputs"].ndim:
            raise ValueError(f"{path} has {sorted(found)}, expected panels and outputs")
        outputs = float(found["outputs"])
        if not 0 <= outputs < 2**53 or outputs % 1:
            raise ValueError(f"{path} has {outputs} outputs, expected a whole number")
        return cls(found["panels"], int(outputs))


def _on_lines(shape, dtype):
    """An uninitialised array that begins at a cache line."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size].view(dtype).reshape(shape)
