"""The door to ONNX: its own cases of our operators, and how models find them."""

import unittest
import warnings

import numpy as np
import pytest
from judge import assert_same
from sizes import qkv

import mha_fast

pytest.importorskip("onnx", reason='pip install "mha_fast[onnx]"')

import onnx.backend.test  # noqa: E402
import onnx.reference  # noqa: E402
from onnx_models import OPSETS, model_of, node_of  # noqa: E402

from mha_fast.onnx import Attention, Backend, ReferenceEvaluator, ops  # noqa: E402

CASES = {"attention": 93, "rotary_embedding": 8, "tensorscatter": 3}  # of onnx 1.23.2


@pytest.fixture
def calls(spied):
    """The options of each call of attention by the operator."""
    return spied("mha_fast.onnx.node.attention")


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
    [(wide_window, 9, "window"), (tiled_heads, 16, "gqa"), (last_key_for_all, 19, "causal")],
)
def test_canary_a_planted_fault_fails_cases(cases, monkeypatch, fault, least, word):
    monkeypatch.setattr("mha_fast.onnx.node.attention", fault)
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
    class Theirs(Attention):
        def _run(self, *inputs, **attributes):
            return (np.zeros(1),)

    Theirs.__name__ = "Attention"

    q, k, v = qkv(5, 9)
    inputs = {"Q": q, "K": k, "V": v}
    model = model_of([node_of("Attention", inputs)], inputs, ["Y"])
    assert ReferenceEvaluator(model, new_ops=[Theirs]).run(None, inputs)[0].shape == (1,)


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
