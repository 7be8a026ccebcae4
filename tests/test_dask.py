"""mha_fast.dask: the bits of one call from any chunks, on threads and on a cluster."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import sizes
from judge import assert_same
from options import OPTIONS
from sizes import qkv

import mha_fast

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

from mha_fast.dask import PerformanceWarning, attention  # noqa: E402
from mha_fast.state import RUN  # noqa: E402

SEQLEN_K = 2 * RUN + 500
SHAPE = (2, 4, 700, 5)  # of q; k and v have 2 heads
NAMES = [name for name in OPTIONS if OPTIONS[name].argument not in ("dropout_p", "seed")]
CHUNKINGS = [
    (SHAPE, (2, 2, SEQLEN_K, 5)),
    ((1, 4, 700, 5), (1, 2, RUN, 5)),
    ((2, 2, 300, 5), (2, 1, 2 * RUN, 5)),
    ((1, 2, 1 + 699 // 3, 3), (1, 1, RUN, 2)),
    (SHAPE, (1, 1, 1000, 5)),
    ((2, (3, 1), 699, 5), (2, 2, 5000, 5)),
    ((1, 2, 700, 5), (2, 2, RUN, 5)),
    ((2, 4, 97, 1), (2, 1, 2 * RUN, 5)),
    ((2, 2, (1, 699), 5), (1, 2, (RUN, SEQLEN_K - RUN), 5)),
    ((1, 1, 350, 5), (1, 2, (2 * RUN, 500), 4)),
    ((2, 4, (350, 50, 300), 5), (1, 1, (1, 10, SEQLEN_K - 11), 5)),
    ((1, 4, 233, 2), (2, 2, SEQLEN_K - 1, 3)),
]


@pytest.fixture(autouse=True)
def quiet():
    """Chunks of keys are at odd places here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        yield


def arrays(dtype=np.float32):
    return qkv(700, SEQLEN_K, 5, batch=(2,), heads=4, kv_heads=2, dtype=dtype)


def chunked(arrays, chunkings):
    q, k, v = arrays
    of_q, of_k = chunkings
    return [da.from_array(x, chunks=c) for x, c in ((q, of_q), (k, of_k), (v, of_k))]


def assert_bits_of_one_call(found, expected):
    assert found.out.shape == expected.out.shape and found.out.dtype == expected.out.dtype
    assert found.lse.shape == expected.lse.shape and found.lse.dtype == expected.lse.dtype
    assert_same(found.out.compute(scheduler="sync"), expected.out)
    assert_same(found.lse.compute(scheduler="threads"), expected.lse)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (900, 3)}], ids=str)
@pytest.mark.parametrize("chunkings", CHUNKINGS, ids=str)
def test_bits_do_not_depend_on_chunks(chunkings, options):
    tensors = arrays()
    found = attention(*chunked(tensors, chunkings), return_lse=True, **options)
    assert_bits_of_one_call(found, mha_fast.attention(*tensors, return_lse=True, **options))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_the_bits_of_one_call(name):
    tensors = arrays()
    options = OPTIONS[name](*tensors)
    expected = mha_fast.attention(*tensors, return_lse=True, **options)
    for term in ("mask", "bias"):
        if term in options and options[term].shape[-1] > 1:
            options[term] = da.from_array(options[term], chunks=-1).rechunk({-1: 1000})
    found = attention(*chunked(tensors, CHUNKINGS[2]), return_lse=True, **options)
    assert_bits_of_one_call(found, expected)


@pytest.mark.parametrize("shapes", [
    ((40, 5), (3500, 5)), ((3, 40, 5), (3500, 5)), ((2, 40, 5), (2, 3500, 5)),
    ((2, 1, 4, 40, 5), (3, 2, 3500, 5)), ((4, 0, 5), (4, 3500, 5)), ((4, 40, 5), (4, 0, 5)),
], ids=str)  # fmt: skip
def test_ranks_and_empty_axes_are_those_of_attention(shapes, dtype):
    q, k = (sizes.random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    lazy = [da.from_array(x, chunks=-1) for x in (q, k, k)]
    found = attention(*lazy, return_lse=True, causal=True)
    assert_bits_of_one_call(found, mha_fast.attention(q, k, k, return_lse=True, causal=True))


def test_arrays_of_numpy_may_be_among_them():
    q, k, v = arrays()
    found = attention(q, da.from_array(k, chunks=(1, 1, RUN, 5)), v)
    assert isinstance(found, da.Array)
    assert_same(found.compute(), mha_fast.attention(q, k, v))


def tasks_of_states(array):
    return [key for key in array.dask if "-states" in key[0]]


def test_hidden_chunks_get_no_task():
    x = da.ones((1, 10 * RUN, 4), chunks=(1, RUN, 4))
    assert len(tasks_of_states(attention(x, x, x))) == 100
    assert len(tasks_of_states(attention(x, x, x, causal=True))) == 55
    assert len(tasks_of_states(attention(x, x, x, window=(RUN + 1, 0)))) == 10 + 9 + 8
    assert len(tasks_of_states(attention(x, x, x, kv_lengths=RUN + 1, q_offset=0))) == 20


def test_keys_at_odd_places_are_rechunked_with_a_warning():
    x = da.ones((1, 10_000, 4), chunks=(1, 2500, 4))
    with pytest.warns(PerformanceWarning, match="from 2500 keys a chunk to 3856: .* of 3072"):
        attention(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(x, x.rechunk((1, 2 * RUN, 4)), x)


def test_no_group_of_heads_is_cut():
    q, k = da.ones((8, 5, 4), chunks=(3, 5, 4)), da.ones((2, 9, 4), chunks=(1, 9, 4))
    assert attention(q, k, k).chunks[0] == (4, 4)


def test_nothing_is_computed_before_it_is_asked_for():
    def fails(block):
        raise AssertionError("computed")

    x = da.ones((2, 50, 4), dtype=np.float32).map_blocks(fails, meta=np.empty((0, 0, 0), "f4"))
    found = attention(x, x, x)
    assert found.shape == (2, 50, 4) and found.dtype == np.float32
    with pytest.raises(AssertionError, match="computed"):
        found.compute()


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "dropout_p is no option of mha_fast.dask.attention", {"dropout_p": 0.5}),
        (ValueError, r"mask has shape \(3, 3\), expected", {"mask": np.ones((3, 3), bool)}),
        (TypeError, "return_lse is 1, expected True or False", {"return_lse": 1}),
        (ValueError, "softcap is -1.0", {"softcap": -1}),
    ],
)
def test_mistakes_are_found_before_computing(error, message, options):
    x = da.ones((2, 50, 4))
    with pytest.raises(error, match=message):
        attention(x, x, x, **options)


def test_chunks_of_unknown_size_are_refused():
    x = da.ones((50, 4))
    unknown = x[x[:, 0] > 0]
    with pytest.raises(
        ValueError, match=r"k has chunks of unknown size: k.compute_chunk_sizes\(\)"
    ):
        attention(x, unknown, unknown)


def test_plain_functions_name_this_one():
    x = da.ones((2, 50, 4))
    for function in (mha_fast.attention, mha_fast.attention_vjp, mha_fast.AttentionState):
        with pytest.raises(
            TypeError, match=r"is a Dask array: mha_fast.dask.attention, or .\.comp"
        ):
            function(*[x] * (1 if function is mha_fast.AttentionState else 3))


# ---- A cluster -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    settings = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "400MB"}
    with (
        distributed.LocalCluster(**settings, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def results_held(dask_worker):
    return len(dask_worker.data)


def test_a_killed_worker_changes_no_bit(client):
    drawn = da.random.default_rng(0).standard_normal
    lazy = [drawn((4, n, 64), chunks=(1, RUN, 64)).astype("f4") for n in (8192, 4 * RUN, 4 * RUN)]
    tensors = [x.compute(scheduler="sync") for x in lazy]
    future = client.compute(attention(*lazy, causal=True))
    give_up = time.monotonic() + 20
    while sum(client.run(results_held).values()) < 10 and time.monotonic() < give_up:
        time.sleep(0.02)
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
    assert_same(future.result(timeout=120), mha_fast.attention(*tensors, causal=True))


def peak_memory():
    with open("/proc/self/status") as status:
        return 1024 * int(next(x for x in status if x.startswith("VmHWM")).split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_arrays_may_be_ten_times_a_workers_memory(client, tmp_path):
    """q, k, v and out of 1 GB each, through workers of 400 MB."""
    zarr = pytest.importorskip("zarr")
    tokens, chunk = 2**22, 16 * RUN
    drawn = da.random.default_rng(0).standard_normal
    source = drawn((tokens, 64), chunks=(chunk, 64)).astype("f4")
    names = ("q", "k", "v")
    for i, name in enumerate(names):
        (source + np.float32(i)).to_zarr(str(tmp_path / name), compressors=None)
    q, k, v = (da.from_zarr(str(tmp_path / name)) for name in names)
    attention(q, k, v, window=(255, 0)).to_zarr(str(tmp_path / "out"), compressors=None)
    assert max(client.run(peak_memory).values()) < 400e6
    q, k, v, out = (zarr.open(str(tmp_path / name), mode="r") for name in (*names, "out"))
    for row in (0, chunk, tokens - 1):
        keys = slice(max(row - 255, 0), row + 1)
        expected = mha_fast.reference.attention(q[row : row + 1], k[keys], v[keys])
        assert abs(out[row : row + 1] - expected).max() < 1e-5


def test_the_example_checks_a_row_and_tells_what_it_took(tmp_path):
    script = Path(__file__).resolve().parents[1] / "examples" / "million_tokens.py"
    command = [sys.executable, script, "--tokens", "60000", "--heads", "2", "--window", "500"]
    done = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tokens a second\nworker \d+: \d+ MB at most\n", done.stdout)
    off = float(re.search(r"row 45,000 is off by (\S+)", done.stdout)[1])
    assert 0 < off < 1e-6 and not list(tmp_path.iterdir())
    wrong = subprocess.run([*command[:-1], "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--window is 0, expected at least 1" in wrong.stderr
