"""Norms: as they are defined, of sums too, and the same bits everywhere."""

import numpy as np
import pytest
import sizes
from judge import assert_near, assert_same, assert_within, compute_dtype, rounding

from mha_fast import layer_norm, rms_norm

WIDTHS = [1, 2, 7, 8, 9, 64, 101, 768]


def problem(width, dtype, rows=(3, 5)):
    shapes = (*rows, width), (*rows, width), (width,), (width,)
    return [sizes.random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def exact(x, weight, bias, eps, centred):
    """In long doubles."""
    x = x.astype(np.longdouble)
    x = x - x.mean(axis=-1, keepdims=True) * centred
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return x * weight.astype(np.longdouble) + (0 if bias is None else bias.astype(np.longdouble))


@pytest.mark.parametrize("width", WIDTHS)
def test_norms_are_their_definitions(isa, dtype, width):
    x, _, weight, bias = problem(width, dtype)
    for found, right in (
        (layer_norm(x, weight, bias, eps=0.1), exact(x, weight, bias, 0.1, True)),
        (rms_norm(x, weight, eps=0.1), exact(x, weight, None, 0.1, False)),
    ):
        assert found.dtype == dtype and found.shape == x.shape
        eps = np.finfo(compute_dtype(dtype)).eps
        bound = 8 * eps * (1 + np.abs(right)) + rounding(right, dtype)
        assert_within(np.abs(found.astype(np.longdouble) - right), bound, "norm")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_residual_is_added_before_in_the_compute_dtype(isa, dtype, width):
    x, residual, weight, bias = problem(width, dtype)
    real = compute_dtype(dtype)
    summed = x.astype(real) + residual.astype(real)
    for found, whole in (
        (layer_norm(x, weight, bias, residual=residual), layer_norm(summed, weight, bias)),
        (rms_norm(x, weight, residual=residual), rms_norm(summed, weight)),
    ):
        assert_same(found.sum, summed.astype(dtype))
        assert_same(found.out, whole.astype(dtype))


def test_threads_rows_and_instruction_sets_change_no_bit(real):
    x, residual, weight, _ = problem(101, real, rows=(700,))
    found = [
        rms_norm(x, weight, residual=residual, threads=threads).out
        for threads in (1, 2, 3)
        for _ in sizes.on_every_isa(lambda: None)
    ]
    for other in found[1:]:
        assert_same(other, found[0])
    assert_same(rms_norm(x[333], weight, residual=residual[333]).out, found[0][333])


def test_any_strides_will_do_and_axes_may_be_empty():
    x, residual, weight, _ = problem(9, np.float32)
    turned = rms_norm(x.T[::-1].T, weight, residual=residual.T[::-1].T)
    dense = rms_norm(x[..., ::-1].copy(), weight, residual=residual[..., ::-1].copy())
    assert_same(turned.out, dense.out)
    empty = rms_norm(x[:0], weight, residual=residual[:0])
    assert empty.out.shape == empty.sum.shape == (0, 5, 9)


def test_a_mean_square_is_not_a_variance():
    """So the definitions are told apart."""
    x = np.array([[5.0, 7.0]])
    assert_near(rms_norm(x, [1.0, 1.0], eps=0.0), x / np.sqrt(37.0), 1)
    assert_near(layer_norm(x, [1.0, 1.0], eps=0.0), np.array([[-1.0, 1.0]]), 1)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"residual has shape \(2, 4\), expected \(2, 3\) as in x", (2, 4)),
        (ValueError, r"residual has shape \(3,\), expected \(2, 3\) as in x", (3,)),
        (TypeError, "residual has dtype int64", None),
    ],
)
def test_residuals_that_do_not_fit_are_refused(error, message, options):
    residual = np.ones((2, 3), int) if options is None else np.ones(options)
    with pytest.raises(error, match=message):
        rms_norm(np.ones((2, 3)), np.ones(3), residual=residual)
