"""explain: what it says of a call is what the call does."""

import sys

import numpy as np
import oracle
import pytest
import sizes
from sizes import KEY_BLOCK, qkv

from mha_fast import _core, explain

MEASURED = """
import ctypes, numpy as np, mha_fast
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks "
                "fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
def in_use():
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd
q = np.ones((2, ROWS, DIM), np.dtype(DTYPE))
k, out = np.ones((2, 3000, DIM), q.dtype), np.empty_like(q)
before = in_use()
mha_fast.attention(q, k, k, out=out, threads=1)
print(in_use() - before, mha_fast.explain(q, k, k, threads=1).scratch_bytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc's mallinfo2")
@pytest.mark.parametrize("rows", [1, 500])
@pytest.mark.parametrize("dim", [64, 257])
@pytest.mark.parametrize("isa", _core.isa_names())
def test_scratch_bytes_are_those_that_a_thread_takes(output_of, real, isa, rows, dim):
    script = f"ROWS, DIM, DTYPE = {rows}, {dim}, {real.name!r}\n{MEASURED}"
    taken, said = map(int, output_of(script, MHA_FAST_ISA=isa).split())
    assert said <= taken < said + 4 * 2**12  # the allocator's own, and pages


STRUCTURES = [{}, {"causal": True}, {"window": (100, 0)}, {"kv_lengths": [KEY_BLOCK, 0]}]


@pytest.mark.parametrize("options", STRUCTURES, ids=str)
def test_blocks_visited_are_those_that_some_row_sees(isa, real, options):
    seqlen_q, seqlen_k = 131, 5 * KEY_BLOCK + 9
    q, k, v = qkv(seqlen_q, seqlen_k, 8, heads=1, dtype=real)
    plan = explain(q, k, v, **options)
    seen = oracle.visible(seqlen_q, seqlen_k, **options)
    seen = np.broadcast_to(seen, (2, 1, seqlen_q, seqlen_k))[:, 0]
    tile, count = sizes.tile(isa, real), 0
    for rows in (seen[b, i : i + tile] for b in range(2) for i in range(0, seqlen_q, tile)):
        keys = np.flatnonzero(rows.any(axis=0))
        count += 0 if keys.size == 0 else keys[-1] // KEY_BLOCK - keys[0] // KEY_BLOCK + 1
    assert plan.blocks_visited == count
    assert plan.blocks == plan.tiles * 6
    assert plan.skipped == 1 - count / plan.blocks


def test_plan_says_layout_threads_and_tasks(isa):
    q, k, v = qkv(1, 200 * KEY_BLOCK, 64, batch=(), heads=1)
    few = explain(q, k, v, threads=2)
    assert few.isa == isa and few.layout == "keys in lanes"
    assert few.threads == 2 and few.tasks > few.tiles == 1 and few.record_bytes > 0
    alone = explain(q, k, v, threads=1)
    assert (alone.threads, alone.tasks, alone.record_bytes) == (1, 1, 0)
    many = explain(*qkv(300, 300, 64), threads=1)
    assert many.layout == "queries in lanes" and many.tasks == many.tiles
    assert many.rows_per_tile == sizes.tile(isa, np.float32)
    small = explain(*qkv(3, 5, 8))
    assert small.threads == 1


def test_notes_name_what_costs_more_than_it_has_to():
    q, k, v = qkv(5, 7, 8)
    assert explain(q, k, v, np.ones((5, 7), bool), kv_lengths=[3, 7]).notes == (
        "kv_lengths is converted before the call: list",
    )
    notes = explain(q.tolist(), k.astype(np.float16), np.asfortranarray(v)).notes
    assert "q is converted before the call: list" in notes
    assert "k is float16, computed in float64: converted block by block" in notes
    notes = explain(q, k, np.asfortranarray(v)).notes
    assert notes == (f"v's last axis has stride {2 * 2 * 7 * 4}: read through copies of blocks",)
    half = explain(*(x.astype(np.float16) for x in (q, k, v))).notes
    assert "out is rounded from float32 to float16" in half


def test_plan_prints_in_lines_and_notes():
    plan = explain(*qkv(300, 300, 64, dtype=np.float16), causal=True)
    text = str(plan)
    assert f"{plan.blocks_visited} of {plan.blocks} visited" in text
    assert text.count("note ") == len(plan.notes) == 3


def test_empty_and_bad_arguments_are_as_in_attention():
    q, k, v = qkv(0, 7, 8)
    assert explain(q, k, v).tiles == 0 and explain(q, k, v).skipped == 0
    with pytest.raises(TypeError, match="causal is 1, expected True or False"):
        explain(*qkv(5, 7), causal=1)
    with pytest.raises(TypeError, match="is_causal"):
        explain(*qkv(5, 7), is_causal=True)


def test_canary_a_block_too_many_is_noticed(isa):
    q, k, v = qkv(5, 3 * KEY_BLOCK, 8, heads=1)
    assert explain(q, k, v).blocks_visited != explain(q, k, v, window=(3, 3)).blocks_visited
