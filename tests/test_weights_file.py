"""Files of weights: round trips, whole or not at all, and files that lie."""

import io
import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import sizes
from judge import assert_same

from mha_fast import MultiHeadAttention
from mha_fast.model.weights_file import EXPANSION, read_tensors, write_tensors

MEBIBYTE = 2**20
FLOATS = "expected float16, bfloat16, float32 or float64"


@pytest.fixture(params=[".npz", ".safetensors"])
def suffix(request):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="needs the extra `models`")
    return request.param


def some_tensors(dtype=np.float32):
    return {
        "a.weight": sizes.random(3, 5, dtype=dtype),
        "a.bias": sizes.random(5, dtype=dtype),
        "b/../c": sizes.random(2, 0, dtype=dtype),
        "name with spaces, \u00e9": sizes.random(dtype=dtype),
    }


@pytest.mark.parametrize("form", [np.asarray, np.asfortranarray, lambda x: x[..., ::-1]])
def test_tensors_come_back_equal_to_the_bit(tmp_path, suffix, dtype, form):
    if (suffix, dtype) == (".npz", sizes.BFLOAT16):
        with pytest.raises(TypeError, match="a.weight has dtype bfloat16, which npz cannot hold"):
            write_tensors(tmp_path / "w.npz", some_tensors(dtype))
        return
    tensors = {name: form(x) if x.ndim else x for name, x in some_tensors(dtype).items()}
    write_tensors(tmp_path / f"w{suffix}", tensors)
    for path in (tmp_path / f"w{suffix}", str(tmp_path / f"w{suffix}")):
        again = read_tensors(path)
        assert set(again) == set(tensors)
        for name, x in tensors.items():
            assert_same(again[name], x)
            assert again[name].flags.writeable
    assert os.listdir(tmp_path) == [f"w{suffix}"]


def test_only_what_has_the_prefix_is_read(tmp_path, suffix):
    write_tensors(tmp_path / f"w{suffix}", some_tensors())
    assert set(read_tensors(tmp_path / f"w{suffix}", "a.")) == {"a.weight", "a.bias"}
    assert read_tensors(tmp_path / f"w{suffix}", "z") == {}


def test_other_programs_read_what_is_written(tmp_path, suffix):
    tensors = some_tensors()
    write_tensors(tmp_path / f"w{suffix}", tensors)
    if suffix == ".npz":
        again = np.load(tmp_path / "w.npz", allow_pickle=False)
    else:
        from safetensors.numpy import load_file

        again = load_file(tmp_path / "w.safetensors")
    for name, x in tensors.items():
        assert_same(again[name], x)


def test_the_same_tensors_are_the_same_bytes(tmp_path, suffix):
    for name in ("one", "two"):
        write_tensors(tmp_path / f"{name}{suffix}", some_tensors())
    one, two = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two


def test_compressed_npz_is_read(tmp_path):
    tensors = some_tensors()
    np.savez_compressed(tmp_path / "w.npz", **tensors)
    for name, x in read_tensors(tmp_path / "w.npz").items():
        assert_same(x, tensors[name])


# ---- Whole or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_old_file_and_no_other(
    tmp_path, suffix, monkeypatch, step, error
):
    path = tmp_path / f"w{suffix}"
    write_tensors(path, some_tensors())
    before = path.read_bytes()

    def fails(*_):
        raise error("no space left")

    monkeypatch.setattr(step, fails)
    with pytest.raises(error, match="no space left"):
        write_tensors(path, {"other": np.ones(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_what_is_no_float_is_refused_before_anything_is_written(tmp_path, suffix):
    with pytest.raises(TypeError, match=f"ids has dtype int64, {FLOATS}"):
        write_tensors(tmp_path / f"w{suffix}", {"good": np.ones(3), "ids": np.arange(3)})
    assert os.listdir(tmp_path) == []


def test_a_link_goes_on_pointing_to_the_file(tmp_path, suffix):
    (tmp_path / f"latest{suffix}").symlink_to(tmp_path / f"w{suffix}")
    write_tensors(tmp_path / f"latest{suffix}", some_tensors())
    assert (tmp_path / f"latest{suffix}").is_symlink()
    assert set(read_tensors(tmp_path / f"w{suffix}")) == set(some_tensors())


# ---- Messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.npy", "w", "w.NPZ", "npz"])
def test_another_suffix_is_refused_for_reading_and_writing(tmp_path, name):
    message = rf"path is '.*{name}', expected it to end in \.safetensors or \.npz"
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / name, some_tensors())
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_opened_is_an_os_error(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_tensors(tmp_path / f"nowhere{suffix}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_tensors(tmp_path / "nowhere" / f"w{suffix}", some_tensors())
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        read_tensors(tmp_path / f"folder{suffix}")
    with pytest.raises(IsADirectoryError, match="folder"):
        write_tensors(tmp_path / f"folder{suffix}", some_tensors())
    assert os.listdir(tmp_path) == [f"folder{suffix}"]


def test_without_safetensors_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    (tmp_path / "w.safetensors").write_bytes(b"")
    message = r'pip install "mha_fast\[models\]", or use \.npz'
    with pytest.raises(ImportError, match=message):
        read_tensors(tmp_path / "w.safetensors")
    with pytest.raises(ImportError, match=message):
        write_tensors(tmp_path / "w.safetensors", some_tensors())
    assert os.listdir(tmp_path) == ["w.safetensors"]


# ---- Files that lie ------------------------------------------------------------------------------


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(3,), offsets=(0, 12), name="x"):
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


GOOD = bytes(12)
LIES_OF_SAFETENSORS = {  # None: in the words of the library
    "empty": (b"", None),
    "seven bytes": (bytes(7), None),
    "header longer than the file": (safetensors_bytes(entry(), GOOD, 2**31), None),
    "header of 2**64 - 1": (safetensors_bytes(entry(), GOOD, 2**64 - 1), None),
    "header cut": (safetensors_bytes(entry(), GOOD, 20), None),
    "no JSON": (safetensors_bytes(b"{]", GOOD), None),
    "deep JSON": (safetensors_bytes(b"[" * 10**6), None),
    "not UTF-8": (safetensors_bytes(b"\xff\xfe", GOOD), None),
    "data cut": (safetensors_bytes(entry(), GOOD[1:]), None),
    "data left over": (safetensors_bytes(entry(), GOOD + b"!"), None),
    "shape larger than its bytes": (safetensors_bytes(entry(shape=[4]), GOOD), None),
    "shape of 2**62": (safetensors_bytes(entry(shape=[2**31, 2**31]), GOOD), None),
    "product that wraps to 3": (safetensors_bytes(entry(shape=[3, 2**32, 2**32 + 1]), GOOD), None),
    "negative shape": (safetensors_bytes(entry(shape=[-3, -1]), GOOD), None),
    "offsets far away": (safetensors_bytes(entry(offsets=[2**40, 2**40 + 12]), GOOD), None),
    "offsets backwards": (safetensors_bytes(entry(offsets=[12, 0]), GOOD), None),
    "overlap": (safetensors_bytes(entry() | entry(name="y"), GOOD), None),
    "hole": (safetensors_bytes(entry() | entry(offsets=[24, 36], name="y"), GOOD * 3), None),
    "integers": (safetensors_bytes(entry("I32"), GOOD), f"tensor 'x': has dtype I32, {FLOATS}"),
    "8-bit floats": (safetensors_bytes(entry("F8_E4M3", [12]), GOOD), f"F8_E4M3, {FLOATS}"),
    "unknown dtype": (safetensors_bytes(entry("F31"), GOOD), None),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.", None),
}


def npy(descr="<f4", shape=(3,), data=GOOD, header=None):
    """The bytes of a member, with whatever its header claims."""
    text = header or repr({"descr": descr, "fortran_order": False, "shape": shape})
    text = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(*members, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def in_npz(**claims):
    return npz(("x.npy", npy(**claims)))


def patched(data, signature, offset, fmt, value):
    """With another number at an offset of the first record that begins so."""
    data = bytearray(data)
    struct.pack_into(fmt, data, data.index(signature) + offset, value)
    return bytes(data)


CENTRAL = b"PK\x01\x02"
BOMB = npz(("x.npy", npy(shape=(4 * MEBIBYTE,), data=bytes(16 * MEBIBYTE))), method=8)
LIES_OF_NPZ = {
    "empty": (b"", "not a zip file"),
    "no zip": (b"PK\x03\x04" + bytes(100), "not a zip file"),
    "cut": (in_npz()[:-30], "zip"),
    "shape of 4 TB": (
        in_npz(shape=(2**40,)),
        r"tensor 'x': has shape \(1099511627776,\) and .* 12",
    ),
    "shape of 2**200": (in_npz(shape=(2**100, 2**100)), "tensor 'x': has shape"),
    "shape whose product wraps to 3": (in_npz(shape=(3, 2**32, 2**32 + 1)), "tensor 'x': has sha"),
    "nothing of 2**70": (in_npz(shape=(0, 2**70), data=b""), "tensor 'x': "),
    "shape smaller than its bytes": (in_npz(shape=(2,)), r"shape \(2,\) and dtype float32, but 12"),
    "negative shape": (in_npz(shape=(-3, -1)), r"shape \(-3, -1\) and dtype float32, but 12"),
    "data cut": (in_npz(data=GOOD[1:]), r"shape \(3,\) and dtype float32, but 11 bytes"),
    "no shape": (in_npz(shape=None), "tensor 'x': "),
    "shape of strings": (in_npz(shape=("3",)), "tensor 'x': "),
    "header that is code": (in_npz(header="__import__('os').system('touch pwned')"), "tensor 'x'"),
    "deep header": (in_npz(header="-" * 500 + "1"), "tensor 'x': "),
    "deeper header": (in_npz(header="-" * 9000 + "1"), r"tensor 'x': .*length \(9002\) is large"),
    "long header": (in_npz(header=" " * 60000), r"tensor 'x': .*length \(60001\) is large"),
    "integers": (in_npz(descr="<i4"), f"tensor 'x': has dtype int32, {FLOATS}"),
    "objects": (in_npz(descr="|O"), f"tensor 'x': has dtype object, {FLOATS}"),
    "records": (in_npz(descr=[("a", "<f4")]), "tensor 'x': has dtype .*, expected"),
    "long doubles": (
        in_npz(descr="<f16", shape=()),
        f"has dtype .*, {FLOATS}",
    ),
    "unknown dtype": (in_npz(descr="<f5"), "tensor 'x': "),
    "no npy": (npz(("x.txt", b"hello")), "tensor 'x.txt': .*magic"),
    "unknown version": (npz(("x.npy", b"\x93NUMPY\x09\x00" + bytes(100))), "tensor 'x': "),
    "there twice": (npz(("x.npy", npy()), ("x", npy())), "tensor 'x': is there twice"),
    "bomb": (BOMB, f"bytes hold 16777.*, expected at most {EXPANSION} times as many"),
    "bzip2": (npz(("x.npy", npy()), method=zipfile.ZIP_BZIP2), "in another way than by deflate"),
    "lzma": (npz(("x.npy", npy()), method=zipfile.ZIP_LZMA), "in another way than by deflate"),
    "unknown method": (patched(in_npz(), CENTRAL, 10, "<H", 99), "in another way than by deflate"),
    "encrypted": (patched(in_npz(), CENTRAL, 8, "<H", 1), "tensor 'x': .*encrypted"),
    "size of 4 GB": (patched(in_npz(), CENTRAL, 24, "<I", 2**32 - 2), "bytes hold 4294967294"),
    "size smaller than it is": (patched(in_npz(), CENTRAL, 24, "<I", 80), "tensor 'x': "),
    "wrong checksum": (patched(in_npz(), CENTRAL, 16, "<I", 7), "tensor 'x': .*CRC"),
    "offset beyond the file": (patched(in_npz(), CENTRAL, 42, "<I", 2**31), "tensor 'x': "),
}


def assert_is_refused_without_memory(path, data, message=None):
    write_tensors(path, {})
    read_tensors(path)  # so that what is imported is not counted
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert peak < 4 * MEBIBYTE


@pytest.mark.parametrize("lie", LIES_OF_SAFETENSORS)
def test_lying_safetensors_file_is_a_value_error_before_memory_is_taken(tmp_path, lie):
    pytest.importorskip("safetensors", reason="needs the extra `models`")
    assert_is_refused_without_memory(tmp_path / "w.safetensors", *LIES_OF_SAFETENSORS[lie])
    assert not os.path.exists("pwned")


@pytest.mark.parametrize("lie", LIES_OF_NPZ)
def test_lying_npz_file_is_a_value_error_before_memory_is_taken(tmp_path, lie):
    assert_is_refused_without_memory(tmp_path / "w.npz", *LIES_OF_NPZ[lie])
    assert not os.path.exists("pwned")


class Payload:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_in_a_file_is_never_run(tmp_path, suffix):
    canary = str(tmp_path / "canary")
    np.savez(tmp_path / "w.npz", x=np.array([Payload(canary)], object))
    (tmp_path / "w.npz").rename(tmp_path / f"w{suffix}")
    with pytest.raises(ValueError, match=r"w\."):
        read_tensors(tmp_path / f"w{suffix}")
    assert not os.path.exists(canary)


def test_canary_a_pickle_that_is_run_leaves_its_file(tmp_path):
    np.savez(tmp_path / "w.npz", x=np.array([Payload(str(tmp_path / "canary"))], object))
    np.load(tmp_path / "w.npz", allow_pickle=True)["x"][0].close()
    assert (tmp_path / "canary").exists()


def test_canary_memory_that_a_file_asks_for_is_seen(tmp_path):
    data = npz(("x.npy", npy(shape=(MEBIBYTE,), data=bytes(4 * MEBIBYTE))))
    damaged = patched(data, CENTRAL, 16, "<I", 7)
    with pytest.raises(AssertionError, match="assert [0-9]+ < "):
        assert_is_refused_without_memory(tmp_path / "w.npz", damaged)


def mutations(data, count, seed):
    """Bytes flipped, cut out, cut off, doubled or overwritten by extreme numbers."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            at, length = int(rng.integers(len(mutant))), int(rng.integers(1, 9))
            kind = rng.integers(5)
            if kind == 0:
                mutant[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del mutant[at : at + length]
            elif kind == 2 and at > 8:
                del mutant[at:]
            elif kind == 3:
                mutant[at:at] = mutant[at : at + length]
            else:
                mutant[at : at + length] = rng.choice([b"\xff", b"\0", b"9"]) * length
        yield bytes(mutant)


def test_mutated_files_are_read_or_value_errors(tmp_path, suffix):
    layer = MultiHeadAttention(4, 2, add_bias_kv=True, seed=0)
    path = tmp_path / f"w{suffix}"
    layer.save(path)
    data, refused = path.read_bytes(), 0
    MultiHeadAttention.load(path, 2)  # so that what is imported is not counted
    tracemalloc.start()
    for mutant in mutations(data, 300, seed=1):
        path.write_bytes(mutant)
        try:
            MultiHeadAttention.load(path, 2)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 150
    assert peak < MEBIBYTE
