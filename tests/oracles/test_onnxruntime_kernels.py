"""Operators of com.microsoft: sessions with ours agree with onnxruntime's own kernels. Optional."""

import itertools

import numpy as np
import pytest
from judge import assert_accurate, assert_same
from sizes import qkv, random, random_mask

import mha_fast

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from onnx_models import packed  # noqa: E402
from sessions import contrib_model, run, session_of  # noqa: E402

PRESENT = ["output", "present_key", "present_value"]


def assert_agree(ours, theirs, q, k, v, mask=None, **options):
    """Both obey the accuracy rule for the same question; caches are equal to the bit."""
    for y in (ours[0], theirs[0]):
        assert_accurate(by_heads(y, q.shape[1]), q, k, v, mask, **options)
    for x, y in zip(ours[1:], theirs[1:], strict=True):
        assert_same(x, y)


def by_heads(y, heads):
    batch, seqlen, hidden = y.shape
    return y.reshape(batch, seqlen, heads, hidden // heads).swapaxes(1, 2)


@pytest.fixture
def calls(spied):
    """The options of each call of the kernel by a session."""
    return spied("mha_fast.onnx.microsoft.attention")


@pytest.fixture
def both(calls):
    """The outputs of our operator and of onnxruntime's."""

    def outputs_of(op, inputs, outputs, **attributes):
        model = contrib_model(op, inputs, outputs, **attributes)
        theirs = run(model, inputs, ours=False)
        assert calls == []
        ours = run(model, inputs)
        assert len(calls) == 1
        return ours, theirs

    return outputs_of


# ---- MultiHeadAttention --------------------------------------------------------------------------


def mha_inputs(q, k, v, **more):
    names = "bias", "key_padding_mask", "attention_bias", "past_key", "past_value"
    first = dict(zip(("query", "key", "value"), map(packed, (q, k, v)), strict=True))
    return first | {name: more.get(name) for name in names}


@pytest.mark.parametrize("size", [(1, 1), (13, 67), (67, 13), (201, 201)], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_multi_head_attention_agrees(both, size, scale):
    q, k, v = qkv(*size, 16, 24)
    attributes = {"num_heads": 2} | ({} if scale is None else {"scale": scale})
    results = both("MultiHeadAttention", mha_inputs(q, k, v), PRESENT[:1], **attributes)
    assert_agree(*results, q, k, v, scale=scale)


def test_multi_head_attention_is_causal_if_unidirectional(both):
    q, k, v = qkv(67, 67, 16)
    inputs = mha_inputs(q, k, v)
    results = both("MultiHeadAttention", inputs, PRESENT[:1], num_heads=2, unidirectional=1)
    assert_agree(*results, q, k, v, causal=True)


def test_bias_of_the_projections_is_added_to_all_three(both):
    q, k, v = qkv(13, 67, 16, 24)
    bias = random(2 * 2 * 16 + 2 * 24, seed=5)
    parts = [x.reshape(2, 1, -1) for x in np.split(bias, [32, 64])]
    results = both("MultiHeadAttention", mha_inputs(q, k, v, bias=bias), PRESENT[:1], num_heads=2)
    assert_agree(*results, *(x + b for x, b in zip((q, k, v), parts, strict=True)))


def test_keys_that_come_by_heads_have_their_bias(both):
    q, k, v = qkv(13, 67, 16)
    bias = random(96, seed=5)
    inputs = mha_inputs(q, k, v, bias=bias) | {"key": k, "value": v}
    results = both("MultiHeadAttention", inputs, PRESENT[:1], num_heads=2)
    assert_agree(*results, q + bias[:32].reshape(2, 1, 16), k, v)


@pytest.mark.parametrize("single", list(itertools.product([False, True], repeat=2)), ids=str)
def test_attention_bias_broadcasts_over_batch_and_heads(both, single):
    q, k, v = qkv(13, 67, 16)
    shape = [1 if s else 2 for s in single]
    bias = random(*shape, 13, 67, seed=5)
    inputs = mha_inputs(q, k, v, attention_bias=bias)
    results = both("MultiHeadAttention", inputs, PRESENT[:1], num_heads=2)
    assert_agree(*results, q, k, v, bias=bias)


def padding_of(kind):
    """A mask of onnxruntime, and the same as ours over (2, 1, 13, 67)."""
    if kind == "lengths":
        lengths = np.array([67, 20], np.int32)
        return lengths, (np.arange(67) < lengths[:, None])[:, None, None]
    shape = (2, 67) if kind == "keys" else (2, 13, 67)
    mask = random_mask(*shape)
    mask[..., 0] = True
    return mask.astype(np.int32), mask.reshape(2, 1, -1, 67)


@pytest.mark.parametrize("kind", ["lengths", "keys", "rows"])
def test_key_padding_masks_hide_the_same_keys(both, kind):
    q, k, v = qkv(13, 67, 16)
    padding, mask = padding_of(kind)
    inputs = mha_inputs(q, k, v, key_padding_mask=padding)
    results = both("MultiHeadAttention", inputs, PRESENT[:1], num_heads=2)
    assert_agree(*results, q, k, v, mask)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("length", [0, 35])
def test_past_keys_come_first_and_present_is_all_of_them(both, causal, length):
    q, k, v = qkv(40 - length, 40, 16)
    new = mha_inputs(q, k[:, :, length:], v[:, :, length:])
    past = {"past_key": k[:, :, :length], "past_value": v[:, :, :length]}
    results = both("MultiHeadAttention", new | past, PRESENT, num_heads=2, unidirectional=causal)
    assert_agree(*results, q, k, v, causal=bool(causal))
    assert_same(results[0][1], k)


# ---- GroupQueryAttention -------------------------------------------------------------------------

HEADS, KV_HEADS, WIDTH = 6, 2, 16
ATTRIBUTES = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}


def gqa_inputs(q, k, v, lengths, total, **more):
    """New rows packed; lengths count all keys of a batch row."""
    names = ["past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache"]
    names += ["sin_cache", "position_ids", "attention_bias", "head_sink"]
    more["seqlens_k"] = np.array(lengths, np.int32) - 1
    more["total_sequence_length"] = np.array(total, np.int32)
    first = dict(zip(("query", "key", "value"), map(packed, (q, k, v)), strict=True))
    return first | {name: more.get(name) for name in names}


def arrays(seqlen_q, seqlen_k, batch=2, dtype=np.float32):
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "batch": (batch,), "dtype": dtype}
    return qkv(seqlen_q, seqlen_k, WIDTH, **shape)


OPTIONS = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "window": ({"local_window_size": 7}, {"window": (6, None)}),
    "smooth": ({"smooth_softmax": 1}, {"sinks": np.zeros(HEADS, np.float32)}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("seqlen", [1, 5, 67, 201])
def test_first_prompt_agrees(both, option, seqlen):
    attributes, options = OPTIONS[option]
    q, k, v = arrays(seqlen, seqlen)
    inputs = gqa_inputs(q, k, v, [seqlen] * 2, seqlen)
    results = both("GroupQueryAttention", inputs, PRESENT, **ATTRIBUTES, **attributes)
    assert_agree(*results, q, k, v, causal=True, **options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("room", [40, 60])
def test_decoding_after_pasts_of_different_lengths_agrees(both, option, room):
    attributes, options = OPTIONS[option]
    lengths = [40, 23]
    q, k, v = arrays(1, 40)
    past = [np.zeros((2, KV_HEADS, room, WIDTH), np.float32) for _ in range(2)]
    new = []
    for cache, x in zip(past, (k, v), strict=True):
        for row, length in enumerate(lengths):
            cache[row, :, : length - 1] = x[row, :, : length - 1]
        new.append(np.stack([x[row, :, n - 1 : n] for row, n in enumerate(lengths)]))
    inputs = gqa_inputs(q, *new, lengths, 40, past_key=past[0], past_value=past[1])
    results = both("GroupQueryAttention", inputs, PRESENT, **ATTRIBUTES, **attributes)
    assert_agree(*results, q, k, v, causal=True, kv_lengths=np.array(lengths), **options)


@pytest.mark.parametrize("length", [0, 35])
def test_chunk_of_a_prompt_continues_its_past(both, length):
    q, k, v = arrays(40 - length, 40, batch=1)
    past = {"past_key": k[:, :, :length], "past_value": v[:, :, :length]}
    inputs = gqa_inputs(q, k[:, :, length:], v[:, :, length:], [40], 40, **past)
    results = both("GroupQueryAttention", inputs, PRESENT, **ATTRIBUTES)
    assert_agree(*results, q, k, v, causal=True)


def test_prompts_padded_at_their_end_agree_where_they_are_not(both):
    lengths = [20, 13]
    q, k, v = arrays(20, 20)
    inputs = gqa_inputs(q, k, v, lengths, 20)
    results = both("GroupQueryAttention", inputs, PRESENT[:1], **ATTRIBUTES)
    for row, length in enumerate(lengths):
        part = [x[row : row + 1, :, :length] for x in (q, k, v)]
        assert_agree(*([y[0][row : row + 1, :length]] for y in results), *part, causal=True)


def test_queries_keys_and_values_in_one_input_are_those_of_three(both):
    q, k, v = arrays(13, 13)
    inputs = gqa_inputs(q, k, v, [13, 13], 13)
    one = inputs | {"query": packed(np.concatenate([q, k, v], axis=1)), "key": None, "value": None}
    results = both("GroupQueryAttention", one, PRESENT, **ATTRIBUTES)
    assert_agree(*results, q, k, v, causal=True)


def test_attention_bias_and_sinks_agree(both):
    q, k, v = arrays(13, 13)
    bias, sinks = random(1, HEADS, 13, 13, seed=5), random(HEADS, seed=6)
    inputs = gqa_inputs(q, k, v, [13, 13], 13, attention_bias=bias, head_sink=sinks)
    results = both("GroupQueryAttention", inputs, PRESENT, **ATTRIBUTES)
    assert_agree(*results, q, k, v, causal=True, bias=bias, sinks=sinks)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("places", ["prompt", "decode", "given"])
def test_rotary_positions_are_those_of_onnxruntime(both, interleaved, places):
    seqlen, length = (13, 13) if places == "prompt" else (1, 40)
    q, k, v = arrays(seqlen, length)
    cos, sin = mha_fast.rotary_tables(64, WIDTH)
    how = {"interleaved": bool(interleaved)}
    turned = mha_fast.rotary(k, cos, sin, **how)
    past, positions, ids = {}, np.arange(length - seqlen, length), None
    if places != "prompt":
        past = {"past_key": turned[:, :, :-1], "past_value": v[:, :, :-1]}
    if places == "given":
        ids = np.array([[39], [50]])
        turned[1, :, -1:] = mha_fast.rotary(k[1, :, -1:], cos[50:51], sin[50:51], **how)
        positions = ids
    inputs = gqa_inputs(
        q, k[:, :, -seqlen:], v[:, :, -seqlen:], [length] * 2, length,
        cos_cache=cos, sin_cache=sin, position_ids=ids, **past,
    )  # fmt: skip
    results = both(
        "GroupQueryAttention", inputs, PRESENT, **ATTRIBUTES, do_rotary=1,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    turned_q = mha_fast.rotary(q, cos, sin, positions=positions, **how)
    for y, *present in results:
        assert_accurate(by_heads(y, HEADS), turned_q, present[0], v, causal=True)
    assert_same(results[0][1], turned)


def test_past_and_present_of_one_buffer_are_written_in_place():
    """As onnxruntime-genai binds them: room for 64 keys, 10 steps, and not a byte copied."""
    q, k, v = arrays(64, 64, batch=1)
    caches = [np.full((1, KV_HEADS, 64, WIDTH), np.nan, np.float32) for _ in range(2)]
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    bound = [value(x) for x in caches]
    caches = [x.numpy() for x in bound]
    outputs, begin = [], 0
    shapes = gqa_inputs(q, k, v, [64], 64, past_key=caches[0], past_value=caches[1])
    model = contrib_model("GroupQueryAttention", shapes, PRESENT, **ATTRIBUTES)
    for name in range(3):
        model.graph.input[name].type.tensor_type.shape.dim[1].ClearField("dim_value")
    session = session_of(model)
    for seqlen in (37, *[1] * 9):
        end = begin + seqlen
        part = [x[:, :, begin:end] for x in (q, k, v)]
        inputs = gqa_inputs(*part, [end], end)
        binding = session.io_binding()
        for name, x in inputs.items():
            if x is not None:
                binding.bind_cpu_input(name, np.ascontiguousarray(x))
        for names in (("past_key", "present_key"), ("past_value", "present_value")):
            cache = bound[names[0] == "past_value"]
            binding.bind_ortvalue_input(names[0], cache)
            binding.bind_ortvalue_output(names[1], cache)
        binding.bind_output("output")
        session.run_with_iobinding(binding)
        outputs.append(by_heads(binding.get_outputs()[2].numpy(), HEADS))
        begin = end
    assert_same(
        np.concatenate(outputs, axis=2),
        mha_fast.attention(*(x[:, :, :end] for x in (q, k, v)), causal=True),
    )
    for cache, x in zip(bound, (k, v), strict=True):
        assert_same(cache.numpy()[:, :, :end], x[:, :, :end])
        assert np.isnan(cache.numpy()[:, :, end:]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_dtypes_have_the_bits_of_the_function(dtype):
    q, k, v = arrays(13, 13, dtype=dtype)
    inputs = gqa_inputs(q, k, v, [13, 13], 13)
    (y,) = run(contrib_model("GroupQueryAttention", inputs, PRESENT[:1], **ATTRIBUTES), inputs)
    assert_same(y, packed(mha_fast.attention(q, k, v, causal=True)))


# ---- What is refused -----------------------------------------------------------------------------


def decoding(**more):
    """Inputs of one more key after 39."""
    q, k, v = arrays(1, 40)
    past = {"past_key": k[:, :, :39], "past_value": v[:, :, :39]}
    return gqa_inputs(q, k[:, :, 39:], v[:, :, 39:], [40, 40], 40, **past) | more


def int32(*numbers):
    return np.array(numbers, np.int32)


TABLE = random(50, WIDTH // 2)
ROTARY = {"cos_cache": TABLE, "sin_cache": TABLE}
REFUSED = [
    ({"seqlens_k": int32(39, -1)}, {}, "seqlens_k holds -1 to 39, expected 0 to 39"),
    ({"seqlens_k": int32(39, 40)}, {}, "seqlens_k holds 39 to 40, expected 0 to 39"),
    ({"seqlens_k": int32(39, 2**31 - 1)}, {}, "seqlens_k holds 39 to 2147483647, expected 0"),
    ({"seqlens_k": int32(39)}, {}, "seqlens_k has 1 entries, expected 2"),
    ({"total_sequence_length": int32(0)}, {}, "total_sequence_length is 0, expected at least 1"),
    (
        {"seqlens_k": int32(49, 49), "total_sequence_length": int32(50)},
        {},
        "past_key has 39 rows, expected at least 49",
    ),
    ({"past_key": random(2, 1, 39, WIDTH)}, {}, r"past_key has shape \(2, 1, 39, 16\), expected"),
    ({"past_value": random(2, 2, 39)}, {}, r"past_value has shape \(2, 2, 39\), expected"),
    ({"value": None}, {}, "value is missing"),
    ({"key": random(2, 1, 33)}, {}, "kv_num_heads is 2, expected a divisor of key's 33"),
    ({}, {"do_rotary": 1}, "cos_cache is missing"),
    (
        ROTARY | {"position_ids": np.array([[0], [50]])},
        {"do_rotary": 1},
        "positions are 0 to 50, expected 0 to 49",
    ),
    (
        ROTARY | {"position_ids": np.array([[0], [-1]])},
        {"do_rotary": 1},
        "positions are -1 to 0, expected 0 to 49",
    ),
    ({x: TABLE[:39] for x in ROTARY}, {"do_rotary": 1}, "positions are 39 to 39, expected 0 to 38"),
    (ROTARY | {"sin_cache": TABLE[:, :4]}, {"do_rotary": 1}, "cos_cache has 8 columns and sin_c"),
    ({}, {"sliding_window_cache": 1}, "GroupQueryAttention has sliding_window_cache=1, expected 0"),
    ({}, {"qk_output": 1}, "qk_output=1, expected 0; leave GroupQueryAttention out"),
]


@pytest.mark.parametrize(("inputs", "attributes", "message"), REFUSED, ids=[x[2] for x in REFUSED])
def test_hostile_and_unsupported_nodes_are_errors(inputs, attributes, message):
    inputs = decoding(**inputs)
    model = contrib_model("GroupQueryAttention", inputs, PRESENT, **ATTRIBUTES, **attributes)
    with pytest.raises(Exception, match=message):
        run(model, inputs)


def test_other_operators_of_the_domain_stay_onnxruntimes():
    x = random(2, 3, 8)
    inputs = {"X": x, "bias": random(8)}
    model = contrib_model("BiasGelu", inputs, ["output"])
    assert_same(run(model, inputs)[0], run(model, inputs, ours=False)[0])
