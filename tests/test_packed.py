"""Packed weights: the bits of those that are not, from memory once."""

import itertools
import pickle

import numpy as np
import pytest
import sizes
from judge import assert_same

from mha_fast import PackedWeight, _core, linear, linear_vjp, pack
from mha_fast._core import PANEL

OUTPUTS = [1, 7, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL, 101]
WIDTHS = [1, 5, 64, 511, 512, 513, 1030]
ROWS = [1, 2, 3, 4, 7, 8, 9, 13, 127, 128, 129, 300]


def problem(rows, width, outputs, dtype=np.float32, seed=0):
    shapes = (rows, width), (outputs, width), (outputs,)
    return [sizes.random(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("rows", ROWS)
def test_bits_are_those_of_the_weight_itself(isa, dtype, rows):
    for width, outputs in itertools.product(WIDTHS, OUTPUTS):
        x, weight, bias = problem(rows, width, outputs, dtype)
        assert_same(linear(x, pack(weight), bias), linear(x, weight, bias))


def test_dtypes_mix_as_those_of_the_weight_itself():
    for a, b in itertools.product(sizes.DTYPES, sizes.DTYPES):
        x, weight, bias = problem(5, 70, 50, a)
        weight = weight.astype(b)
        assert_same(linear(x, pack(weight), bias), linear(x, weight, bias))


def test_any_strides_of_x_and_weight_will_do():
    x, weight, _ = problem(40, 60, 100)
    packed = pack(weight.T[::-1, ::2].T)
    assert_same(linear(x.T[::-1].T, packed), linear(x.T[::-1].T, weight.T[::-1, ::2].T))
    turned = sizes.random(60, 2, 20)
    assert_same(linear(turned.T[::-1], packed), linear(turned.T[::-1], packed.unpack()))


def test_threads_change_no_bit():
    x, weight, bias = problem(500, 300, 1000)
    packed = pack(weight)
    for threads in (1, 2, 3):
        assert_same(linear(x, packed, bias, threads=threads), linear(x, weight, bias))


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)], ids=str)
def test_axes_may_be_empty(shape):
    x, weight, bias = problem(*shape)
    assert_same(linear(x, pack(weight), bias), linear(x, weight, bias))


def test_special_numbers_reach_their_outputs_alone():
    x, weight, _ = problem(9, 70, 100)
    weight[3, 5], weight[60, 6], x[2, 2] = np.nan, np.inf, np.nan
    found = linear(x, pack(weight))
    assert_same(found, linear(x, weight))
    assert np.isnan(found[2]).all() and np.isnan(found[:, 3]).all() and np.isfinite(found[0, 4])


def test_unpacking_gives_the_weight(dtype):
    weight = sizes.random(101, 33, dtype=dtype)
    packed = pack(weight)
    assert_same(packed.unpack(), weight)
    assert_same(np.asarray(packed), weight)
    assert len(packed) == 101 and packed.shape == weight.shape and packed.dtype == dtype
    assert packed.nbytes == -(-101 // PANEL) * PANEL * 33 * dtype.itemsize
    assert packed.panels.ctypes.data % 64 == 0
    assert repr(packed) == f"PackedWeight(101 x 33, {dtype}, {packed.nbytes:,} bytes)"


def test_packed_weights_can_be_pickled_and_stay_at_cache_lines():
    packed = pack(sizes.random(50, 9))
    again = pickle.loads(pickle.dumps(packed))
    assert_same(again.panels, packed.panels)
    assert again.panels.ctypes.data % 64 == 0


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_bring_back_the_same(tmp_path, suffix, dtype):
    if suffix == ".npz" and dtype == sizes.BFLOAT16:
        pytest.skip("NumPy's files have no bfloat16")
    packed = pack(sizes.random(101, 33, dtype=dtype))
    packed.save(tmp_path / f"w{suffix}")
    again = PackedWeight.open(tmp_path / f"w{suffix}")
    assert again.shape == packed.shape
    assert_same(again.panels, packed.panels)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight": np.ones((3, 3))}, r"has \['weight'\], expected panels and outputs"),
        ({"panels": np.ones((1, 3, PANEL)), "outputs": np.ones(2)}, "expected panels and outputs"),
        ({"panels": np.ones((1, 3, PANEL)), "outputs": np.float64(0.5)}, "0.5 outputs, expected"),
        ({"panels": np.ones((1, 3, PANEL)), "outputs": np.float64(49)}, r"expected \(2, 'width'"),
        ({"panels": np.ones((1, 3, 47)), "outputs": np.float64(9)}, "panels have shape"),
        ({"panels": np.ones(48), "outputs": np.float64(np.nan)}, "nan outputs, expected"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        PackedWeight.open(tmp_path / "w.npz")


def test_what_does_not_fit_is_refused():
    x, weight, bias = problem(3, 5, 7)
    packed = pack(weight)
    with pytest.raises(ValueError, match="weight has width 5, expected 4 as in x"):
        linear(x[:, :4], packed)
    with pytest.raises(ValueError, match=r"bias has shape \(6,\), expected \(7,\)"):
        linear(x, packed, bias[:6])
    with pytest.raises(TypeError, match="weight is packed, expected an array"):
        linear_vjp(x, packed)
    with pytest.raises(
        ValueError, match=r"weight has shape \(2, 3, 4\), expected \(outputs, width\)"
    ):
        pack(np.ones((2, 3, 4)))
    with pytest.raises(TypeError, match="weight has dtype int64"):
        pack(np.ones((2, 3), int))


def test_a_panel_at_another_place_would_be_seen():
    """So these tests can fail."""
    x, weight, _ = problem(3, 5, 2 * PANEL)
    packed = pack(weight)
    moved = _core.linear_packed(x, packed.panels[::-1].copy(), 2 * PANEL, None, None)
    assert (moved != linear(x, weight)).any()
