"""Files of named arrays: safetensors, or NumPy's npz; never pickle.

A file may come from anybody. What it says about sizes is compared with the bytes that are there
before memory is taken, and whatever is wrong with it is a ValueError that names it.
"""

import contextlib
import math
import os

import numpy as np

from ..arguments import FLOATS, floats, is_float

# A compressed npz may grow to so many times the file's size. Weights hardly shrink; a bomb does.
EXPANSION = 16
# Characters of a npy header, which NumPy gives to Python's parser. Those of weights have 118; a
# deep expression of thousands exhausts the parser.
HEADER = 512


def read_tensors(path, prefix=""):
    """Arrays of a file by name.

    Parameters
    ----------
    path : str or path-like
        Ends in ``.safetensors`` (https://github.com/huggingface/safetensors, needs the extra
        `models`) or ``.npz`` (as `numpy.savez` writes it).
    prefix : str
        Read only what has a name that starts so.

    Returns
    -------
    dict of str to ndarray
        Of float16, bfloat16, float32 or float64.

    Raises
    ------
    ValueError
        The suffix is another one, or the file is damaged, inconsistent or hostile, or holds
        something else than floats. Not more memory is taken than `EXPANSION` times the file.
    OSError
        The file cannot be opened.
    ImportError
        `safetensors` is not installed.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/w.npz", {"in.weight": np.eye(2), "out.weight": np.ones(2)})
    ...     read_tensors(f"{folder}/w.npz", prefix="out.")
    {'out.weight': array([1., 1.])}
    """
    read, _ = _format_of(path)
    with open(path, "rb") as file, _blame(path):
        return read(file, prefix)


def write_tensors(path, tensors):
    """Write arrays by name to a file beside `path`, complete, and then give it that name.

    Whoever opens `path` finds the file from before, or all of the new one.

    Parameters
    ----------
    path : str or path-like
        As in `read_tensors`.
    tensors : dict of str to array_like
        Of float16, float32 or float64; in safetensors bfloat16 too.

    Raises
    ------
    TypeError
        An array holds something else than floats.
    ValueError
        The suffix is another one.
    OSError
        The file cannot be written.
    ImportError
        `safetensors` is not installed.

    Examples
    --------
    See `read_tensors`.
    """
    _, write = _format_of(path)
    tensors = {
        name: np.asarray(floats(name, x, least=()), order="C") for name, x in tensors.items()
    }
    path = os.path.realpath(path)
    beside = f"{path}.{os.urandom(4).hex()}.tmp"
    try:
        with open(beside, "xb") as file:
            write(file, tensors)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
        raise


def _format_of(path):
    """The functions that read and write this kind of file."""
    for suffix, functions in _FORMATS.items():
        if os.fspath(path).endswith(suffix):
            return functions
    raise ValueError(f"path is {os.fspath(path)!r}, expected it to end in {' or '.join(_FORMATS)}")


@contextlib.contextmanager
def _blame(what):
    """Whatever a library says about somebody else's bytes is a ValueError that names them."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {error}") from None


def _read_npz(file, prefix):
    import zipfile  # here and below, not above: time that `import mha_fast` need not pay

    archive = zipfile.ZipFile(file)
    size, declared = os.fstat(file.fileno()).st_size, sum(m.file_size for m in archive.infolist())
    if declared > EXPANSION * size:
        raise ValueError(
            f"{size} bytes hold {declared}, expected at most {EXPANSION} times as many"
        )
    tensors = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if not name.startswith(prefix):
            continue
        with _blame(f"tensor {name!r}"):
            if name in tensors:
                raise ValueError("is there twice")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("is compressed in another way than by deflate")
            with archive.open(member) as data:
                _check_npy_header(data, member.file_size)
            with archive.open(member) as data:
                tensors[name] = np.lib.format.read_array(data, allow_pickle=False)
    return tensors


def _check_npy_header(data, size):
    """`numpy.lib.format.read_array` takes the memory that a header asks for: look before."""
    version = np.lib.format.read_magic(data)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(data, max_header_size=HEADER)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(data, max_header_size=HEADER)
    if not is_float(dtype):
        raise ValueError(f"has dtype {dtype}, expected {FLOATS}")
    there = size - data.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != there:
        raise ValueError(f"has shape {shape} and dtype {dtype}, but {there} bytes")


def _write_npz(file, tensors):
    for name, x in tensors.items():
        if x.dtype.kind != "f":
            raise TypeError(f"{name} has dtype {x.dtype}, which npz cannot hold: use safetensors")
    np.savez(file, **tensors)


def _read_safetensors(file, prefix):
    with _safetensors().safe_open(file.name, framework="np") as tensors:
        names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118
        for name in names:
            dtype = tensors.get_slice(name).get_dtype()
            if dtype not in ("F16", "BF16", "F32", "F64"):
                raise ValueError(f"tensor {name!r}: has dtype {dtype}, expected {FLOATS}")
        return {name: tensors.get_tensor(name) for name in names}


def _write_safetensors(file, tensors):
    file.write(_safetensors().numpy.save(tensors))


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        message = 'safetensors is not installed: pip install "mha_fast[models]", or use .npz'
        raise ImportError(message) from error
    return safetensors


_FORMATS = {
    ".safetensors": (_read_safetensors, _write_safetensors),
    ".npz": (_read_npz, _write_npz),
}
