"""Rotary embedding: NumPy's own bits, in any layout and place, and tables of published scalings."""

import numpy as np
import pytest
import sizes
from judge import FACTOR, assert_near, assert_same
from test_layout import LAYOUTS, WRITEABLE, name_of

from mha_fast import attention, reference, rotary, rotary_tables

LENGTH, SEQLEN = 150, 130  # more than two tasks of rows


def case(head_dim, dtype=np.float32, batch=(2, 1)):
    x = sizes.random(*batch, 3, SEQLEN, head_dim, dtype=dtype)
    positions = np.random.default_rng(0).integers(0, LENGTH, (2, 1, SEQLEN))
    return x, positions


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [2, 3, 8, 17, 31, 32, 33, 64, 80, 128, 130])
def test_bits_are_those_of_numpy(isa, dtype, head_dim, interleaved):
    x, positions = case(head_dim, dtype)
    for rotary_dim in {2, head_dim // 4 * 2, head_dim // 2 * 2}:
        tables = rotary_tables(LENGTH, rotary_dim)
        for at in (None, positions[0, 0], positions):
            options = {"interleaved": interleaved, "positions": at}
            expected = reference.rotary(x, *tables, **options)
            assert_same(rotary(x, *tables, **options), expected)
            assert_same(rotary(x, *tables, **options, threads=1), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_definition_by_complex_numbers(real, interleaved):
    """RoFormer's equation 34: pair i of position m times e^(i m theta)."""
    x, _ = case(16, real)
    turns = np.exp(1j * np.outer(np.arange(SEQLEN), 100.0 ** -(np.arange(8) / 8)))
    tables = rotary_tables(SEQLEN, 16, base=100.0, dtype=real)
    turned = rotary(x, *tables, interleaved=interleaved)
    a, b = ((y[..., ::2], y[..., 1::2]) if interleaved else np.split(y, 2, -1) for y in (x, turned))
    exact = (a[0] + 1j * a[1]) * turns
    bound = FACTOR * np.finfo(real).eps * np.abs(exact)
    assert (np.abs(b[0] + 1j * b[1] - exact) <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_strides_change_no_bit(isa, dtype, layout):
    x, positions = case(24, dtype)
    tables = rotary_tables(LENGTH, 20)
    expected = rotary(x, *tables, positions=positions)
    assert_same(rotary(layout(x), *tables, positions=positions), expected)


@pytest.mark.parametrize("layout", WRITEABLE, ids=name_of)
def test_results_go_to_any_array_also_in_place(isa, dtype, layout):
    x, positions = case(24, dtype)
    tables = rotary_tables(LENGTH, 20)
    expected = rotary(x, *tables, positions=positions)
    for out in (layout(np.zeros_like(x)), layout(x)):
        given = out if (out == x).all() else x
        assert rotary(given, *tables, positions=positions, out=out) is out
        assert_same(out, expected)


def test_tables_may_belong_to_batch_rows(real):
    """As ONNX has them without positions."""
    x, positions = case(8, real)
    tables = rotary_tables(LENGTH, 8, dtype=real)
    gathered = (a[positions] for a in tables)
    assert_same(rotary(x, *gathered), rotary(x, *tables, positions=positions))


def test_two_axes_are_one_head(real):
    x, _ = case(8, real)
    tables = rotary_tables(LENGTH, 8)
    assert_same(rotary(x[0, 0, 1], *tables), rotary(x, *tables)[0, 0, 1])


def test_scores_depend_on_the_distance_alone():
    """What it is for: all positions moved by 100 give the same attention, to rounding."""
    q, k, v = (sizes.random(2, 20, 16, dtype=np.float64, seed=i) for i in range(3))
    tables = rotary_tables(LENGTH, 16, dtype=np.float64)

    def result(first):
        at = np.arange(20) + first
        return attention(*(rotary(x, *tables, positions=at) for x in (q, k)), v, causal=True)

    assert_near(result(0), result(100), size=LENGTH)  # angles of so many radians
    assert np.abs(result(0) - attention(q, k, v, causal=True)).max() > 0.01


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5, 8), (0, 2, 5, 8)], ids=str)
def test_axes_may_be_empty(shape):
    x = np.ones(shape, np.float32)
    tables = rotary_tables(shape[-2], min(shape[-1], 4))
    assert rotary(x, *tables).shape == shape


def test_nan_in_what_does_not_turn_stays_where_it_is(isa):
    x, _ = case(9)
    x[..., 8] = np.nan
    turned = rotary(x, *rotary_tables(LENGTH, 8))
    assert np.isnan(turned[..., 8]).all() and not np.isnan(turned[..., :8]).any()


X = np.ones((2, 3, 5, 8), np.float32)
COS, SIN = rotary_tables(5, 8)
READ_ONLY = X.view()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("arguments", "more", "error", "message"),
    [
        ((X.astype(int), COS, SIN), {}, TypeError, "x has dtype int64"),
        ((X[0, 0, 0], COS, SIN), {}, ValueError, "x has shape (8,), expected at least"),
        ((X, COS, SIN[:, :1]), {}, ValueError, "sin has shape (5, 1), expected (5, 4) as cos"),
        ((X[..., :7], COS, SIN), {}, ValueError, "cos has 4 pairs, expected at most 3"),
        ((X, COS[:4], SIN[:4]), {}, ValueError, "cos has 4 rows, expected at least 5"),
        ((X, *[np.ones((3, 5, 4))] * 2), {}, ValueError, "cos has shape (3,), expected one that"),
        ((X, COS, SIN), {"positions": [5] * 5}, ValueError, "positions holds 5 to 5, expected 0"),
        ((X, COS, SIN), {"positions": -1}, ValueError, "positions holds -1 to -1, expected 0 to 4"),
        (
            (X, COS, SIN),
            {"positions": 2**63 - 1},
            ValueError,
            "positions holds 9223372036854775807",
        ),
        ((X, COS, SIN), {"positions": [1.0] * 5}, TypeError, "positions has dtype float64"),
        ((X, COS, SIN), {"positions": [0] * 4}, ValueError, "(..., seqlen) = (2, 5)"),
        ((X, COS, SIN), {"interleaved": 1}, TypeError, "interleaved is 1, expected True or False"),
        ((X, COS, SIN), {"out": X[:1]}, ValueError, "out has shape (1, 3, 5, 8), expected (2,"),
        ((X, COS, SIN), {"out": X[:, ::-1]}, ValueError, "out overlaps x"),
        ((READ_ONLY, COS, SIN), {"out": READ_ONLY}, ValueError, "out is read-only"),
        ((X, COS, SIN), {"threads": 0}, ValueError, "threads is 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_refused_by_name(arguments, more, error, message):
    before = X.copy()
    with pytest.raises(error) as caught:
        rotary(*arguments, **more)
    assert message in str(caught.value)
    assert_same(X, before)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def angles(length, dim, **more):
    """Radians of each pair at position 1, and the length of a row at position 0."""
    cos, sin = rotary_tables(length, dim, dtype=np.float64, **more)
    return np.arctan2(sin[1], cos[1]), cos[0, 0]


def test_linear_scaling_divides_positions():
    cos, _ = rotary_tables(9, 8, scaling={"rope_type": "linear", "factor": 4.0})
    plain, _ = rotary_tables(3, 8)
    assert_same(cos[::4], plain)


def test_dynamic_scaling_begins_beyond_the_trained_length():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    assert_same(rotary_tables(16, 8, scaling=scaling)[1], rotary_tables(16, 8)[1])
    stretched = 10000.0 * 3.0 ** (8 / 6)  # 2 * 32 / 16 - 1
    longer = rotary_tables(32, 8, scaling=scaling)
    assert_same(longer[1], rotary_tables(32, 8, base=stretched)[1])


def test_llama3_keeps_what_turns_often_and_slows_what_does_not():
    plain, _ = angles(2, 128, base=500000.0)
    scaled, size = angles(2, 128, base=500000.0, scaling=LLAMA3)
    turns = 8192 * plain / (2 * np.pi)
    assert np.array_equal(scaled[turns > 4], plain[turns > 4])
    assert_near(scaled[turns < 1], plain[turns < 1] / 8, plain[turns < 1])
    between = (turns > 1) & (turns < 4)
    assert between.any() and (scaled[between] < plain[between]).all() and size == 1


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_lengthens_rows():
    plain, _ = angles(2, 64)
    scaled, size = angles(2, 64, scaling=YARN)
    assert_near(scaled[:10], plain[:10], size=1)
    assert_near(scaled[-8:], plain[-8:] / 4, plain[-8:])
    assert size == 0.1 * np.log(4) + 1
    assert angles(2, 64, scaling=YARN | {"attention_factor": 1.5})[1] == 1.5
    equal = YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
    assert angles(2, 64, scaling=equal)[1] == 1


def test_base_of_the_configuration_goes_first():
    scaling = {"rope_type": "default", "rope_theta": 500000.0}
    assert_same(rotary_tables(5, 8, scaling=scaling)[1], rotary_tables(5, 8, base=500000.0)[1])


@pytest.mark.parametrize(
    ("arguments", "more", "error", "message"),
    [
        ((5, 7), {}, ValueError, "rotary_dim is 7, expected an even number"),
        ((-1, 8), {}, ValueError, "length is -1, expected at least 0"),
        ((5.0, 8), {}, TypeError, "length is 5.0, expected an int"),
        ((5, 8), {"base": -1.0}, ValueError, "rope_theta is -1.0, expected a number above 0"),
        ((5, 8), {"scaling": "yarn"}, TypeError, "scaling is 'yarn', expected a dict or None"),
        (
            (5, 8),
            {"scaling": {"type": "su"}},
            ValueError,
            "rope_type 'su', expected one of default",
        ),
        ((5, 8), {"scaling": {"type": "linear"}}, ValueError, "scaling has no 'factor', which"),
        ((5, 8), {"scaling": LLAMA3 | {"factor": "8"}}, TypeError, "factor is '8', expected a num"),
        ((5, 8), {"scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ValueError, "low_freq_factor is"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_tables_are_refused_by_name(arguments, more, error, message):
    with pytest.raises(error) as caught:
        rotary_tables(*arguments, **more)
    assert message in str(caught.value)


def test_canary_the_other_pairing_is_caught():
    x, _ = case(8)
    tables = rotary_tables(LENGTH, 8)
    with pytest.raises(AssertionError):
        assert_same(rotary(x, *tables, interleaved=True), reference.rotary(x, *tables))
