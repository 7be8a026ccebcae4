"""ONNX operators on our kernel: for sessions of onnxruntime, ONNX's evaluator, its test runner.

`register` puts them into sessions; it needs ``pip install "mha_fast[onnxruntime]"``, and no onnx.
The evaluator does:

>>> import numpy as np
>>> import onnx.helper
>>> import mha_fast.onnx
>>> tensors = [
...     onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8, None, 64])
...     for name in ("Q", "K", "V", "Y")
... ]
>>> node = onnx.helper.make_node("Attention", ["Q", "K", "V"], ["Y"], is_causal=1)
>>> graph = onnx.helper.make_graph([node], "example", tensors[:3], tensors[3:])
>>> model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
>>> q, k, v = (np.random.rand(1, 8, 100, 64).astype(np.float32) for _ in range(3))
>>> (y,) = mha_fast.onnx.ReferenceEvaluator(model).run(None, {"Q": q, "K": k, "V": v})
>>> bool((y == mha_fast.attention(q, k, v, causal=True)).all())
True

It needs ``pip install "mha_fast[onnx]"``. Neither is loaded before it is used.
"""

import importlib

from .runtime import register

_MODULES = {  # of what needs onnx
    "Attention": "attention",
    "Backend": "evaluator",
    "ReferenceEvaluator": "evaluator",
    "RotaryEmbedding": "rotary",
    "TensorScatter": "scatter",
    "ops": "evaluator",
}

__all__ = [*_MODULES, "register"]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
