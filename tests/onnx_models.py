"""Small ONNX models over given arrays. They need onnx."""

import numpy as np
import onnx.helper

from mha_fast.onnx import ReferenceEvaluator

OPSETS = [23, 24, 25, onnx.defs.onnx_opset_version()]
HOSTILE = [-1, 2**63 - 1, -(2**63)]  # no length, no position
INPUTS = {
    "Attention": ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"],
    "RotaryEmbedding": ["X", "cos_cache", "sin_cache", "position_ids"],
    "TensorScatter": ["past_cache", "update", "write_indices"],
}
OUTPUTS = ["Y", "present_key", "present_value", "qk_matmul_output"]


def node_of(op, inputs, outputs=("Y",), **attributes):
    """A node of the inputs that there are; "" stands for one that is left out."""
    names = [name if name in inputs else "" for name in INPUTS[op]]
    while not names[-1]:
        names.pop()
    return onnx.helper.make_node(op, names, list(outputs), **attributes)


def model_of(nodes, inputs, outputs=("Y",), opset=25, functions=()):
    """A model of nodes over arrays by name."""
    dtype_of = onnx.helper.np_dtype_to_tensor_dtype
    tensor = onnx.helper.make_tensor_value_info
    given = [tensor(name, dtype_of(x.dtype), x.shape) for name, x in inputs.items()]
    made = [tensor(name, onnx.TensorProto.FLOAT, [None] * 4) for name in outputs if name]
    graph = onnx.helper.make_graph(nodes, "test", given, made)
    imports = [onnx.helper.make_opsetid("", opset)]
    imports += [onnx.helper.make_opsetid(f.domain, 1) for f in functions]
    return onnx.helper.make_model(graph, opset_imports=imports, functions=functions)


def run(op, inputs, outputs=("Y",), opset=25, **attributes):
    """Outputs of one operator that have a name; `inputs` by name."""
    model = model_of([node_of(op, inputs, outputs, **attributes)], inputs, outputs, opset)
    results = ReferenceEvaluator(model).run(None, inputs)
    return results[0] if len(results) == 1 else results


def attend(q, k, v, outputs=("Y",), opset=25, inputs=(), **attributes):
    """Attention of q, k, v and the other `inputs` by name."""
    return run("Attention", {"Q": q, "K": k, "V": v, **dict(inputs)}, outputs, opset, **attributes)


def packed(x):
    """The layout with three axes."""
    batch, heads, seqlen, head_dim = x.shape
    return np.moveaxis(x, 1, 2).reshape(batch, seqlen, heads * head_dim)
