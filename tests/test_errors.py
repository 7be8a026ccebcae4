"""Bad input: the exception, its message, and an `out` that nobody touched.

A message names the argument, what was found, and what was expected.
"""

import re

import numpy as np
import pytest
import sizes

import mha_fast
from mha_fast import attention

Q, K, V = (sizes.random(2, *shape) for shape in ((4, 5, 8), (2, 7, 8), (2, 7, 3)))
FLOATS = "float16, bfloat16, float32 or float64"
SCORES = r"\(..., heads, seqlen_q, seqlen_k\) = \(2, 4, 5, 7\)"
FAR = 2**53


def like(x, dtype):
    return np.ones(x.shape, dtype)


class Sparse:
    def toarray(self):
        raise AssertionError("nobody may convert it silently")


class Refuses:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no array today")


DTYPES = [
    ("q", like(Q, int), f"q has dtype int64, expected {FLOATS}: q.astype"),
    ("k", like(K, np.int8), f"k has dtype int8, expected {FLOATS}"),
    ("v", like(V, bool), f"v has dtype bool, expected {FLOATS}"),
    ("q", like(Q, complex), f"q has dtype complex128, expected {FLOATS}"),
    ("k", like(K, object), f"k has dtype object, expected {FLOATS}"),
    ("v", like(V, "U1"), f"v has dtype <U1, expected {FLOATS}"),
    ("v", like(V, np.longdouble), f"v has dtype .*, expected {FLOATS}"),
    ("q", np.zeros(Q.shape, "f4,f4"), f"q has dtype .*, expected {FLOATS}"),
    ("q", None, f"q has dtype object, expected {FLOATS}"),
    ("k", "text", f"k has dtype <U4, expected {FLOATS}"),
    ("q", np.ma.masked_array(Q), "q is a masked array: pass q.data and a mask="),
    ("mask", np.ma.masked_array(Q), "mask is a masked array: pass mask.data"),
    ("v", Sparse(), r"v is sparse \(Sparse\): pass v.toarray\(\)"),
    ("mask", np.ones((5, 7), int), r"mask has dtype int64, expected bool .*astype"),
    ("mask", np.ones((5, 7), np.uint8), r"mask has dtype uint8, expected bool"),
    ("mask", np.ones((5, 7), complex), "mask has dtype complex128, expected bool"),
    ("bias", np.ones((5, 7), bool), f"bias has dtype bool, expected {FLOATS}"),
    ("bias", np.ones((5, 7), int), f"bias has dtype int64, expected {FLOATS}"),
    ("causal", 1, "causal is 1, expected True or False"),
    ("causal", None, "causal is None, expected True or False"),
    ("causal", "yes", "causal is 'yes', expected True or False"),
    ("q_offset", 1.0, "q_offset has dtype float64, expected integers"),
    ("q_offset", True, "q_offset has dtype bool, expected integers"),
    ("kv_lengths", [1.5, 2], "kv_lengths has dtype float64, expected integers"),
    ("scale", "1", "scale is '1', expected a number or None"),
    ("scale", 1j, "scale is 1j, expected a number or None"),
    ("scale", True, "scale is True, expected a number or None"),
    ("scale", np.ones(2), "scale is .*, expected a number or None"),
    ("threads", "2", "threads is '2', expected a positive int or None"),
    ("threads", 1.5, "threads is 1.5, expected a positive int or None"),
    ("threads", True, "threads is True, expected a positive int or None"),
    ("softcap", "1", "softcap is '1', expected a number or None"),
    ("softcap", True, "softcap is True, expected a number or None"),
    ("sinks", np.ones(4, int), f"sinks has dtype int64, expected {FLOATS}"),
    ("alibi_slopes", np.ones(4, bool), f"alibi_slopes has dtype bool, expected {FLOATS}"),
    ("dropout_p", None, "dropout_p is None, expected a number"),
    ("dropout_p", "0", "dropout_p is '0', expected a number"),
    ("seed", 1.5, "seed is 1.5, expected an int or None"),
    ("seed", True, "seed is True, expected an int or None"),
    ("window", 3, r"window is 3, expected a tuple \(left, right\)"),
    ("window", (1.5, 0), r"window is \(1.5, 0\), expected ints or None"),
    ("window", (True, 0), r"window is \(True, 0\), expected ints or None"),
    ("weights_heads", [1.0], "weights_heads has dtype float64, expected ints"),
    ("weights_rows", [True], "weights_rows has dtype bool, expected ints"),
]

VALUES = [
    ("q", np.float32(1), r"q has shape \(\), expected at least \(seqlen, head_dim\)"),
    ("q", Q[0, 0, 0], r"q has shape \(8,\), expected at least"),
    ("k", K[0, 0, 0], r"k has shape \(8,\), expected at least"),
    ("v", V[0, 0, 0], r"v has shape \(3,\), expected at least"),
    ("k", K[..., :5], "k has head_dim 5, expected 8 as in q"),
    ("q", Q[..., :0], "k has head_dim 8, expected 0 as in q"),
    ("v", V[..., :6, :], "v has seqlen_k 6, expected 7 as in k"),
    ("v", V[:, :1], "v has 1 heads, expected 2 as in k"),
    ("v", V[:, :0], "v has 0 heads, expected 2 as in k"),
    ("q", Q[:, :3], "k has 2 heads, which does not divide q's 3"),
    ("q", Q[:, :1], "k has 2 heads, which does not divide q's 1"),
    ("q", Q[[0, 1, 0]], r"leading axes of q, k and v .* \(3,\), \(2,\) and \(2,\)"),
    ("k", K[[0, 1, 0]], r"leading axes of q, k and v .* \(2,\), \(3,\) and \(2,\)"),
    ("mask", np.ones((5, 6), bool), rf"mask has shape \(5, 6\), expected .* {SCORES}"),
    ("mask", np.ones((7, 5), bool), rf"mask has shape \(7, 5\), expected .* {SCORES}"),
    ("mask", np.ones((3, 1, 1, 1), bool), rf"mask has shape \(3, .* {SCORES}"),
    ("mask", np.ones((1, 2, 4, 5, 7), bool), rf"mask has shape \(1, .* {SCORES}"),
    ("mask", np.ones((5, 0), bool), rf"mask has shape \(5, 0\), .* {SCORES}"),
    ("bias", np.ones((2, 5, 7)), rf"bias has shape \(2, 5, 7\), expected .* {SCORES}"),
    ("q_offset", [1, 2, 3], r"q_offset has shape \(3,\), expected .* \(2,\)"),
    ("q_offset", [[1], [2]], r"q_offset has shape \(2, 1\), expected .* \(2,\)"),
    ("q_offset", FAR + 1, f"q_offset holds {FAR + 1} .* expected -{FAR} to {FAR}"),
    ("q_offset", -FAR - 1, f"q_offset holds -{FAR + 1} .* expected -{FAR} to {FAR}"),
    ("q_offset", [0, 2**63 - 1], "q_offset holds 0 to 9223372036854775807, expected"),
    ("kv_lengths", -1, "kv_lengths holds -1 to -1, expected 0 to 7"),
    ("kv_lengths", [3, 8], "kv_lengths holds 3 to 8, expected 0 to 7"),
    ("kv_lengths", np.uint64(2**64 - 1), "kv_lengths holds 18446744073709551615 to"),
    ("kv_lengths", -(2**63), "kv_lengths holds -9223372036854775808 to"),
    ("kv_lengths", [1, 2, 3], r"kv_lengths has shape \(3,\), expected .* \(2,\)"),
    ("scale", np.nan, "scale is nan, expected a finite number"),
    ("scale", -np.inf, "scale is -inf, expected a finite number"),
    ("scale", 10**400, "scale is .*, expected a finite number"),
    ("softcap", 0, "softcap is 0.0, expected a number from 2\\*\\*-64 to"),
    ("softcap", -1.0, "softcap is -1.0, expected a number from"),
    ("softcap", np.inf, "softcap is inf, expected a finite number"),
    ("softcap", 1e30, "softcap is 1e\\+30, expected a number from"),
    ("sinks", np.ones(3), r"sinks has shape \(3,\), expected .* \(..., heads\) = \(2, 4\)"),
    ("alibi_slopes", np.ones((3, 4)), r"alibi_slopes has shape \(3, 4\), expected .* \(2, 4\)"),
    ("dropout_p", 1.0, "dropout_p is 1.0, expected a number from 0 to less than 1"),
    ("dropout_p", -0.1, "dropout_p is -0.1, expected a number from 0 to less than 1"),
    ("dropout_p", np.nan, "dropout_p is nan, expected a finite number"),
    ("dropout_p", 0.5, "seed is None, expected an int beside a dropout_p above 0"),
    ("seed", -1, f"seed is -1, expected 0 to {2**63 - 1}"),
    ("seed", 2**63, f"seed is {2**63}, expected 0 to {2**63 - 1}"),
    ("threads", 0, "threads is 0, expected at least 1"),
    ("threads", -1, "threads is -1, expected at least 1"),
    ("window", (1,), r"window has 1 entries, expected \(left, right\)"),
    ("window", (1, 2, 3), r"window has 3 entries, expected \(left, right\)"),
    ("window", (-1, 0), r"window is \(-1, 0\), expected sides of at least 0"),
    ("weights_heads", [0, 4], "weights_heads holds 0 to 4, expected -4 to 3"),
    ("weights_heads", [1, -3], r"weights_heads names an entry twice: \[1, 1\]"),
    ("weights_rows", -6, r"weights_rows has shape \(\), expected a list of ints"),
    ("weights_rows", [-6], "weights_rows holds -6 to -6, expected -5 to 4"),
    ("window", (None, -5), r"window is \(None, -5\), expected sides of at least 0"),
]

ROWS = [(TypeError, *row) for row in DTYPES] + [(ValueError, *row) for row in VALUES]


@pytest.mark.parametrize(
    ("error", "name", "value", "message"),
    ROWS,
    ids=[f"{name}-{message[:30]}" for _, name, _, message in ROWS],
)
def test_bad_argument_is_named_and_out_is_untouched(error, name, value, message):
    arguments = {"q": Q, "k": K, "v": V, "return_weights": "weights" in name} | {name: value}
    with pytest.raises(error, match=message):
        attention(**arguments)
    out = np.full((2, 4, 5, 3), 7, np.float32)
    with pytest.raises(error, match=message):
        attention(**arguments, out=out)
    assert (out == 7).all()


def test_choosing_weights_needs_weights_and_a_heads_axis():
    with pytest.raises(ValueError, match="weights_rows is .* expected None without return_weights"):
        attention(Q, K, V, weights_rows=[0])
    with pytest.raises(ValueError, match="weights_heads needs a heads axis"):
        attention(Q[0, 0], K[0, 0], V[0, 0], return_weights=True, weights_heads=[0])


def test_two_dimensional_score_shape_is_worded_without_heads():
    with pytest.raises(ValueError, match=r"\(seqlen_q, seqlen_k\) = \(5, 7\)"):
        attention(Q[0, 0], K[0, 0], V[0, 0], np.ones((5, 5), bool))


@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_ragged_list_is_refused_by_name(name):
    ragged = {"q": Q, "k": K, "v": V} | {name: [[1.0, 2.0], [3.0]]}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        attention(**ragged)


def test_error_of_an_array_like_comes_through_with_its_name():
    with pytest.raises(
        TypeError, match="k is a .*Refuses, which NumPy cannot read: no array today"
    ):
        attention(Q, Refuses(), V)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="is_causal"):
        attention(Q, K, V, is_causal=True)


def good_out():
    return np.full((2, 4, 5, 3), 7, np.float32)


def read_only(out):
    out.flags.writeable = False
    return out


OUTS = [
    (TypeError, lambda: good_out().tolist(), "out is a list, expected an ndarray"),
    (TypeError, lambda: np.ma.masked_array(good_out()), "out is a MaskedArray"),
    (TypeError, lambda: good_out().astype(float), "out has dtype <f8, .* float32"),
    (TypeError, lambda: good_out().astype(int), "out has dtype <i8, .* float32"),
    (TypeError, lambda: good_out().astype(">f4"), "out has dtype >f4, .* float32"),
    (
        ValueError,
        lambda: good_out()[:1],
        r"out has shape \(1, 4, 5, 3\), expected \(2, 4, 5, 3\)",
    ),
    (ValueError, lambda: good_out()[0], r"out has shape \(4, 5, 3\), expected"),
    (ValueError, lambda: good_out()[None], r"out has shape \(1, 2, 4, 5, 3\), exp"),
    (
        ValueError,
        lambda: read_only(good_out()),
        "out is read-only, expected a writeable array",
    ),
    (
        ValueError,
        lambda: np.lib.stride_tricks.as_strided(good_out(), strides=(240, 60, 4, 4)),
        "out overlaps itself",
    ),
    (
        ValueError,
        lambda: np.lib.stride_tricks.as_strided(good_out(), strides=(0, 60, 12, 4)),
        "out overlaps itself",
    ),
]


@pytest.mark.parametrize(("error", "make", "message"), OUTS, ids=[row[2][:30] for row in OUTS])
def test_bad_out_is_refused_and_untouched(error, make, message):
    out = make()
    before = np.array(out)
    with pytest.raises(error, match=message):
        attention(Q, K, V, out=out)
    assert np.array_equal(np.array(out), before)


def overlaps():
    """(name of the input that overlaps, arrays, out)."""
    square = np.ones((2, 5, 5), np.float32)
    other = [sizes.random(2, 5, 5, seed=i) for i in range(3)]
    for i, name in enumerate("qkv"):
        arrays = dict(zip("qkv", other, strict=True))
        yield name, arrays | {name: square}, square
        yield name, arrays | {name: square.swapaxes(1, 2)}, square
        yield name, arrays | {name: square[::-1]}, square
        memory = np.ones(100, np.float32)
        start, shifted = memory[:50], memory[i + 1 : i + 51]
        yield name, arrays | {name: start.reshape(2, 5, 5)}, shifted.reshape(2, 5, 5)
    for name in ("mask", "bias"):
        yield name, dict(zip("qkv", other, strict=True)) | {name: square[0]}, square


@pytest.mark.parametrize(("name", "arrays", "out"), list(overlaps()))
def test_out_may_not_overlap_an_input(name, arrays, out):
    before = out.copy()
    with pytest.raises(ValueError, match=f"out overlaps {name}, expected memory of"):
        attention(**arrays, out=out)
    assert np.array_equal(out, before)


def test_out_interleaved_with_an_input_is_no_overlap():
    both = sizes.random(2, 5, 10)
    q, out = both[..., ::2], both[..., 1::2]
    k, v = sizes.random(2, 7, 5, seed=1), sizes.random(2, 7, 5, seed=2)
    expected = attention(q.copy(), k, v)
    assert np.array_equal(attention(q, k, v, out=out), expected)


COUNTS = [
    (TypeError, "2", "count is '2', expected a positive int or None"),
    (TypeError, True, "count is True, expected a positive int or None"),
    (TypeError, 1.5, "count is 1.5, expected a positive int or None"),
    (ValueError, 0, "count is 0, expected at least 1"),
    (ValueError, -1, "count is -1, expected at least 1"),
]


@pytest.mark.parametrize(("error", "count", "message"), COUNTS)
def test_bad_thread_count_is_refused_and_changes_nothing(error, count, message):
    before = mha_fast.get_num_threads()
    with pytest.raises(error, match=re.escape(message)):
        mha_fast.set_num_threads(count)
    assert mha_fast.get_num_threads() == before


def test_unknown_config_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'json', expected 'stdout' or"):
        mha_fast.show_config("json")


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 ", "None"])
def test_unknown_isa_is_refused_with_the_usable_ones(name):
    from mha_fast import _core

    before = _core.get_isa()
    usable = ", ".join(_core.isa_names())
    with pytest.raises(ValueError, match=f"'{name}' is not usable here; .*{usable}"):
        _core.use_isa(name)
    assert _core.get_isa() == before
