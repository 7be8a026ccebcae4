"""One row, one answer: equal to the bit whatever is computed beside it, and how."""

from functools import partial

import numpy as np
import pytest
import sizes
from judge import assert_same
from options import PLAIN, cut
from sizes import KEY_BLOCK, qkv

from mha_fast import attention

SEQLEN_Q, SEQLEN_K = 131, 2 * KEY_BLOCK + 9


def arrays(dtype=np.float32):
    """Query heads in groups of two, so that rows of two heads share a tile."""
    return qkv(SEQLEN_Q, SEQLEN_K, 17, 9, heads=4, kv_heads=2, dtype=dtype)


def part(results, at):
    """The same part of each result."""
    return type(results)(*(x[at] for x in results))


def test_bits_are_those_of_one_thread(isa, option):
    repeat = 1 if isa == "generic" else 8  # work enough for eight threads
    q, k, v = (np.concatenate([x] * repeat, axis=1) for x in arrays())
    options = option(q, k, v)
    expected = attention(q, k, v, threads=1, return_lse=True, **options)
    for threads in range(2, 9):
        result = attention(q, k, v, threads=threads, return_lse=True, **options)
        assert_same(result, expected, f"{threads} threads and one")


FEW_ROWS = sorted({1, *sizes.around(*sizes.FEW.values()), 65})


@pytest.mark.parametrize("seqlen_q", FEW_ROWS)
def test_keys_split_among_threads_change_no_bit(isa, seqlen_q, option):
    blocks = 60 if isa != "generic" else 20 if seqlen_q < 65 else 6
    seqlen_k = blocks * KEY_BLOCK + 9
    q, k, v = qkv(seqlen_q, seqlen_k, 64, 128, batch=(), heads=3, kv_heads=1)
    options = option(q, k, v)
    expected = attention(q, k, v, threads=1, return_lse=True, **options)
    for threads in (2, 3, 4, 5, 8) if option is PLAIN else (2, 3, 8):
        result = attention(q, k, v, threads=threads, return_lse=True, **options)
        assert_same(result, expected, f"{threads} threads and one")
    if isa != "generic":
        last = slice(seqlen_q - 1, seqlen_q)
        kept = cut(options, "q", last, q, k, v)
        alone = attention(q[:, last], k, v, threads=3, return_lse=True, **kept)
        assert_same(alone, part(expected, np.s_[:, last]))


def test_bits_are_those_of_the_last_call(isa, option):
    q, k, v = arrays()
    options = option(q, k, v)
    expected = attention(q, k, v, return_lse=True, **options)
    for _ in range(20 if option is PLAIN else 7):
        assert_same(attention(q, k, v, return_lse=True, **options), expected)


def test_bits_are_those_of_every_isa(dtype, option):
    q, k, v = arrays(dtype)
    call = partial(attention, q, k, v, return_lse=True, **option(q, k, v))
    (_, first), *others = sizes.on_every_isa(call)
    for name, result in others:
        assert_same(result, first, name)


def test_batch_row_alone_has_the_bits_of_its_batch(isa, real, option):
    q, k, v = arrays(real)
    options = option(q, k, v)
    together = attention(q, k, v, return_lse=True, **options)
    for b in (0, 1):
        row = slice(b, b + 1)
        kept = cut(options, "b", row, q, k, v)
        alone = attention(q[row], k[row], v[row], return_lse=True, **kept)
        assert_same(alone, part(together, row))


def test_heads_apart_have_the_bits_of_heads_together(isa, real, option):
    q, k, v = arrays(real)
    options = option(q, k, v)
    together = attention(q, k, v, return_lse=True, **options)
    for head in range(4):
        one, kv = np.s_[:, head : head + 1], [head // 2]
        kept = cut(options, "h", one[1], q, k, v)
        alone = attention(q[one], k[:, kv], v[:, kv], return_lse=True, **kept)
        assert_same(alone, part(together, one))


def test_query_rows_split_at_any_index_have_the_same_bits(isa, option):
    q, k, v = arrays()
    options = option(q, k, v)
    together = attention(q, k, v, return_lse=True, **options)
    step = 9 if isa == "generic" else 2
    for at in range(1, SEQLEN_Q, step):
        for rows in (slice(0, at), slice(at, SEQLEN_Q)):
            kept = cut(options, "q", rows, q, k, v)
            alone = attention(q[:, :, rows], k, v, return_lse=True, **kept)
            assert_same(alone, part(together, np.s_[:, :, rows]), f"cut at {at}")


def test_single_query_rows_have_the_bits_of_all(isa, real, option):
    q, k, v = arrays(real)
    options = option(q, k, v)
    together = attention(q, k, v, return_lse=True, **options)
    for i in range(0, SEQLEN_Q, 7 if isa == "generic" else 1):
        row = np.s_[:, :, i : i + 1]
        kept = cut(options, "q", row[2], q, k, v)
        alone = attention(q[row], k, v, return_lse=True, **kept)
        assert_same(alone, part(together, row), f"row {i}")


def test_token_by_token_has_the_bits_of_one_causal_call(isa, real):
    q, k, v = qkv(SEQLEN_K, SEQLEN_K, 5, batch=(), dtype=real)
    together = attention(q, k, v, causal=True)
    for n in range(1, SEQLEN_K + 1, 13 if isa == "generic" else 1):
        alone = attention(q[:, n - 1 : n], k[:, :n], v[:, :n], causal=True)
        assert_same(alone[:, 0], together[:, n - 1], f"token {n}")


LENGTHS = sorted({1, 101, *sizes.around(KEY_BLOCK, 2 * KEY_BLOCK)})


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("padding", [1, 13, KEY_BLOCK + 1])
def test_trailing_padding_masked_equals_trimmed(isa, real, length, padding):
    q, k, v = qkv(19, length + padding, 5, dtype=real)
    k, v = k * 1e6, v * 1e6  # the padding would show
    trimmed = attention(q, k[:, :, :length], v[:, :, :length], return_lse=True)
    visible = np.arange(length + padding) < length
    float_mask = np.where(visible, 0, -np.inf).astype(real)
    for options in (
        {"mask": visible},
        {"mask": float_mask},
        {"bias": float_mask},
        {"kv_lengths": length},
        {"kv_lengths": [length, length]},
    ):
        assert_same(attention(q, k, v, return_lse=True, **options), trimmed)


def test_padding_of_the_queries_changes_no_bit(isa, real):
    q, k, v = arrays(real)
    padded = np.concatenate([q, np.full_like(q[:, :, :5], np.nan)], axis=2)
    result = attention(padded, k, v)
    assert_same(result[:, :, :SEQLEN_Q], attention(q, k, v))


def test_asking_for_the_lse_changes_no_bit(isa, dtype, option):
    q, k, v = arrays(dtype)
    options = option(q, k, v)
    result = attention(q, k, v, return_lse=True, **options)
    assert_same(attention(q, k, v, **options), result.out)


def test_a_term_of_zeros_changes_no_bit(isa, real, option):
    q, k, v = arrays(real)
    options = option(q, k, v)
    expected = attention(q, k, v, return_lse=True, **options)
    for name in {"mask", "bias"} - set(options):
        zeros = {name: np.zeros((SEQLEN_Q, SEQLEN_K), real)}
        result = attention(q, k, v, return_lse=True, **options, **zeros)
        assert_same(result, expected)


def test_stale_scratch_memory_changes_no_bit(isa, real):
    q, k, v = arrays(real)
    expected = attention(q, k, v, causal=True)
    poison = [np.full_like(x, np.nan) for x in (q, k, v)]
    attention(*poison, threads=1)
    attention(*poison)
    assert_same(attention(q, k, v, causal=True), expected)


def test_canary_one_unit_in_the_last_place_is_caught():
    q, k, v = arrays()
    out = attention(q, k, v)
    moved = out.copy()
    moved[1, 2, 3, 4] = np.nextafter(moved[1, 2, 3, 4], 9)
    with pytest.raises(AssertionError, match=r"1 of .* differ, .* \(1, 2, 3, 4\)"):
        assert_same(moved, out)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(np.float32([-0.0]), np.float32([0.0]))
