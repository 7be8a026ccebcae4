"""Flags and numbers from NumPy mean what Python's mean, to the bit; a flag is True or False."""

import re
from fractions import Fraction

import numpy as np
import pytest
from judge import assert_same
from layers import EMBED, HEADS, tokens
from options import OPTIONS, PLAIN
from sizes import KEY_BLOCK, qkv

from mha_fast import MultiHeadAttention, attention, reference

F4 = np.float32


def arrays(dtype=F4):
    return qkv(19, KEY_BLOCK + 9, 5, 9, heads=4, kv_heads=2, dtype=dtype)


INTEGERS = [np.int64, np.int32, np.uint8, np.array]
FLOATS = [F4, np.float64, np.float16]
SCALARS = [
    ("causal", True, [np.True_]),
    ("causal", False, [np.False_]),
    ("return_lse", True, [np.True_]),
    ("return_lse", False, [np.False_]),
    ("return_weights", True, [np.True_]),
    ("return_weights", False, [np.False_]),
    ("scale", 2.0, [2, *(t(2) for t in (*FLOATS, np.int64, np.uint8, Fraction))]),
    ("scale", 0.0, [0, F4(0), np.float64(-0.0), np.int64(0)]),
    ("scale", -3.0, [-3, F4(-3), np.int64(-3)]),
    *(("scale", float(x), [x]) for x in (F4(0.1), np.float64(0.1), np.float16(0.1))),
    ("q_offset", 100, [t(100) for t in INTEGERS]),
    ("q_offset", -7, [np.int64(-7), np.int32(-7), np.int8(-7), [-7, -7], np.array([-7])]),
    ("q_offset", [3, 200], [np.array([3, 200], t) for t in (np.int32, np.uint8, ">i8")]),
    ("kv_lengths", 100, [t(100) for t in INTEGERS]),
    ("kv_lengths", [100, 3], [np.array([100, 3], t) for t in (np.int32, np.uint8, ">u4")]),
    ("kv_lengths", [100, 3], [(100, 3), [np.int64(100), np.uint8(3)]]),
    ("window", (9, 3), [(np.int64(9), np.int32(3)), (np.uint8(9), 3), [9, np.int64(3)]]),
    ("window", (9, None), [(np.int64(9), None), (np.uint8(9), None)]),
    ("window", (None, 3), [(None, np.int64(3))]),
    ("threads", 1, [np.int64(1), np.uint8(1)]),
    ("threads", 3, [np.int64(3), np.int32(3)]),
]


def name_of(row):
    return f"{row[0]}={row[1]}"


@pytest.mark.parametrize("scalar", SCALARS, ids=name_of)
def test_scalar_of_numpy_equals_that_of_python_beside_every_option(scalar):
    argument, value, same = scalar
    q, k, v = arrays()
    out = np.full((*q.shape[:-1], 9), np.nan, F4)
    for row in (PLAIN, *OPTIONS.values()):
        for ask in ({}, {"out": out}, {"return_lse": True}, {"return_weights": True}):
            options = row(q, k, v) | ask | {argument: value}
            expected = copied(attention(q, k, v, **options))
            for x in same:
                result = attention(q, k, v, **options | {argument: x})
                assert type(result) is type(expected), f"{argument} is {x!r}"
                assert_same(result, expected, f"{argument} {x!r} and {value!r}")


@pytest.mark.parametrize("scalar", SCALARS, ids=name_of)
def test_scalar_of_numpy_equals_that_of_python_in_the_reference(scalar):
    argument, value, same = scalar
    q, k, v = arrays()
    expected = reference.attention(q, k, v, **{argument: value})
    for x in same:
        result = reference.attention(q, k, v, **{argument: x})
        assert type(result) is type(expected), f"{argument} is {x!r}"
        assert_same(result, expected, f"{argument} {x!r} and {value!r}")


def copied(result):
    """Apart from `out`, which the next call writes."""
    if isinstance(result, np.ndarray):
        return result.copy()
    return type(result)(*(x.copy() for x in result))


def as_numpy(x):
    """The same value, in NumPy's types."""
    if isinstance(x, tuple):
        return tuple(map(as_numpy, x))
    kinds = {bool: np.bool_, int: np.int64, float: np.float64}
    return kinds.get(type(x), lambda same: same)(x)


def test_every_option_may_be_said_in_types_of_numpy(isa, real, option):
    q, k, v = arrays(real)
    options = option(q, k, v)
    said = {name: as_numpy(x) for name, x in options.items()}
    ask = {"return_lse": True, "return_weights": True}
    expected = attention(q, k, v, **options, **ask)
    assert_same(attention(q, k, v, **said, **{name: np.True_ for name in ask}), expected)
    alone = attention(q, k, v, **said, return_lse=np.False_, return_weights=np.False_)
    assert_same(alone, expected.out)


# ---- Flags ---------------------------------------------------------------------------------------

NOT_FLAGS = [1, 0, "no", None, [True], np.array(True)]
CALL_FLAGS = ["causal", "need_weights", "average_weights"]
LAYER_FLAGS = ["bias", "add_bias_kv", "add_zero_attn"]


@pytest.mark.parametrize("x", NOT_FLAGS, ids=repr)
@pytest.mark.parametrize("name", ["causal", "return_lse", "return_weights"])
def test_flag_of_attention_that_is_no_bool_is_refused(name, x):
    q, k, v = arrays()
    out = np.full((*q.shape[:-1], 9), 7, F4)
    for more in ({}, {"out": out}, {"window": (3, 3)}, {"scale": F4(2)}):
        with pytest.raises(TypeError, match=message(name, x)):
            attention(q, k, v, **{name: x} | more)
    with pytest.raises(TypeError, match=message(name, x)):
        attention(q.tolist(), k, v, **{name: x})
    assert (out == 7).all()


@pytest.mark.parametrize("x", NOT_FLAGS, ids=repr)
@pytest.mark.parametrize("name", CALL_FLAGS)
def test_flag_of_a_layers_call_that_is_no_bool_is_refused(name, x):
    for more in ({}, {"add_zero_attn": True}):
        layer = MultiHeadAttention(EMBED, HEADS, **more)
        for weights in ({}, {"need_weights": True}):
            with pytest.raises(TypeError, match=message(name, x)):
                layer(tokens(2, 5, EMBED), **weights | {name: x})


@pytest.mark.parametrize("x", NOT_FLAGS, ids=repr)
@pytest.mark.parametrize("name", LAYER_FLAGS)
def test_flag_of_a_layer_that_is_no_bool_is_refused(name, x):
    with pytest.raises(TypeError, match=message(name, x)):
        MultiHeadAttention(EMBED, HEADS, **{name: x})


@pytest.mark.parametrize("x", NOT_FLAGS, ids=repr)
def test_flag_beside_loaded_weights_that_is_no_bool_is_refused(tmp_path, x):
    layer = MultiHeadAttention(EMBED, HEADS)
    layer.save(tmp_path / "layer.npz")
    with pytest.raises(TypeError, match=message("add_zero_attn", x)):
        MultiHeadAttention.from_state_dict(layer.state_dict(), HEADS, add_zero_attn=x)
    with pytest.raises(TypeError, match=message("add_zero_attn", x)):
        MultiHeadAttention.load(tmp_path / "layer.npz", HEADS, add_zero_attn=x)


def message(name, x):
    return re.escape(f"{name} is {x!r}, expected True or False")


# ---- The layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average_weights", [True, False])
@pytest.mark.parametrize("more", [{}, {"add_zero_attn": True}], ids=str)
def test_flags_of_a_layers_call_may_be_numpys(more, causal, need_weights, average_weights):
    layer = MultiHeadAttention(EMBED, HEADS, seed=0, **more)
    flags = dict(zip(CALL_FLAGS, (causal, need_weights, average_weights), strict=True))
    x = tokens(2, 13, EMBED)
    expected = layer(x, **flags, threads=1)
    result = layer(x, **{n: np.bool_(flag) for n, flag in flags.items()}, threads=np.int64(1))
    assert type(result) is type(expected)
    assert_same(result, expected)


@pytest.mark.parametrize("name", LAYER_FLAGS)
@pytest.mark.parametrize("flag", [True, False])
def test_flags_of_a_layer_may_be_numpys(name, flag):
    layer = MultiHeadAttention(EMBED, HEADS, **{name: flag}, seed=0)
    twin = MultiHeadAttention(EMBED, HEADS, **{name: np.bool_(flag)}, seed=0)
    assert type(getattr(twin, name)) is bool
    assert repr(twin) == repr(layer)
    assert_same(twin(tokens(5, EMBED), causal=True), layer(tokens(5, EMBED), causal=True))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_sizes_of_a_layer_may_be_numpys(integer):
    named = {"num_kv_heads": 2, "head_dim": 5, "kdim": 7, "vdim": 10}
    layer = MultiHeadAttention(EMBED, HEADS, **named, seed=0)
    said = {name: integer(n) for name, n in named.items()}
    twin = MultiHeadAttention(integer(EMBED), integer(HEADS), **said, seed=integer(0))
    assert {type(getattr(twin, name)) for name in ("embed_dim", "num_heads", *named)} == {int}
    assert repr(twin) == repr(layer)
    arguments = [tokens(2, 5, n) for n in (EMBED, 7, 10)]
    assert_same(twin(*arguments), layer(*arguments))
    again = MultiHeadAttention.from_state_dict(layer.state_dict(), integer(HEADS))
    assert repr(again) == repr(layer) and type(again.head_dim) is int


def test_canary_a_scale_that_is_rounded_twice_is_caught():
    q, k, v = arrays(np.float64)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(attention(q, k, v, scale=F4(0.1)), attention(q, k, v, scale=0.1))


def test_canary_a_flag_taken_for_true_is_caught():
    q, k, v = arrays()
    with pytest.raises(AssertionError, match="differ"):
        assert_same(attention(q, k, v, causal=True), attention(q, k, v, causal=np.False_))
