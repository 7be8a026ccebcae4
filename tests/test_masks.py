"""Which keys a row may see: masks against drawn matrices, and against each other."""

import itertools
from textwrap import dedent

import numpy as np
import oracle
import pytest
import sizes
from judge import assert_accurate, assert_same
from options import INTERVALS, OPTIONS, PAIRS, PLAIN, pair_of
from sizes import KEY_BLOCK, additive, qkv, random_mask

from mha_fast import attention, reference

INF = float("inf")


def drawing(text):
    """(seqlen_q, seqlen_k) bool of a drawing, or one for each batch row."""
    pictures = dedent(text).strip().split("\n\n")
    rows = [[line.split() for line in p.split("\n")] for p in pictures]
    seen = np.array(rows) == "x"
    return seen[0] if len(seen) == 1 else seen


# Options and what they must show. Blank lines part the rows of a batch.
DRAWN = [
    ({}, "x x x \n x x x"),
    ({"causal": True}, "x . . \n x x . \n x x x"),
    ({"causal": True}, "x x x . \n x x x x"),
    ({"causal": True}, ". . \n . . \n x . \n x x"),
    ({"causal": True}, "x x x x x"),
    ({"causal": True, "q_offset": 0}, "x . . . \n x x . . \n x x x ."),
    ({"causal": True, "q_offset": 0}, "x . \n x x \n x x"),
    ({"causal": True, "q_offset": 2}, "x x x . \n x x x x \n x x x x"),
    ({"causal": True, "q_offset": -1}, ". . . \n x . . \n x x ."),
    ({"causal": True, "q_offset": -9}, ". . . \n . . ."),
    ({"causal": True, "q_offset": 2**53}, "x x \n x x"),
    ({"window": (0, 0)}, "x . . \n . x . \n . . x"),
    ({"window": (1, 0)}, "x . . . \n x x . . \n . x x . \n . . x x"),
    ({"window": (0, 1)}, "x x . \n . x x \n . . x"),
    ({"window": (1, 1)}, ". x x x \n . . x x"),
    ({"window": (None, 0)}, "x x . \n x x x"),
    ({"window": (1, None)}, "x x x x \n x x x x \n . x x x \n . . x x"),
    ({"window": (None, None)}, "x x \n x x"),
    ({"window": [1, 2**60]}, ". x x x \n . . x x"),
    ({"window": (0, 1), "q_offset": 0}, "x x . . \n . x x ."),
    ({"window": (1, 0), "q_offset": -2}, ". . \n . . \n x . \n x x"),
    ({"window": (1, 5), "causal": True}, ". x x . \n . . x x"),
    ({"window": (0, 0), "q_offset": 3}, ". . \n . ."),
    ({"kv_lengths": 2}, "x x . . \n x x . ."),
    ({"kv_lengths": 0}, ". . \n . ."),
    ({"kv_lengths": 3, "causal": True}, "x x . . . \n x x x . ."),
    ({"kv_lengths": 1, "causal": True}, ". . . \n . . . \n x . ."),
    ({"kv_lengths": 2, "causal": True, "q_offset": 1}, "x x . \n x x ."),
    ({"kv_lengths": 3, "window": (1, 0)}, "x x . . \n . x x ."),
    ({"kv_lengths": [1, 3]}, "x . . \n x . . \n\n x x x \n x x x"),
    (
        {"kv_lengths": [1, 3, 4], "causal": True},
        ". . . . \n x . . . \n\n x x . . \n x x x . \n\n x x x . \n x x x x",
    ),
    (
        {"q_offset": [0, 2], "causal": True},
        "x . . . \n x x . . \n\n x x x . \n x x x x",
    ),
    (
        {"q_offset": [0, 1], "kv_lengths": [2, 1], "window": (0, None)},
        "x x . \n . x . \n\n . . . \n . . .",
    ),
]


def seen_by(function, shape, **options):
    """The keys that get weight where all scores are equal; values are unit vectors."""
    *batch, seqlen_q, seqlen_k = shape
    q = np.zeros((*batch, 1, seqlen_q, 1), np.float32)
    k = np.zeros((*batch, 1, seqlen_k, 1), np.float32)
    unit = np.eye(seqlen_k, dtype=np.float32)
    v = np.broadcast_to(unit, (*batch, 1, *unit.shape))
    return function(q, k, v, **options).squeeze(-3)


@pytest.mark.parametrize("function", [attention, reference.attention])
@pytest.mark.parametrize(("options", "text"), DRAWN, ids=str)
def test_mask_is_as_drawn(function, options, text):
    expected = drawing(text)
    weights = seen_by(function, expected.shape, **options)
    count = expected.sum(axis=-1, keepdims=True)
    assert np.array_equal(weights > 0, expected)
    assert_same(weights, np.divide(expected, np.maximum(count, 1), dtype=np.float32))


@pytest.mark.parametrize(("options", "text"), DRAWN, ids=str)
def test_oracle_draws_the_same(options, text):
    expected = drawing(text)
    seen = oracle.visible(*expected.shape[-2:], **options).squeeze(-3)
    assert np.array_equal(np.broadcast_to(seen, expected.shape), expected)


def test_canary_a_mask_off_by_one_is_caught():
    weights = seen_by(attention, (3, 3), causal=True, q_offset=1)
    assert not np.array_equal(weights > 0, drawing(DRAWN[1][1]))


STRUCTURES = [(a, b) for a, b in PAIRS if {a, b} <= set(INTERVALS)]
STRUCTURES += [(name, name) for name in INTERVALS]


@pytest.mark.parametrize("names", STRUCTURES, ids=" and ".join)
def test_structure_equals_the_bool_mask_that_says_the_same(isa, real, names):
    for step in (-1, 0, 1):
        seqlen_q, seqlen_k = sizes.tile(isa, real) + step, KEY_BLOCK + 66 + step
        q, k, v = qkv(seqlen_q, seqlen_k, 5, heads=6, kv_heads=2, dtype=real)
        options = pair_of(names, q, k, v)
        result = attention(q, k, v, return_lse=True, **options)
        mask = oracle.visible(seqlen_q, seqlen_k, **options)
        assert_same(result, attention(q, k, v, mask, return_lse=True))
        assert_accurate(result, q, k, v, **options)


@pytest.mark.parametrize("size", [1, *sizes.PRIMES, *sizes.around(KEY_BLOCK)])
def test_random_masks_are_accurate(isa, real, size):
    q, k, v = qkv(size, 2 * KEY_BLOCK + 1, 5, heads=2, kv_heads=1, dtype=real)
    mask = random_mask(2, size, 2 * KEY_BLOCK + 1, visible=0.3)
    result = attention(q, k, v, mask, return_lse=True)
    assert_accurate(result, q, k, v, mask)
    hidden = np.where(mask, 0, -INF).astype(real)
    assert_same(result, attention(q, k, v, hidden, return_lse=True))
    assert_same(result, attention(q, k, v, bias=hidden, return_lse=True))


PATTERNS = list(itertools.product([False, True], repeat=4))
MASK_DTYPES = [np.dtype(bool), *sizes.DTYPES]


def pattern_of(shape, pattern):
    return [1 if single else n for n, single in zip(shape, pattern, strict=True)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "".join("-1"[i] for i in p))
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_mask_broadcasts_in_every_pattern(isa, real, pattern, mask_dtype):
    q, k, v = qkv(19, KEY_BLOCK + 9, 5, heads=4, kv_heads=2, dtype=real)
    shape = (2, 4, 19, KEY_BLOCK + 9)
    mask = random_mask(*pattern_of(shape, pattern), seed=1)
    if mask_dtype.kind != "b":
        mask = additive(mask, mask_dtype)
    full = np.broadcast_to(mask, shape)
    result = attention(q, k, v, full.copy(), return_lse=True)
    assert_accurate(result, q, k, v, full)
    apart = np.repeat(mask, 3, axis=-1)[..., ::3]
    trimmed = mask
    while trimmed.ndim and trimmed.shape[0] == 1:
        trimmed = trimmed[0]
    for view in (mask, full, apart, np.asfortranarray(mask), trimmed):
        assert_same(result, attention(q, k, v, view, return_lse=True))


@pytest.mark.parametrize("bias_dtype", sizes.DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_mask_and_bias_add_up(isa, real, mask_dtype, bias_dtype):
    q, k, v = qkv(19, KEY_BLOCK + 9, 5, dtype=real)
    mask = random_mask(19, KEY_BLOCK + 9, visible=0.5)
    mask[3] = False
    if mask_dtype.kind != "b":
        mask = additive(mask, mask_dtype)
    bias = additive(random_mask(2, 1, KEY_BLOCK + 9, seed=2), bias_dtype, seed=3)
    result = attention(q, k, v, mask, bias=bias, return_lse=True)
    assert_accurate(result, q, k, v, mask, bias=bias)


def test_a_key_hidden_by_the_mask_stays_hidden_under_any_bias(isa, real):
    q, k, v = qkv(3, 7, dtype=real)
    mask = np.array([[True] * 7, [False] * 7, [False] * 6 + [True]])
    bias = sizes.random(3, 7, dtype=real)
    out, lse = attention(q, k, v, mask, bias=bias, return_lse=True)
    assert (out[..., 1, :] == 0).all() and (lse[..., 1] == -INF).all()
    assert_accurate((out, lse), q, k, v, mask, bias=bias)


def test_mask_and_structure_hide_together(isa, real):
    q, k, v = qkv(67, 2 * KEY_BLOCK, 5, dtype=real)
    mask = additive(random_mask(67, 2 * KEY_BLOCK, visible=0.5), real)
    options = {"causal": True, "window": (150, 0), "kv_lengths": [300, 2 * KEY_BLOCK]}
    result = attention(q, k, v, mask, return_lse=True, **options)
    assert_accurate(result, q, k, v, mask, **options)


@pytest.mark.parametrize("mask_dtype", sizes.DTYPES, ids=str)
def test_row_of_the_lowest_finite_number_is_a_mean(isa, real, mask_dtype):
    q, k, v = qkv(5, 13, dtype=real)
    mask = np.zeros((5, 13), mask_dtype)
    mask[0] = sizes.lowest(mask_dtype)
    mask[1, 1:] = sizes.lowest(mask_dtype)
    out, lse = attention(q, k, v, mask, return_lse=True)
    assert_accurate(out[:, :, 1:2], q[:, :, 1:2], k[:, :, :1], v[:, :, :1])
    rest = q[:, :, 2:]
    assert_accurate((out[:, :, 2:], lse[:, :, 2:]), rest, k, v)
    assert np.isfinite(lse).all()
    if mask_dtype == np.float16:  # its lowest number does not drown a score
        assert_accurate((out, lse), q, k, v, mask)
    else:
        assert_same(out[:, :, :1], attention(q, k, v, scale=0)[:, :, :1])
        lowest = max(sizes.lowest(mask_dtype), sizes.lowest(real))
        assert (lse[:, :, 0] < lowest / 2).all()


NOTHING_SEEN = [
    {"mask": np.zeros((19, 201), bool)},
    {"mask": np.zeros((1, 1), bool)},
    {"mask": np.full((19, 1), -INF, np.float16)},
    {"bias": np.full((1, 201), -INF, np.float32)},
    {"kv_lengths": 0},
    {"q_offset": -50, "causal": True},
    {"q_offset": 500, "window": (3, None)},
]


@pytest.mark.parametrize("hide", NOTHING_SEEN, ids=lambda o: "-".join(o))
def test_row_that_sees_no_key_is_zero_under_every_option(isa, dtype, hide):
    q, k, v = qkv(19, 201, dtype=dtype)
    for row in (PLAIN, *OPTIONS.values()):
        options = row(q, k, v) | hide
        result = attention(q, k, v, return_lse=True, return_weights=True, **options)
        assert_same(result.out, np.zeros_like(result.out))
        assert_same(result.weights, np.zeros_like(result.weights))
        assert_accurate(result, q, k, v, **options)  # the lse: -inf, or the sink


def test_rows_that_see_no_key_have_an_lse_of_minus_infinity():
    q, k, v = qkv(19, 201)
    for hide in NOTHING_SEEN:
        assert (attention(q, k, v, return_lse=True, **hide).lse == -INF).all()


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_empty_leading_blocks_change_nothing(isa, real, blocks, extra):
    hidden, seqlen_q = KEY_BLOCK * blocks, 13
    q, k, v = qkv(seqlen_q, hidden + KEY_BLOCK + 10, 5, dtype=real)
    mask = np.zeros((seqlen_q, k.shape[-2]), bool)
    mask[:, hidden + extra :] = True
    options = {"window": (KEY_BLOCK + 9 - extra - seqlen_q, None)}
    result = attention(q, k, v, mask, return_lse=True)
    assert_accurate(result, q, k, v, mask)
    assert_same(result, attention(q, k, v, np.where(mask, 0, -INF), return_lse=True))
    tail = (q, k[:, :, hidden:], v[:, :, hidden:], mask[:, hidden:])
    assert_same(result, attention(*tail, return_lse=True))
    narrow = attention(q, k, v, return_lse=True, **options)
    assert_accurate(narrow, q, k, v, **options)
    tail = attention(q, *tail[1:3], return_lse=True, **options)
    assert_same(narrow, tail)
