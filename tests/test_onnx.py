"""The door to ONNX: the operators by ONNX's own cases, and what those do not reach."""

import unittest
import warnings

import numpy as np
import pytest
from judge import assert_same
from sizes import BFLOAT16, lowest, qkv, random, random_mask

import mha_fast

onnx = pytest.importorskip("onnx", reason='pip install "mha_fast[onnx]"')

import onnx.backend.test  # noqa: E402
import onnx.reference  # noqa: E402

from mha_fast.onnx import Backend, ReferenceEvaluator, ops  # noqa: E402

CASES = {"attention": 93, "rotary_embedding": 8, "tensorscatter": 3}  # of onnx 1.23.2
INPUTS = {
    "Attention": "Q K V attn_mask past_key past_value nonpad_kv_seqlen".split(),
    "RotaryEmbedding": "X cos_cache sin_cache position_ids".split(),
    "TensorScatter": "past_cache update write_indices".split(),
}
OUTPUTS = "Y present_key present_value qk_matmul_output".split()
OPSETS = [23, 24, 25, onnx.defs.onnx_opset_version()]
HOSTILE = [-1, 2**63 - 1, -(2**63)]


def node_of(op, inputs, outputs=("Y",), **attributes):
    names = [name if name in inputs else "" for name in INPUTS[op]]
    while not names[-1]:
        names.pop()
    return onnx.helper.make_node(op, names, list(outputs), **attributes)


def model_of(nodes, inputs, outputs, opset=25, functions=()):
    """A model of nodes over arrays by name."""
    of = onnx.helper.np_dtype_to_tensor_dtype
    tensor = onnx.helper.make_tensor_value_info
    given = [tensor(name, of(x.dtype), x.shape) for name, x in inputs.items()]
    made = [tensor(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = onnx.helper.make_graph(nodes, "test", given, made)
    imports = [onnx.helper.make_opsetid("", opset)]
    imports += [onnx.helper.make_opsetid(f.domain, 1) for f in functions]
    return onnx.helper.make_model(graph, opset_imports=imports, functions=functions)


def run(op, inputs, outputs=("Y",), opset=25, **attributes):
    """Outputs of one operator; `inputs` by name."""
    model = model_of([node_of(op, inputs, outputs, **attributes)], inputs, filter(None, outputs))
    model.opset_import[0].version = opset
    results = ReferenceEvaluator(model).run(None, inputs)
    return results[0] if len(results) == 1 else results


def attend(q, k, v, outputs=("Y",), opset=25, inputs=(), **attributes):
    return run("Attention", {"Q": q, "K": k, "V": v, **dict(inputs)}, outputs, opset, **attributes)


def packed(x):
    return x.swapaxes(-2, -3).reshape(len(x), x.shape[2], -1)


@pytest.fixture
def calls(monkeypatch):
    """The options of each call of attention by the operator."""
    seen = []

    def spy(*arrays, **options):
        seen.append(options)
        return mha_fast.attention(*arrays, **options)

    monkeypatch.setattr("mha_fast.onnx.attention.attention", spy)
    return seen


# ---- ONNX's own cases ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases():
    """ONNX's tests of our operators: one for each name."""
    with warnings.catch_warnings():  # of the cases of other operators
        warnings.simplefilter("ignore")
        runner = onnx.backend.test.BackendTest(Backend, __name__)
    runner.include(rf"^test_({'|'.join(CASES)}).*_cpu$").exclude("expanded")
    case = runner.test_cases["OnnxBackendNodeModelTest"]
    names = unittest.defaultTestLoader.getTestCaseNames(case)
    names = [x for x in names if not getattr(getattr(case, x), "__unittest_skip__", False)]
    return {name: case(name) for name in names}


def failing(cases):
    """Names of the cases that do not pass; none may be skipped."""
    bad = set()
    for name, case in cases.items():
        result = case.run()
        assert result.testsRun == 1 and not result.skipped, name
        if not result.wasSuccessful():
            bad.add(name)
    return bad


def test_every_case_of_onnx_passes_and_none_is_skipped(cases):
    for op, count in CASES.items():
        assert sum(name.startswith(f"test_{op}") for name in cases) == count, op
    assert len(cases) == sum(CASES.values())
    assert failing(cases) == set()


def test_every_case_of_attention_runs_on_the_kernel(cases, calls):
    for name, case in cases.items():
        if name.startswith("test_attention"):
            calls.clear()
            case.run()
            assert len(calls) == 1, name


def wide_window(q, k, v, **options):
    left, right = options["window"]
    window = (left if left is None else left + 1, right)
    return mha_fast.attention(q, k, v, **options | {"window": window})


def tiled_heads(q, k, v, **options):
    """As onnx had it before 1.20: query head h reads KV head h % kv_heads."""
    k, v = (np.tile(x, (1, q.shape[1] // x.shape[1], 1, 1)) for x in (k, v))
    return mha_fast.attention(q, k, v, **options)


def last_key_for_all(q, k, v, **options):
    """The default of `attention`, where ONNX counts from the first key."""
    return mha_fast.attention(q, k, v, **options | {"q_offset": None})


@pytest.mark.parametrize(
    ("fault", "least", "word"),
    [(wide_window, 9, "window"), (tiled_heads, 15, "gqa"), (last_key_for_all, 15, "causal")],
)
def test_canary_a_planted_fault_fails_cases(cases, monkeypatch, fault, least, word):
    monkeypatch.setattr("mha_fast.onnx.attention.attention", fault)
    bad = failing(cases)
    assert len(bad) >= least and any(word in name for name in bad), sorted(bad)


# ---- How models find the operators ---------------------------------------------------------------


@pytest.mark.parametrize("opset", OPSETS)
def test_evaluators_of_onnx_and_ours_take_the_operator_at_every_opset(opset, calls):
    q, k, v = qkv(5, 9, heads=4, kv_heads=2)
    inputs = {"Q": q, "K": k, "V": v}
    model = model_of([node_of("Attention", inputs, is_causal=1)], inputs, ["Y"], opset)
    onnx.checker.check_model(model)
    for evaluator in (
        onnx.reference.ReferenceEvaluator(model, new_ops=ops),
        ReferenceEvaluator(model),
        ReferenceEvaluator(model.SerializeToString()),
    ):
        calls.clear()
        (y,) = evaluator.run(None, inputs)
        assert len(calls) == 1
        assert_same(y, mha_fast.attention(q, k, v, causal=True, q_offset=0))


def test_operators_of_the_caller_come_before_ours():
    class Attention(ops[0]):
        def _run(self, *inputs, **attributes):
            return (np.zeros(1),)

    q, k, v = qkv(5, 9)
    inputs = {"Q": q, "K": k, "V": v}
    model = model_of([node_of("Attention", inputs)], inputs, ["Y"])
    assert ReferenceEvaluator(model, new_ops=[Attention]).run(None, inputs)[0].shape == (1,)


def test_evaluator_reaches_into_functions_of_the_model(calls):
    q, k, v = qkv(5, 9)
    imports = [onnx.helper.make_opsetid("", 25)]
    inside = onnx.helper.make_node("Attention", ["Q", "K", "V"], ["Y"])
    function = onnx.helper.make_function("own", "Block", ["Q", "K", "V"], ["Y"], [inside], imports)
    node = onnx.helper.make_node("Block", ["Q", "K", "V"], ["Y"], domain="own")
    inputs = {"Q": q, "K": k, "V": v}
    model = model_of([node], inputs, ["Y"], functions=[function])
    assert_same(ReferenceEvaluator(model).run(None, inputs)[0], mha_fast.attention(q, k, v))
    assert_same(Backend.run_model(model, [q, k, v])[0], mha_fast.attention(q, k, v))
    assert len(calls) == 2


def test_output_without_a_name_is_no_input_of_the_next_operator():
    """onnx's own operator leaves it under "", where the next one finds it as its mask."""
    q, k, v = qkv(9, 9)
    inputs = {"Q": q, "K": k, "V": v}
    first = node_of("Attention", inputs, ["y", "", "", "raw"])
    second = onnx.helper.make_node("Attention", ["y", "K", "V", "", "", "", "n"], ["Y"])
    inputs["n"] = np.full(2, 9)
    (y,) = ReferenceEvaluator(model_of([first, second], inputs, ["Y"])).run(None, inputs)
    assert_same(y, mha_fast.attention(mha_fast.attention(q, k, v), k, v))


def test_import_of_the_package_does_not_load_onnx(output_of):
    assert output_of("import sys, mha_fast; print('onnx' in sys.modules)") == "False"


def test_backend_runs_nodes_and_models_on_the_cpu_alone():
    q, k, v = qkv(5, 9)
    expected = mha_fast.attention(q, k, v)
    inputs = {"Q": q, "K": k, "V": v}
    node = node_of("Attention", inputs)
    assert_same(Backend.run_node(node, [q, k, v])[0], expected)
    model = model_of([node], inputs, ["Y"])
    assert_same(Backend.prepare(model).run([q, k, v])[0], expected)
    model.graph.initializer.append(onnx.numpy_helper.from_array(v, "V"))
    assert_same(Backend.run_model(model, [q, k])[0], expected)
    assert [Backend.supports_device(x) for x in ("CPU", "CPU:0", "CUDA")] == [True, True, False]


def test_backend_refuses_a_model_that_the_opset_does_not_know():
    inputs = dict(zip("QKV", qkv(5, 9), strict=True))
    model = model_of([node_of("Attention", inputs, left_window_size=1)], inputs, ["Y"], opset=24)
    with pytest.raises(onnx.checker.ValidationError, match="left_window_size"):
        Backend.prepare(model)


# ---- What the inputs and outputs mean ------------------------------------------------------------


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


@pytest.mark.parametrize("opset", OPSETS)
def test_stages_of_the_scores_are_those_of_the_text(opset):
    """Of whole numbers, so that products and sums are exact. The raw product is before the cap."""
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-4, 5, (2, 3, n, 8)).astype(np.float32) for n in (5, 9))
    mask = rng.integers(-9, 9, (5, 7)).astype(np.float32)
    more = {"opset": opset, "inputs": {"attn_mask": mask}, "is_causal": 1, "scale": 1.0}

    def stage(mode, **softcap):
        outputs = ["Y", "", "", "qk_matmul_output"]
        return attend(q, k, k, outputs, qk_matmul_output_mode=mode, **more, **softcap)

    raw, hidden = q @ k.mT, ~np.tri(5, 9, dtype=bool)
    y = attend(q, k, k, **more, softcap=8.0)
    for mode, softcap in ((0, 8.0), (0, 0.0), (1, 0.0)):
        assert_same(stage(mode, softcap=softcap)[1], raw)
    capped = stage(1, softcap=8.0)
    assert_same(capped[0], y)
    assert (np.abs(capped[1]) <= 8).all() and (np.sign(capped[1]) == np.sign(raw)).all()
    terms = np.where(hidden, -np.inf, np.pad(mask, ((0, 0), (0, 2)), constant_values=-np.inf))
    terms = terms.astype(np.float32)
    assert_same(stage(2)[1], raw + terms)
    assert_same(stage(2, softcap=8.0)[1], capped[1] + terms)
    padded = np.where(hidden, -np.inf, terms)
    expected = mha_fast.attention(q, k, k, padded, scale=1, softcap=8.0, return_weights=True)
    for result, wanted in zip(stage(3, softcap=8.0), expected, strict=True):
        assert_same(result, wanted)


def test_raw_products_are_of_all_keys_past_every_length():
    q, k, v = qkv(3, 9)
    inputs, outputs = {"nonpad_kv_seqlen": np.array([2, 5])}, ["Y", "", "", "raw"]
    assert_same(attend(q, k, v, outputs, inputs=inputs)[1], attend(q, k, v, outputs)[1])
    _, s = attend(q, k, v, outputs, inputs=inputs, qk_matmul_output_mode=2)
    assert np.isneginf(s[0, :, :, 2:]).all() and np.isfinite(s[0, :, :, :2]).all()


@pytest.mark.parametrize(("precision", "wide"), [(1, False), (10, False), (11, True), (16, False)])
def test_double_precision_is_that_of_float64_rounded_once(precision, wide):
    q, k, v = qkv(5, 9)
    arrays = [x.astype(np.float64) for x in (q, k, v)] if wide else (q, k, v)
    expected = mha_fast.attention(*arrays, return_weights=True)
    outputs = ["Y", "", "", "weights"]
    results = attend(
        q, k, v, outputs, softmax_precision=precision, qk_matmul_output_mode=3
    )  # fmt: skip
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
    y, s = attend(q, q, q, ["Y", "", "", "s"], scale=1.0)
    assert y.dtype == s.dtype == np.float16 and (y == 300).all() and np.isposinf(s).all()
    mask = np.full((1, 1), lowest(np.float16), np.float16)
    _, s = attend(-q, q, q, ["Y", "", "", "s"], inputs={"attn_mask": mask}, qk_matmul_output_mode=2)
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
