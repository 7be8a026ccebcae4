"""The linear layer: values, bits, shapes and errors."""

from functools import partial

import numpy as np
import pytest
import sizes
from judge import assert_same, assert_within, compute_dtype, product_bound, rounding
from sizes import HEAD_DIMS, KEY_BLOCK, SEQLENS, random

from mha_fast import linear

F4 = np.float32


def arrays(rows, outputs, width, dtype=F4):
    return (
        random(rows, width, dtype=dtype),
        random(outputs, width, dtype=dtype, seed=1),
        random(outputs, dtype=dtype, seed=2),
    )


def assert_product(y, x, weight, bias):
    dtype = np.result_type(x, weight)
    wide = np.longdouble if dtype == np.float64 else np.float64
    x, weight, bias = (a.astype(np.float64).astype(wide) for a in (x, weight, bias))
    exact = x @ weight.T + bias
    bound = product_bound(x, weight, bias, compute_dtype(dtype)) + rounding(exact, dtype)
    assert y.dtype == dtype and y.shape == exact.shape
    assert_within(np.abs(y.astype(wide) - exact), bound, "product")


@pytest.mark.parametrize("i", range(len(SEQLENS)), ids=lambda i: str(SEQLENS[i]))
def test_products_are_accurate_at_ugly_sizes(isa, dtype, i):
    outputs, width = SEQLENS[(7 * i + 5) % len(SEQLENS)], HEAD_DIMS[7 * i % len(HEAD_DIMS)]
    x, weight, bias = arrays(SEQLENS[i], outputs, width, dtype)
    assert_product(linear(x, weight, bias), x, weight, bias)
    assert_product(linear(x, weight), x, weight, np.zeros_like(bias))


@pytest.mark.parametrize("width", [511, 512, 1000])
def test_wide_rows_are_accurate(isa, real, width):
    x, weight, bias = arrays(13, KEY_BLOCK + 1, width, real)
    assert_product(linear(x, weight, bias), x, weight, bias)


def test_a_row_has_the_same_bits_whatever_is_beside_it(isa, real):
    x, weight, bias = arrays(131, 2 * KEY_BLOCK + 9, 67, real)
    together = linear(x, weight, bias)
    for count in (1, 2, *sizes.around(*sizes.FEW.values(), *sizes.TILE.values())):
        assert_same(linear(x[:count], weight, bias), together[:count])
    assert_same(linear(x, weight[7:8], bias[7:8]), together[:, 7:8])


def test_products_have_the_bits_of_one_thread_and_of_every_isa():
    x, weight, bias = arrays(131, 5 * KEY_BLOCK + 9, 256)
    expected = linear(x, weight, bias, threads=1)
    for threads in (1, 2, 3, 8):
        call = partial(linear, x, weight, bias, threads=threads)
        for name, y in sizes.on_every_isa(call):
            assert_same(y, expected, f"{name}, {threads} threads")


def test_strides_and_leading_axes_change_no_bit(isa):
    x, weight, bias = arrays(30, 77, 24)
    expected = linear(x, weight, bias)
    wide = np.full((30, 48), np.nan, F4)
    wide[:, ::2] = x
    assert_same(linear(wide[:, ::2], weight, bias), expected)
    assert_same(linear(x, np.asfortranarray(weight), bias), expected)
    assert_same(linear(x[::-1], weight[::-1], bias[::-1]), expected[::-1, ::-1])
    assert_same(linear(x.reshape(2, 3, 5, 24), weight, bias), expected.reshape(2, 3, 5, 77))
    swapped = x.reshape(5, 6, 24).swapaxes(0, 1)
    assert_same(linear(swapped, weight, bias), expected.reshape(5, 6, 77).swapaxes(0, 1))
    assert_same(linear(x[3], weight, bias), expected[3])


def test_empty_axes_give_the_bias_or_nothing():
    x, weight, bias = arrays(5, 7, 3)
    assert_same(linear(x[:, :0], weight[:, :0], bias), np.broadcast_to(bias, (5, 7)))
    assert linear(x[:0], weight, bias).shape == (0, 7)
    assert linear(x, weight[:0], bias[:0]).shape == (5, 0)


@pytest.mark.parametrize(
    ("error", "name", "value", "message"),
    [
        (TypeError, "x", np.ones((2, 3), int), "x has dtype int64, expected float16"),
        (TypeError, "weight", np.ones((4, 3), bool), "weight has dtype bool, expected float16"),
        (TypeError, "bias", np.ones(4, int), "bias has dtype int64, expected float16"),
        (TypeError, "threads", 1.5, "threads is 1.5, expected a positive int or None"),
        (ValueError, "x", F4(1), r"x has shape \(\), expected at least \(width\)"),
        (ValueError, "x", np.ones((2, 2), F4), "weight has width 3, expected 2 as in x"),
        (ValueError, "weight", np.ones(3, F4), r"weight has shape \(3,\), expected at least"),
        (ValueError, "weight", np.ones((1, 4, 3), F4), r"weight has shape \(1, 4, 3\), expected"),
        (ValueError, "bias", np.ones(3, F4), r"bias has shape \(3,\), expected \(4,\)"),
    ],
    ids=str,
)
def test_bad_argument_of_linear_is_named(error, name, value, message):
    good = {"x": np.ones((2, 3), F4), "weight": np.ones((4, 3), F4), "bias": np.ones(4, F4)}
    with pytest.raises(error, match=message):
        linear(**good | {name: value})


def test_canary_a_product_off_by_one_term_is_caught():
    x, weight, bias = arrays(5, 7, 64)
    y = linear(x, weight, bias)
    y[2, 3] += x[2, 5] * weight[3, 5]
    with pytest.raises(AssertionError, match="1 of 35 are wrong"):
        assert_product(y, x, weight, bias)
