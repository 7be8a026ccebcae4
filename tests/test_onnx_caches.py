"""ONNX's RotaryEmbedding and TensorScatter: what stands before Attention in a model."""

import numpy as np
import pytest
from judge import assert_same, assert_within, rounding
from sizes import BFLOAT16, random

pytest.importorskip("onnx", reason='pip install "mha_fast[onnx]"')

from onnx_models import HOSTILE, attend, packed, run  # noqa: E402


def turned(x, cos, sin, positions=None, **attributes):
    inputs = {"X": x, "cos_cache": cos, "sin_cache": sin}
    if positions is not None:
        inputs["position_ids"] = np.array(positions)
    return run("RotaryEmbedding", inputs, **attributes)


def tables(rows, half, dtype=np.float32):
    angles = random(rows, half, seed=7)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


X = random(2, 3, 5, 8)
COS, SIN = tables(10, 4)
AT = [[0, 1, 2, 3, 4], [9, 3, 3, 0, 5]]


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
def test_entries_turn_by_the_angle_of_their_position(dtype):
    """As complex numbers, in float64."""
    x, cos, sin = (a.astype(dtype) for a in (X, COS, SIN))
    y = turned(x, cos, sin, AT)
    wide, table = x.astype(float), (cos.astype(float) + 1j * sin.astype(float))[AT][:, None]
    z = (wide[..., :4] + 1j * wide[..., 4:]) * table
    exact = np.concatenate([z.real, z.imag], axis=-1)
    size = np.tile(np.abs(wide[..., :4]) + np.abs(wide[..., 4:]), 2)
    chain = 4 * np.finfo(np.float32).eps * size  # of two products and a sum
    assert y.dtype == dtype
    assert_within(np.abs(y.astype(float) - exact), chain + rounding(exact, dtype), "Y")


def test_pairs_are_halves_or_neighbours():
    halves, neighbours = np.arange(8), [0, 4, 1, 5, 2, 6, 3, 7]
    y = turned(X[..., neighbours].copy(), COS, SIN, AT, interleaved=1)
    assert_same(y, turned(X[..., halves].copy(), COS, SIN, AT)[..., neighbours])


@pytest.mark.parametrize("interleaved", [0, 1])
def test_entries_past_the_rotary_width_stay(interleaved):
    cos, sin = COS[:, :2].copy(), SIN[:, :2].copy()
    y = turned(X, cos, sin, AT, rotary_embedding_dim=4, interleaved=interleaved)
    assert_same(y[..., 4:], X[..., 4:])
    assert_same(y[..., :4], turned(X[..., :4].copy(), cos, sin, AT, interleaved=interleaved))


def test_packed_heads_and_caches_by_token_have_the_same_bits():
    y = turned(X, COS, SIN, AT)
    assert_same(turned(packed(X), COS, SIN, AT, num_heads=3), packed(y))
    assert_same(turned(X, COS[AT], SIN[AT]), y)
    assert_same(turned(X[:, :, :0], COS, SIN, np.zeros((2, 0), int)), X[:, :, :0])


@pytest.mark.parametrize("position", [*HOSTILE, 10])
def test_position_that_is_no_row_of_the_caches_is_refused(position):
    at = np.array(AT)
    at[1, 2] = position
    with pytest.raises(ValueError, match=r"position_ids holds .*, expected 0 to 9"):
        turned(X, COS, SIN, at)


ROTARY_ERRORS = [
    ((X[0, 0], COS, SIN, AT), {}, r"X has shape \(5, 8\), expected three or four axes"),
    ((packed(X), COS, SIN, AT), {}, "num_heads is missing"),
    ((packed(X), COS, SIN, AT), {"num_heads": 5}, "num_heads is 5, expected a divisor of X's 24"),
    ((X[..., :7], COS, SIN, AT), {}, "rotary_embedding_dim is 7, expected an even number"),
    ((X, COS, SIN, AT), {"rotary_embedding_dim": 10}, "rotary_embedding_dim is 10"),
    ((X, COS, SIN, AT), {"rotary_embedding_dim": -2}, "rotary_embedding_dim is -2"),
    ((X, COS[:, :3], SIN, AT), {}, r"cos_cache has shape \(10, 3\), expected \(10, 4\)"),
    ((X, COS, SIN[:9], AT), {}, r"sin_cache has shape \(9, 4\), expected \(10, 4\)"),
    ((X, COS, SIN), {}, r"cos_cache has shape \(10, 4\), expected \(2, 5, 4\)"),
    ((X, COS[0], SIN, AT), {}, "cos_cache has shape"),
    ((X, COS, SIN, AT[0][:4]), {}, "position_ids has shape"),
]


@pytest.mark.parametrize(("arrays", "more", "message"), ROTARY_ERRORS)
def test_bad_rotary_models_are_told_what_is_wrong(arrays, more, message):
    with pytest.raises(ValueError, match=message):
        turned(*arrays, **more)


def written(cache, new, at=None, **attributes):
    inputs = {"past_cache": cache, "update": new}
    if at is not None:
        inputs["write_indices"] = np.array(at)
    return run("TensorScatter", inputs, **attributes)


CACHE, NEW = random(2, 3, 6, 4), random(2, 3, 2, 4, seed=1)


@pytest.mark.parametrize("axis", [2, -2, 1, 3])
def test_update_goes_where_its_index_says_and_the_past_is_left_alone(axis):
    cache, new = (np.moveaxis(x, 2, axis) for x in (CACHE, NEW))
    before = cache.copy()
    y = written(cache, new, [0, 4], axis=axis)
    assert_same(cache, before)
    expected = CACHE.copy()
    expected[0, :, 0:2], expected[1, :, 4:6] = NEW
    assert_same(y, np.moveaxis(expected, 2, axis))
    assert_same(written(cache, new, axis=axis), written(cache, new, [0, 0], axis=axis))


def test_circular_indices_wrap_around_from_any_length():
    expected = CACHE.copy()
    expected[0, :, 5], expected[0, :, 0] = NEW[0, :, 0], NEW[0, :, 1]
    expected[1, :, 1:3] = NEW[1]
    far = (2**63 - 1) // 6 * 6 - 5
    assert_same(written(CACHE, NEW, [5, far], mode="circular"), expected)


def test_cache_that_is_filled_step_by_step_attends_like_one_call():
    q, k, v = (random(1, 2, 6, 4, seed=i) for i in range(3))
    keys, values = np.full_like(k, np.nan), np.full_like(v, np.nan)
    whole = attend(q, k, v, is_causal=1)
    for i in range(6):
        token = slice(i, i + 1)
        keys = written(keys, k[:, :, token].copy(), [i])
        values = written(values, v[:, :, token].copy(), [i])
        inputs = {"nonpad_kv_seqlen": np.array([i + 1])}
        y = attend(q[:, :, token].copy(), keys, values, inputs=inputs, is_causal=1)
        assert_same(y, whole[:, :, token])


NO_ROOM = [("linear", index) for index in [*HOSTILE, 5]]
NO_ROOM += [("circular", index) for index in HOSTILE if index < 0]


@pytest.mark.parametrize(("mode", "index"), NO_ROOM)
def test_index_without_room_is_refused(mode, index):
    with pytest.raises(ValueError, match="write_indices holds .*, expected 0 to"):
        written(CACHE, NEW, [0, index], mode=mode)


SCATTER_ERRORS = [
    ((CACHE, NEW), {"axis": 0}, "axis is 0, expected one of past_cache's 4, not the first"),
    ((CACHE, NEW), {"axis": -5}, "axis is -5"),
    ((CACHE, NEW), {"mode": "spiral"}, "mode is 'spiral', expected 'linear' or 'circular'"),
    ((CACHE, NEW[0]), {}, "update has 3 axes, expected 4"),
    ((CACHE, NEW[:1]), {}, r"update has shape \(1, 3, 2, 4\), expected \(2, 3, 6, 4\), or shorter"),
    ((NEW, CACHE), {}, r"update has shape \(2, 3, 6, 4\), expected \(2, 3, 2, 4\)"),
    ((CACHE, NEW, [0, 0, 0]), {}, "write_indices has shape"),
]


@pytest.mark.parametrize(("arrays", "more", "message"), SCATTER_ERRORS)
def test_bad_scatter_models_are_told_what_is_wrong(arrays, more, message):
    with pytest.raises(ValueError, match=message):
        written(*arrays, **more)
