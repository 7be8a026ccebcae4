"""A layer's call: values, masks, bits, memory, and messages."""

import tracemalloc
from functools import partial

import numpy as np
import oracle_layer
import pytest
import sizes
from judge import assert_same, assert_within
from layers import BATCH, EACH, EMBED, HEADS, LAYERS, layer_of, tokens
from sizes import random_mask

from mha_fast import MultiHeadAttention, attention, linear

CALLS = [
    {"causal": causal, "attn_mask": attn, "key_padding_mask": padding}
    for causal in (False, True)
    for attn in (None, "bool 2", "float 2", "bool 3", "float 3")
    for padding in (None, "bool", "float")
]


def call_id(call):
    return ", ".join(f"{name} {x}" for name, x in call.items() if x) or "plain"


def terms(call, seqlen_q, seqlen_k, batch=BATCH):
    """The masks that `call` asks for; the second row sees nothing, nor do rows of entry 1."""
    heads = (batch or 1) * HEADS
    options = {name: x for name, x in call.items() if x}
    if call["attn_mask"]:
        kind, axes = call["attn_mask"].split()
        hidden = ~random_mask(*([heads] if axes == "3" else []), seqlen_q, seqlen_k)
        hidden[..., 1, :] = True
        options["attn_mask"] = hidden if kind == "bool" else sizes.additive(~hidden, "f4")
    if call["key_padding_mask"]:
        hidden = ~random_mask(*([batch] if batch else []), seqlen_k, seed=1)
        hidden[-1] = True
        kind = call["key_padding_mask"]
        options["key_padding_mask"] = hidden if kind == "bool" else sizes.additive(~hidden, "f4")
    return options


def assert_layer_accurate(result, layer, *arguments, **options):
    """`result` is (out, weights of each head)."""
    answer = oracle_layer.multi_head_attention(layer, *arguments, **options)
    assert result.out.dtype == result.weights.dtype == layer.dtype
    assert result.out.shape == answer.out.shape
    assert result.weights.shape == answer.weights.shape
    assert (result.weights[answer.weights == 0] == 0).all(), "weights of hidden keys"
    assert_within(np.abs(result.out - answer.out), answer.out_bound, "out")
    assert_within(np.abs(result.weights - answer.weights), answer.weights_bound, "weights")


@pytest.mark.parametrize("call", CALLS, ids=call_id)
@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
def test_values_are_accurate_for_every_option(more, call, real):
    layer = layer_of(more, real.type)
    query = tokens(BATCH, 13, EMBED, dtype=real)
    arguments = (query,)
    if layer.kdim != EMBED:
        arguments = (query, *(tokens(BATCH, 9, n, dtype=real, seed=n) for n in (7, layer.vdim)))
    options = terms(call, 13, 13 if len(arguments) == 1 else 9)
    result = layer(*arguments, **options, **EACH)
    assert_layer_accurate(result, layer, *arguments, **options)


@pytest.mark.parametrize("call", CALLS, ids=call_id)
def test_unbatched_tokens_are_a_batch_of_one(call):
    layer = layer_of({"add_zero_attn": True})
    query, key = tokens(5, EMBED), tokens(31, EMBED, seed=1)
    options = terms(call, 5, 31, batch=None)
    result = layer(query, key, **options, **EACH)
    assert_layer_accurate(result, layer, query, key, **options)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"][None]
    for x, y in zip(layer(query[None], key[None], **options, **EACH), result, strict=True):
        assert_same(x[0], y)


@pytest.mark.parametrize("size", [(1, 1), (1, 201), (201, 1), (67, 201), (201, 67)], ids=str)
def test_values_are_accurate_at_other_sizes(isa, real, size):
    layer = MultiHeadAttention(67, 3, head_dim=31, dtype=real, seed=0)
    query, key = (tokens(1, n, 67, dtype=real, seed=n) for n in size)
    result = layer(query, key, causal=True, **EACH)
    assert_layer_accurate(result, layer, query, key, causal=True)


def test_layer_is_made_of_the_public_functions():
    layer = layer_of({})
    x = tokens(BATCH, 13, EMBED)
    qkv = linear(x, layer.weights["in_proj_weight"], layer.weights["in_proj_bias"])
    q, k, v = qkv.reshape(BATCH, 13, 3, HEADS, EMBED // HEADS).transpose(2, 0, 3, 1, 4)
    heads = attention(q, k, v, causal=True).swapaxes(1, 2).reshape(BATCH, 13, EMBED)
    out = linear(heads, layer.weights["out_proj.weight"], layer.weights["out_proj.bias"])
    assert_same(layer(x, causal=True), out)


@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
def test_asking_for_weights_changes_no_bit(more):
    layer = layer_of(more)
    arguments = [tokens(BATCH, 13, n) for n in (EMBED, layer.kdim, layer.vdim)]
    out = layer(*arguments, causal=True)
    assert type(out) is np.ndarray
    each = layer(*arguments, causal=True, **EACH)
    mean = layer(*arguments, causal=True, need_weights=True)
    assert each._fields == mean._fields == ("out", "weights")
    assert_same(each.out, out)
    assert_same(mean.out, out)
    assert_same(mean.weights, each.weights.mean(axis=1))


# ---- One row, one answer -------------------------------------------------------------------------


@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
def test_a_batch_entry_has_the_same_bits_alone_and_without_its_padding(isa, more):
    layer = layer_of(more)
    arguments = [tokens(3, 40, n) for n in (EMBED, layer.kdim, layer.vdim)]
    lengths = np.array([40, 17, 1])
    padding = np.arange(40) >= lengths[:, None]
    together = layer(*arguments, key_padding_mask=padding)
    for i, length in enumerate(lengths):
        alone = layer(*(x[i, :length] for x in arguments))
        assert_same(alone, together[i, :length])


def test_bits_are_those_of_one_thread_and_of_every_isa():
    layer = MultiHeadAttention(256, 8, seed=0)
    x = tokens(2, 131, 256)
    expected = layer(x, causal=True, need_weights=True, threads=1)
    for threads in (1, 2, 3):
        call = partial(layer, x, causal=True, need_weights=True, threads=threads)
        for name, result in sizes.on_every_isa(call):
            assert_same(result, expected, f"{name}, {threads} threads")


def test_products_taken_together_or_apart_have_the_same_bits():
    layer = layer_of({"num_kv_heads": 2})
    x, memory = tokens(BATCH, 13, EMBED), tokens(BATCH, 9, EMBED, seed=1)
    expected = layer(x)
    for key, value in ((x, None), (x, x), (None, x), (x.copy(), x.copy()), (x.copy(), x)):
        assert_same(layer(x, key, value), expected)
    assert_same(layer(x, memory), layer(x, memory, memory.copy()))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
def test_poison_in_padding_reaches_no_result(more, poison):
    layer = layer_of(more)
    arguments = [tokens(BATCH, 13, n) for n in (EMBED, layer.kdim, layer.vdim)]
    hidden = ~random_mask(BATCH, 13)
    expected = layer(*arguments, key_padding_mask=hidden, need_weights=True)
    with np.errstate(invalid="ignore"):
        key, value = (np.where(hidden[..., None], np.float32(poison), x) for x in arguments[1:])
    result = layer(arguments[0], key, value, key_padding_mask=hidden, need_weights=True)
    assert_same(result, expected)


def test_a_row_that_sees_nothing_is_the_output_bias():
    layer = layer_of({})
    out, weights = layer(
        tokens(BATCH, 13, EMBED), key_padding_mask=np.ones((BATCH, 13), bool), need_weights=True
    )
    bias = layer.weights["out_proj.bias"]
    assert_same(out, np.broadcast_to(bias, out.shape))
    assert_same(weights, np.zeros((BATCH, 13, 13), np.float32))


def test_input_is_converted_to_the_dtype_of_the_layer(dtype, real):
    layer = layer_of({}, real.type)
    x = tokens(BATCH, 5, EMBED, dtype=dtype)
    expected = layer(x.astype(real))
    assert expected.dtype == real
    assert_same(layer(x), expected)
    assert_same(layer(x.tolist()), expected)
    assert_same(layer(np.asfortranarray(x)), expected)


def test_empty_axes_have_a_result():
    layer = layer_of({"add_bias_kv": True})
    assert layer(tokens(0, 5, EMBED)).shape == (0, 5, EMBED)
    assert layer(tokens(0, EMBED)).shape == (0, EMBED)
    empty = tokens(BATCH, 0, EMBED)
    out, weights = layer(tokens(BATCH, 5, EMBED), empty, need_weights=True)
    assert out.shape == (BATCH, 5, EMBED)
    assert_same(weights, np.ones((BATCH, 5, 1), np.float32))


@pytest.mark.parametrize("call", [{}, {"causal": True}, {"key_padding_mask": None}], ids=str)
def test_no_array_is_made_but_the_results_of_the_steps(call):
    layer = MultiHeadAttention(128, 4, num_kv_heads=2, seed=0)
    x = tokens(2, 300, 128)
    if "key_padding_mask" in call:
        call = {"key_padding_mask": np.zeros((2, 300), bool)}
    layer(x, **call)
    tracemalloc.start()
    layer(x, **call)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    column = 4 * 2 * 300
    projected, heads, out = 128 + 2 * 64, 128, 128
    assert peak < (projected + heads + out + 10) * column


# ---- Messages ------------------------------------------------------------------------------------

X, MEMORY = tokens(2, 5, 24), tokens(2, 7, 24)
HIDDEN = r"expected bool \(True = hidden\) or float16, bfloat16, float32 or float64 \(added"
MISUSES = [
    (TypeError, {"query": X.astype(int)}, "query has dtype int64, expected float16"),
    (TypeError, {"query": None}, "query has dtype object, expected float16"),
    (TypeError, {"key": MEMORY > 0}, "key has dtype bool, expected float16"),
    (TypeError, {"attn_mask": np.ones((5, 7), int)}, f"attn_mask has dtype int64, {HIDDEN}"),
    (TypeError, {"key_padding_mask": np.ones((2, 7), "u1")}, f"mask has dtype uint8, {HIDDEN}"),
    (TypeError, {"causal": 1}, "causal is 1, expected True or False"),
    (TypeError, {"threads": "2"}, "threads is '2', expected a positive int or None"),
    (ValueError, {"query": X[0, 0]}, r"query has shape \(24,\), expected \(batch, seqlen, 24\)"),
    (ValueError, {"query": X[None]}, r"query has shape \(1, 2, 5, 24\), expected \(batch, s"),
    (ValueError, {"query": X[..., 1:]}, r"query has shape \(2, 5, 23\), .* or \(seqlen, 24\)"),
    (ValueError, {"key": MEMORY[..., 1:]}, r"key has shape \(2, 7, 23\), expected \(batch"),
    (ValueError, {"key": MEMORY[:1]}, r"key has shape \(1, 7, 24\), expected the batch of"),
    (ValueError, {"key": MEMORY[0]}, r"key has shape \(7, 24\), expected the batch of query"),
    (ValueError, {"value": MEMORY[:, 1:]}, r"value has shape \(2, 6, 24\), expected as many"),
    (ValueError, {"value": MEMORY[..., 1:]}, r"value has shape \(2, 7, 23\), expected \(bat"),
    (ValueError, {"attn_mask": np.ones((7, 5), bool)}, r"\(7, 5\), expected \(5, 7\) or \(8, 5, 7"),
    (ValueError, {"attn_mask": np.ones((2, 5, 7), bool)}, r"attn_mask has shape \(2, 5, 7\), exp"),
    (ValueError, {"attn_mask": np.ones((5, 1), bool)}, r"attn_mask has shape \(5, 1\), expected"),
    (ValueError, {"key_padding_mask": np.ones(7)}, r"mask has shape \(7,\), expected \(2, 7\)"),
    (ValueError, {"key_padding_mask": np.ones((2, 5))}, r"has shape \(2, 5\), expected \(2, 7\)"),
]


@pytest.mark.parametrize(("error", "misuse", "message"), MISUSES, ids=[x[-1] for x in MISUSES])
def test_bad_argument_is_named(error, misuse, message):
    for more in ({}, {"add_zero_attn": True}):
        with pytest.raises(error, match=message):
            layer_of(more)(**{"query": X, "key": MEMORY} | misuse)


@pytest.mark.parametrize("polarity", ["attn_mask", "key_padding_mask"])
def test_canary_a_mask_of_the_other_polarity_is_caught(polarity):
    layer = layer_of({})
    call = {"causal": False, "attn_mask": None, "key_padding_mask": None}
    options = terms(call | {polarity: "bool 2" if polarity == "attn_mask" else "bool"}, 13, 13)
    x = tokens(BATCH, 13, EMBED)
    result = layer(x, **{name: ~mask for name, mask in options.items()}, **EACH)
    with pytest.raises(AssertionError, match="weights of hidden keys"):
        assert_layer_accurate(result, layer, x, **options)
    result = result._replace(weights=layer(x, **options, **EACH).weights)
    with pytest.raises(AssertionError, match="out: .* are wrong"):
        assert_layer_accurate(result, layer, x, **options)
