"""Sessions of onnxruntime with our operators or its own. They need onnx and onnxruntime."""

import ctypes

import numpy as np
import onnx.helper
import onnxruntime
import sizes

import mha_fast.onnx

MICROSOFT = "com.microsoft"
BFLOAT16 = onnx.TensorProto.BFLOAT16


def session_of(model, ours=True, threads=2, operators=None):
    """A session, of our operators unless told otherwise."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings are of models without shapes
    if ours:
        mha_fast.onnx.register(options, operators)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def contrib_model(op, inputs, outputs, **attributes):
    """One node of onnxruntime's domain; `inputs` by name and in order, None where there is none."""
    dtype_of = onnx.helper.np_dtype_to_tensor_dtype
    tensor = onnx.helper.make_tensor_value_info
    given = {name: x for name, x in inputs.items() if x is not None}
    names = [name if name in given else "" for name in inputs]
    while not names[-1]:
        names.pop()
    node = onnx.helper.make_node(op, names, outputs, domain=MICROSOFT, **attributes)
    element = dtype_of(next(iter(given.values())).dtype)
    graph = onnx.helper.make_graph(
        [node],
        "test",
        [tensor(name, dtype_of(x.dtype), x.shape) for name, x in given.items()],
        [tensor(name, element, None) for name in outputs if name],
    )
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(MICROSOFT, 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def run(model, inputs, **how):
    """Outputs that have a name, of named inputs."""
    feeds = {name: np.ascontiguousarray(x) for name, x in inputs.items() if x is not None}
    return session_of(model, **how).run(None, feeds)


def run_any(session, inputs):
    """Outputs of any dtype: onnxruntime takes and gives bfloat16 as bits."""
    value = onnxruntime.OrtValue
    feeds = {
        name: value.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), BFLOAT16)
        if x.dtype.name == "bfloat16"
        else value.ortvalue_from_numpy(x)
        for name, x in ((name, np.ascontiguousarray(x)) for name, x in inputs.items())
    }
    outputs = session.run_with_ort_values([x.name for x in session.get_outputs()], feeds)
    return [to_numpy(x) for x in outputs]


def to_numpy(value):
    if value.element_type() != BFLOAT16:
        return value.numpy()
    bits = (ctypes.c_uint16 * np.prod(value.shape())).from_address(value.data_ptr())
    return np.array(bits).view(sizes.BFLOAT16).reshape(value.shape())
