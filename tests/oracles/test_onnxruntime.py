"""Sessions of onnxruntime compute attention by our kernel. Optional: needs onnxruntime."""

import os
import threading
import unittest
import warnings

import numpy as np
import pytest
from judge import assert_same
from sizes import qkv, random_mask

import mha_fast

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnx.backend.base  # noqa: E402
import onnx.backend.test  # noqa: E402
import sessions  # noqa: E402
from onnx_models import OUTPUTS, model_of, node_of, packed  # noqa: E402
from sessions import session_of  # noqa: E402

CASES = 93  # of onnx 1.23.2


@pytest.fixture
def calls(spied):
    """The options of each call of attention by a session."""
    return spied("mha_fast.onnx.node.attention")


def attention_model(inputs, outputs=("Y",), opset=25, **attributes):
    model = model_of([node_of("Attention", inputs, outputs, **attributes)], inputs, outputs, opset)
    model.ir_version = 10
    for output in model.graph.output:
        output.type.tensor_type.CopyFrom(model.graph.input[0].type.tensor_type)
        output.type.tensor_type.ClearField("shape")
    return model


def attend(inputs, outputs=("Y",), opset=25, **attributes):
    """Outputs of one node, by our operator in a session."""
    session = session_of(attention_model(inputs, outputs, opset, **attributes))
    return session.run(None, inputs)


# ---- ONNX's own cases ----------------------------------------------------------------------------


class SessionBackend(onnx.backend.base.Backend):
    """What ONNX's runner takes: each case in a session of its own."""

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        return Prepared(session_of(model))

    @classmethod
    def supports_device(cls, device):
        return device == "CPU"


class Prepared(onnx.backend.base.BackendRep):
    def __init__(self, session):
        self.session = session

    def run(self, inputs, **kwargs):
        names = [x.name for x in self.session.get_inputs()]
        return sessions.run_any(self.session, dict(zip(names, inputs, strict=True)))


@pytest.fixture(scope="module")
def cases():
    with warnings.catch_warnings():  # of the cases of other operators
        warnings.simplefilter("ignore")
        runner = onnx.backend.test.BackendTest(SessionBackend, __name__)
    runner.include("^test_attention.*_cpu$").exclude("expanded")
    case = runner.test_cases["OnnxBackendNodeModelTest"]
    names = unittest.defaultTestLoader.getTestCaseNames(case)
    names = [x for x in names if not getattr(getattr(case, x), "__unittest_skip__", False)]
    return {name: case(name) for name in names}


def test_every_case_of_onnx_passes_in_a_session(cases, calls):
    assert len(cases) == CASES
    bad = {}
    for name, case in cases.items():
        calls.clear()
        result = case.run()
        if not result.wasSuccessful() or result.skipped or len(calls) != 1:
            bad[name] = [text for _, text in [*result.failures, *result.errors]]
    assert bad == {}


def test_canary_a_fault_of_ours_fails_the_cases(cases, monkeypatch):
    """So they run on our kernel, and not on onnxruntime's."""

    def fault(*arrays, out=None, **options):
        result = mha_fast.attention(*arrays, out=out, **options)
        (result if out is None else out)[..., :1] += 1
        return result

    monkeypatch.setattr("mha_fast.onnx.node.attention", fault)
    plain = [x for x in cases if "qk_matmul" not in x and "fullymasked" not in x]
    assert not any(cases[name].run().wasSuccessful() for name in plain)


def test_canary_without_registration_our_kernel_is_not_used(calls):
    inputs = dict(zip("QKV", qkv(5, 9), strict=True))
    model = attention_model(inputs, opset=23)
    session_of(model, ours=False).run(None, inputs)
    session_of(model, operators=["MultiHeadAttention"]).run(None, inputs)
    assert calls == []
    session_of(model, operators=["Attention"]).run(None, inputs)
    assert len(calls) == 1


# ---- The bits are those of `attention` -----------------------------------------------------------


@pytest.mark.parametrize("opset", [23, 24, 25])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_results_have_the_bits_of_the_function(opset, dtype):
    q, k, v = qkv(70, 300, heads=4, kv_heads=2, dtype=dtype)
    mask = random_mask(70, 300)
    inputs = {"Q": q, "K": k, "V": v, "attn_mask": mask}
    expected = mha_fast.attention(q, k, v, mask, causal=True, q_offset=0)
    assert_same(attend(inputs, opset=opset, is_causal=1)[0], expected)
    three = {name: packed(x) for name, x in zip("QKV", (q, k, v), strict=True)}
    (y,) = attend(three | {"attn_mask": mask}, is_causal=1, q_num_heads=4, kv_num_heads=2)
    assert_same(y, packed(expected))


def test_past_and_present_go_through_a_session():
    q, k, v = qkv(5, 9)
    past = {"past_key": k[:, :, :4].copy(), "past_value": v[:, :, :4].copy()}
    inputs = {"Q": q, "K": k[:, :, 4:].copy(), "V": v[:, :, 4:].copy(), **past}
    y, *present = attend(inputs, OUTPUTS[:3], is_causal=1)
    assert_same(y, mha_fast.attention(q, k, v, causal=True, q_offset=4))
    for x, whole in zip(present, (k, v), strict=True):
        assert_same(x, whole)


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_threads_of_the_session_change_no_bit(threads):
    inputs = dict(zip("QKV", qkv(700, 900, 64, heads=2), strict=True))
    expected = mha_fast.attention(*inputs.values())
    session = session_of(attention_model(inputs), threads=threads)
    assert_same(session.run(None, inputs)[0], expected)


def test_empty_tensors_are_taken():
    q, k, v = qkv(5, 9)
    (y,) = attend({"Q": q[:, :, :0], "K": k, "V": v})
    assert y.shape == (2, 2, 0, 8)
    assert (attend({"Q": q, "K": k[:, :, :0], "V": v[:, :, :0]})[0] == 0).all()


# ---- Manners -------------------------------------------------------------------------------------


def test_error_of_a_node_comes_as_onnxruntimes_with_our_message():
    q, k, v = qkv(5, 9)
    session = session_of(attention_model({"Q": q, "K": k, "V": v}))
    model = attention_model({"Q": q, "K": k, "V": v}, left_window_size=-3)
    with pytest.raises(Exception, match="ValueError: left_window_size is -3, expected -1"):
        session_of(model).run(None, {"Q": q, "K": k, "V": v})
    assert_same(session.run(None, {"Q": q, "K": k, "V": v})[0], mha_fast.attention(q, k, v))


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_one_session_serves_eight_threads(mode):
    shapes = [(3, 50), (700, 900), (64, 64), (1, 500)] * 2
    arrays = [dict(zip("QKV", qkv(*x, 64, seed=i), strict=True)) for i, x in enumerate(shapes)]
    model = attention_model(arrays[0])
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[2].ClearField("dim_value")
    options = onnxruntime.SessionOptions()
    if mode == "parallel":
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
        options.inter_op_num_threads = 2
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), mha_fast.onnx.register(options)
    )
    bad = []

    def work(inputs):
        expected = mha_fast.attention(*inputs.values())
        for _ in range(20):
            (y,) = session.run(None, inputs)
            if not np.array_equal(y, expected):
                bad.append(y)

    team = [threading.Thread(target=work, args=(x,)) for x in arrays]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join(120)
        assert not thread.is_alive()
    assert bad == []


SCRIPT = """
import sys; sys.path[:0] = {path!r}
import os, threading, numpy as np, onnxruntime, mha_fast
from sizes import qkv
from test_onnxruntime import attention_model, session_of
inputs = dict(zip("QKV", qkv(700, 900, 64)))
model = attention_model(inputs)
"""


@pytest.fixture
def script_of(output_of):
    """What a script prints that makes and runs sessions in a process of its own."""
    here = os.path.dirname(__file__)
    start = SCRIPT.format(path=[here, os.path.dirname(here)])
    return lambda code: output_of(start + code)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
def test_tiles_run_on_the_threads_of_the_session(script_of):
    """Those of OpenMP are not even made; they are for a call of our own."""
    output = script_of("""
threads = lambda: len(os.listdir("/proc/self/task"))
session = session_of(model, threads=3)
made = threads()
session.run(None, inputs)
after = threads()
mha_fast.attention(*inputs.values(), threads=3)
print(after - made, threads() - made > 0)
""")
    assert output == "0 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_session_made_in_a_forked_child_works(script_of):
    """A session's own threads do not survive a fork, but nothing of ours hangs."""
    output = script_of("""
before = session_of(model).run(None, inputs)[0]
child = os.fork()
if not child:
    after = session_of(model).run(None, inputs)[0]
    os._exit(0 if np.array_equal(before, after) else 1)
print(os.waitpid(child, 0)[1])
""")
    assert output == "0"


def test_session_may_live_until_the_interpreter_ends(script_of):
    output = script_of("""
import atexit
session = session_of(model)
session.run(None, inputs)
atexit.register(lambda: print(session.run(None, inputs)[0].shape))
""")
    assert output == "(2, 2, 700, 64)"


def test_ctrl_c_ends_a_loop_of_runs(script_of):
    output = script_of("""
import _thread
session = session_of(model)
threading.Timer(0.5, _thread.interrupt_main).start()
try:
    while True:
        session.run(None, inputs)
except KeyboardInterrupt:
    print("interrupted")
""")
    assert output == "interrupted"


def test_neither_onnx_nor_onnxruntime_is_loaded_before_it_is_used(output_of):
    code = "import sys, mha_fast.onnx; print(sys.modules.keys() & {'onnx', 'onnxruntime'})"
    assert output_of(code) == "set()"


def test_bad_arguments_of_register_are_told_what_is_wrong(monkeypatch):
    with pytest.raises(TypeError, match="expected an onnxruntime.SessionOptions"):
        mha_fast.onnx.register(None)
    with pytest.raises(ValueError, match="operators names 'Add', expected some of Attention, "):
        mha_fast.onnx.register(onnxruntime.SessionOptions(), ["Add"])
    monkeypatch.setattr(onnxruntime, "__version__", "1.16.3")
    with pytest.raises(ImportError, match=r"onnxruntime 1.16.3 is too old, expected 1.17 or later"):
        mha_fast.onnx.register(onnxruntime.SessionOptions())


def test_options_are_registered_once_and_not_for_other_operators():
    inputs = dict(zip("QKV", qkv(5, 9), strict=True))
    options = onnxruntime.SessionOptions()
    assert mha_fast.onnx.register(mha_fast.onnx.register(options)) is options
    model = attention_model(inputs).SerializeToString()
    for _ in range(2):
        (y,) = onnxruntime.InferenceSession(model, options).run(None, inputs)
        assert_same(y, mha_fast.attention(*inputs.values()))
    with pytest.raises(ValueError, match="options have Attention, MultiHeadAttention, Group"):
        mha_fast.onnx.register(options, ["Attention"])


def test_library_refuses_to_be_registered_behind_our_back():
    options = onnxruntime.SessionOptions()
    with pytest.raises(Exception, match=r"mha_fast: use mha_fast.onnx.register\(options\)"):
        options.register_custom_ops_library(mha_fast._core.__file__)
