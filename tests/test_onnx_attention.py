"""ONNX's Attention: what its inputs and outputs mean, to the bit, and what is no such model."""

import numpy as np
import pytest
from judge import assert_same, assert_within, tolerance
from sizes import BFLOAT16, lowest, qkv, random, random_mask

import mha_fast

pytest.importorskip("onnx", reason='pip install "mha_fast[onnx]"')

from onnx_models import HOSTILE, OPSETS, OUTPUTS, attend, packed  # noqa: E402


def test_packed_inputs_have_the_bits_of_four_axes(dtype):
    q, k, v = qkv(5, 9, head_dim_v=3, heads=4, kv_heads=2, dtype=dtype)
    expected = mha_fast.attention(q, k, v)
    y = attend(*map(packed, (q, k, v)), q_num_heads=4, kv_num_heads=2)
    assert_same(y, packed(expected))
    assert_same(attend(q, k, v), expected)
    assert_same(attend(q, k, v, q_num_heads=4, kv_num_heads=2), expected)


def test_past_comes_before_the_keys_and_shifts_the_positions():
    q, k, v = qkv(5, 9, heads=4, kv_heads=2)
    past = {"past_key": k[:, :, :4].copy(), "past_value": v[:, :, :4].copy()}
    new = [packed(x) for x in (q, k[:, :, 4:], v[:, :, 4:])]
    y, *present = attend(
        *new, OUTPUTS[:3], inputs=past, is_causal=1, left_window_size=2,
        q_num_heads=4, kv_num_heads=2,
    )  # fmt: skip
    expected = mha_fast.attention(q, k, v, causal=True, window=(2, None), q_offset=4)
    assert_same(y, packed(expected))
    for x, whole in zip(present, (k, v), strict=True):
        assert_same(x, whole)


def test_present_without_a_past_is_the_keys_by_heads():
    q, k, v = qkv(5, 9)
    _, *present = attend(*map(packed, (q, k, v)), OUTPUTS[:3], q_num_heads=2, kv_num_heads=2)
    for x, whole in zip(present, (k, v), strict=True):
        assert_same(x, whole)


def test_lengths_set_positions_and_what_lies_past_them_is_never_read():
    q, k, v = qkv(3, 9)
    lengths = np.array([0, 9])
    expected = mha_fast.attention(q, k, v, causal=True, kv_lengths=lengths)
    assert (expected[0] == 0).all() and (expected[1] != 0).all()
    k[0], v[0] = np.nan, np.nan
    assert_same(attend(q, k, v, inputs={"nonpad_kv_seqlen": lengths}, is_causal=1), expected)


@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 5, 9), (2, 1, 5, 9), (1, 1, 1, 1)], ids=str)
def test_mask_broadcasts_from_the_right_and_past_its_end_hides(shape):
    q, k, v = qkv(5, 9)
    mask = random_mask(*shape)
    mask.flat[0] = True
    padded = np.zeros((*shape[:-1], 9), bool)
    padded[..., : shape[-1]] = mask
    expected = mha_fast.attention(q, k, v, padded)
    assert_same(attend(q, k, v, inputs={"attn_mask": mask}), expected)
    short = padded[..., :4].copy()
    padded[..., 4:] = False
    expected = mha_fast.attention(q, k, v, padded)
    assert_same(attend(q, k, v, inputs={"attn_mask": short}), expected)
    terms = np.where(short, 0, -np.inf).astype(np.float32)
    assert_same(attend(q, k, v, inputs={"attn_mask": terms}), expected)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8], ids=["int64", "uint8"])
def test_integers_in_a_mask_are_added_to_the_scores(dtype):
    q, k, v = qkv(5, 9)
    mask = np.arange(45).reshape(5, 9).astype(dtype)
    expected = mha_fast.attention(q, k, v, mask.astype(np.float32))
    assert_same(attend(q, k, v, inputs={"attn_mask": mask}), expected)


def scores_of(mode, *arrays, **more):
    return attend(*arrays, ["Y", "", "", "scores"], qk_matmul_output_mode=mode, **more)


@pytest.mark.parametrize("opset", OPSETS)
def test_stages_of_the_scores_are_those_of_the_text(opset):
    """The raw product is scaled and not yet capped."""
    q, k, v = qkv(5, 9)
    mask = random(5, 7, seed=1)
    more = {"inputs": {"attn_mask": mask}, "is_causal": 1, "scale": 3.0, "opset": opset}
    product = 3 * (q.astype(float) @ k.astype(float).mT)
    terms = np.where(np.tri(5, 9, dtype=bool), np.pad(mask, ((0, 0), (0, 2))), -np.inf)
    terms[:, 7:] = -np.inf
    capped = 2 * np.tanh(product / 2)
    size = np.abs(product).max(axis=-1) + np.abs(mask).max()
    bound = np.broadcast_to(tolerance(size, np.float32)[..., None], product.shape)
    y = attend(q, k, v, softcap=2.0, **more)
    for mode, softcap, exact in [
        (0, 2, product), (0, 0, product), (1, 2, capped), (1, 0, product),
        (2, 2, capped + terms), (2, 0, product + terms),
    ]:  # fmt: skip
        out, s = scores_of(mode, q, k, v, softcap=float(softcap), **more)
        seen = exact != -np.inf
        assert s.dtype == np.float32 and np.array_equal(s != -np.inf, seen)
        error = np.abs(np.where(seen, s, 0) - np.where(seen, exact, 0))
        assert_within(error, bound, f"mode {mode}, softcap {softcap}")
        assert np.array_equal(out, y) == (softcap == 2)
    expected = mha_fast.attention(
        q, k, v, terms.astype(np.float32), scale=3, softcap=2.0, return_weights=True
    )
    for result, wanted in zip(scores_of(3, q, k, v, softcap=2.0, **more), expected, strict=True):
        assert_same(result, wanted)


def test_raw_products_are_of_all_keys_past_every_length():
    arrays = qkv(3, 9)
    more = {"inputs": {"nonpad_kv_seqlen": np.array([2, 5])}}
    assert_same(scores_of(0, *arrays, **more)[1], scores_of(0, *arrays)[1])
    _, s = scores_of(2, *arrays, **more)
    for row, length in zip(s, (2, 5), strict=True):
        assert np.isneginf(row[..., length:]).all() and np.isfinite(row[..., :length]).all()


@pytest.mark.parametrize(("precision", "wide"), [(1, False), (10, False), (11, True), (16, False)])
def test_double_precision_is_that_of_float64_rounded_once(precision, wide):
    q, k, v = qkv(5, 9)
    arrays = [x.astype(np.float64) for x in (q, k, v)] if wide else (q, k, v)
    expected = mha_fast.attention(*arrays, return_weights=True)
    results = scores_of(3, q, k, v, softmax_precision=precision)
    for x, wanted in zip(results, expected, strict=True):
        assert_same(x, wanted.astype(np.float32))


@pytest.mark.parametrize("other", [np.float16, BFLOAT16, np.float64], ids=str)
def test_result_has_the_dtype_of_q_and_values_their_own(other):
    q, k, v = qkv(5, 9)
    y, _, present = attend(q, k, v.astype(other), OUTPUTS[:3])
    assert_same(y, mha_fast.attention(q, k, v.astype(other)).astype(np.float32))
    assert present.dtype == other


def test_scores_that_a_small_dtype_cannot_hold_are_infinite():
    q = np.full((1, 1, 1, 2), 300, np.float16)
    y, s = scores_of(0, q, q, q, scale=1.0)
    assert y.dtype == s.dtype == np.float16 and (y == 300).all() and np.isposinf(s).all()
    mask = np.full((1, 1), lowest(np.float16), np.float16)
    _, s = scores_of(2, -q, q, q, inputs={"attn_mask": mask})
    assert np.isneginf(s).all()


def test_negative_scale_and_empty_axes_are_taken():
    q, k, v = qkv(5, 9)
    assert_same(attend(q, k, v, scale=-0.5), mha_fast.attention(q, k, v, scale=-0.5))
    for x in (q[:, :, :0], q[:0]):
        batch = slice(len(x))
        y = attend(packed(x), packed(k[batch]), packed(v[batch]), q_num_heads=2, kv_num_heads=2)
        assert y.shape == (len(x), x.shape[2], 16)
    assert (attend(q, k[:, :, :0], v[:, :, :0]) == 0).all()


@pytest.mark.parametrize("length", [*HOSTILE, 10])
def test_length_that_is_no_length_of_the_cache_is_refused(length):
    q, k, v = qkv(3, 9)
    with pytest.raises(ValueError, match=r"nonpad_kv_seqlen holds .*, expected 0 to 9"):
        attend(q, k, v, inputs={"nonpad_kv_seqlen": np.array([9, length])})


Q, K, V = qkv(5, 9, heads=4, kv_heads=2)
PAST = {"past_key": K, "past_value": V}
THREE = ("Y", "present_key", "present_value")
ERRORS = [
    ((Q, packed(K), V), {}, "Q, K and V have 4, 3 and 4 axes"),
    ((Q[0, 0], K[0, 0], V[0, 0]), {}, r"Q has shape \(5, 8\), expected three or four axes"),
    (map(packed, (Q, K, V)), {"q_num_heads": 4}, "kv_num_heads is missing"),
    (map(packed, (Q, K, V)), {"q_num_heads": 3, "kv_num_heads": 2}, "q_num_heads is 3, expected a"),
    (map(packed, (Q, K, V)), {"q_num_heads": 0, "kv_num_heads": 2}, "q_num_heads is 0"),
    ((Q, K, V), {"kv_num_heads": 4}, "kv_num_heads is 4, expected 2 as in K, or none"),
    ((Q, K[:, :1], V), {}, "v has 2 heads, expected 1 as in k"),
    ((Q[:, :3], K, V), {}, "k has 2 heads, which does not divide q's 3"),
    ((Q, K[..., :7], V), {}, "k has head_dim 7, expected 8 as in q"),
    ((Q, K, V), {"inputs": {"past_key": K}, "outputs": THREE}, "past_value missing, expected past"),
    ((Q, K, V), {"inputs": PAST}, "present_key, present_value missing"),
    ((Q, K, V), {"inputs": PAST | {"past_key": K[:1]}, "outputs": THREE}, "past_key has shape"),
    (
        (Q, K, V),
        {"inputs": PAST | {"nonpad_kv_seqlen": np.array([1, 1])}, "outputs": THREE},
        "nonpad_kv_seqlen is given beside past_key",
    ),
    ((Q, K, V), {"inputs": {"nonpad_kv_seqlen": np.ones(3, int)}}, "nonpad_kv_seqlen has shape"),
    ((Q, K, V), {"inputs": {"attn_mask": np.array(True)}}, r"attn_mask has shape \(\), expected"),
    ((Q, K, V), {"inputs": {"attn_mask": np.ones((1, 1, 1, 5, 9))}}, "expected one to four axes"),
    ((Q, K, V), {"inputs": {"attn_mask": np.ones(10)}}, r"attn_mask has shape \(10,\), expected"),
    ((Q, K, V), {"inputs": {"attn_mask": np.ones((3, 5, 9))}}, "attn_mask has shape"),
    ((Q, K, V), {"left_window_size": -2}, r"left_window_size is -2, expected -1 \(open\) or more"),
    ((Q, K, V), {"right_window_size": -(2**63)}, "right_window_size is -9223372036854775808"),
    ((Q, K, V), {"qk_matmul_output_mode": 4}, "qk_matmul_output_mode is 4, expected 0 to 3"),
    ((Q, K, V), {"softmax_precision": 7}, r"softmax_precision is 7, expected one of \(1, 10, 11"),
    ((Q, K, V), {"softcap": -1.0}, "softcap is -1.0, expected a number"),
    ((Q, K, V), {"scale": np.inf}, "scale is inf, expected a finite number"),
]


@pytest.mark.parametrize(("arrays", "more", "message"), ERRORS, ids=[row[2] for row in ERRORS])
def test_bad_models_are_told_what_is_wrong(arrays, more, message):
    with pytest.raises(ValueError, match=message):
        attend(*arrays, **more)
