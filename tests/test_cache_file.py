"""A KVCache in a file: found again, read by other programs, and never trusted."""

import json

import numpy as np
import pytest
from judge import assert_same
from test_cache import cache_of, run, tokens

from mha_fast import KVCache, attention
from mha_fast.model.cache_file import HEADER


def written(path, count=50, **more):
    cache = cache_of(path=path, **more)
    _, k, v = tokens(count)
    cache.append(k, v)
    cache.flush()
    return cache


def test_a_cache_goes_on_in_the_file_it_left(tmp_path, dtype):
    path = tmp_path / "chat.cache"
    q, k, v = tokens(200, dtype)
    cache = cache_of(dtype, path=path, window=150)
    first = run(cache, q[:, :, :150], k, v, [100, 1])
    del cache
    again = KVCache.open(path)
    assert again.window == 150 and len(again) == 150 and again.dtype == dtype
    again.append(k[:, :, 150:], v[:, :, 150:])
    last = again.attention(q[:, :, 150:])
    whole = attention(q, k, v, causal=True, window=(150, 0))
    assert_same(np.concatenate([first, last], axis=2), whole)
    assert [x.name for x in tmp_path.iterdir()] == ["chat.cache"]


def test_saved_cache_is_equal_and_other_programs_read_it(tmp_path, dtype):
    numpy = pytest.importorskip("safetensors.numpy")
    q, k, v = tokens(50, dtype)
    cache = cache_of(dtype)
    cache.append(k, v, [50, 20])
    cache.save(tmp_path / "x.safetensors")
    read = numpy.load_file(tmp_path / "x.safetensors")
    for name, x in (("k", k), ("v", v)):
        assert_same(read[name][0], x[0])
        assert_same(read[name][1, :, :20], x[1, :, :20])
        assert (read[name][1, :, 20:] == 0).all(), "nothing else of our memory"
    assert read["lengths"].tolist() == [50, 20]
    opened = KVCache.open(tmp_path / "x.safetensors", "r")
    assert_same(opened.attention(q, q_offset=0), cache.attention(q, q_offset=0))


def test_selecting_and_forking_leave_a_file_of_their_own(tmp_path):
    cache = written(tmp_path / "a")
    other = cache.fork()
    cache.select([1])
    assert len(KVCache.open(tmp_path / "a").lengths) == 1
    assert len(other.lengths) == 2
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


def test_modes_of_opening(tmp_path):
    written(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    q, k, v = tokens(50)
    private = KVCache.open(tmp_path / "a", "c")
    private.append(k, v)
    assert len(private) == 100
    reader = KVCache.open(tmp_path / "a", "r")
    assert_same(reader.attention(q), attention(q, k, v, causal=True))
    with pytest.raises(ValueError, match="open for reading, expected mode 'r\\+' or 'c'"):
        reader.append(k, v)
    assert (tmp_path / "a").read_bytes() == before


def test_files_that_are_there_are_not_overwritten(tmp_path):
    cache = written(tmp_path / "a")
    with pytest.raises(FileExistsError):
        written(tmp_path / "a")
    with pytest.raises(ValueError, match="the cache's own file"):
        cache.save(tmp_path / "a")
    with pytest.raises(ValueError, match="mode is 'w', expected 'r\\+', 'r' or 'c'"):
        KVCache.open(tmp_path / "a", "w")
    with pytest.raises(FileNotFoundError):
        KVCache.open(tmp_path / "b")
    assert len(KVCache.open(tmp_path / "a")) == 50


def test_a_file_that_cannot_grow_leaves_the_old_one(tmp_path, monkeypatch):
    cache = written(tmp_path / "a")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KVCache, "_fill", disk_full)
    with pytest.raises(OSError, match="No space"):
        cache.append(*tokens(100)[1:])
    assert len(cache) == 50
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


def changed(header, **entry):
    name, value = next(iter(entry.items()))
    return header | {name: header[name] | value}


K = {"dtype": "F32", "shape": [2, 2, 64, 8]}
DAMAGE = {
    "empty": lambda raw, header: b"",
    "truncated header": lambda raw, header: raw[:1000],
    "truncated": lambda raw, header: raw[:-1],
    "huge header": lambda raw, header: b"\xff" * 8 + raw[8:],
    "no JSON": lambda raw, header: raw[:8] + b"{" * (HEADER - 8) + raw[HEADER:],
    "a list": lambda raw, header: [],
    "no metadata": lambda raw, header: {n: x for n, x in header.items() if n in "kv"},
    "another format": lambda raw, header: changed(header, __metadata__={"format": "pt"}),
    "more arrays": lambda raw, header: header | {"x": header["k"]},
    "unknown dtype": lambda raw, header: changed(header, k={"dtype": "I8"}),
    "integers": lambda raw, header: changed(header, k={"dtype": "I64", "shape": [2, 2, 64, 4]}),
    "negative": lambda raw, header: changed(header, k={"shape": [2, 2, -64, -8]}),
    "not integers": lambda raw, header: changed(header, k={"shape": [2, 2, 64, 8.0]}),
    "too large": lambda raw, header: changed(header, k={"shape": [2**30, 2**30, 2**30, 2**30]}),
    "overlapping": lambda raw, header: changed(header, k={"data_offsets": [0, 8192]}),
    "outside": lambda raw, header: changed(header, v={"data_offsets": [2**40, 2**40 + 5120]}),
    "other heads": lambda raw, header: changed(header, k={"shape": [1, 4, 64, 8]}),
    "three axes": lambda raw, header: changed(header, k={"shape": [4, 64, 8]}),
    "too long": lambda raw, header: raw[:HEADER] + (65).to_bytes(8, "little") + raw[HEADER + 8 :],
    "below zero": lambda raw, header: raw[:HEADER] + b"\xff" * 8 + raw[HEADER + 8 :],
    "forgotten more": lambda raw, h: raw[: HEADER + 16] + b"\x40" + raw[HEADER + 17 :],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("mode", ["r+", "r"])
def test_a_damaged_or_hostile_file_is_refused_by_name(tmp_path, damage, mode):
    written(tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    bad = damage(raw, json.loads(raw[8:HEADER]))
    if not isinstance(bad, bytes):
        bad = raw[:8] + json.dumps(bad).encode().ljust(HEADER - 8) + raw[HEADER:]
    (tmp_path / "a").write_bytes(bad)
    with pytest.raises(ValueError, match="a is no file of a KVCache: "):
        KVCache.open(tmp_path / "a", mode)
    assert (tmp_path / "a").read_bytes() == bad


def test_canary_an_untouched_file_is_opened(tmp_path):
    written(tmp_path / "a")
    assert len(KVCache.open(tmp_path / "a")) == 50
