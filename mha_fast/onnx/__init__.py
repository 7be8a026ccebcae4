"""ONNX operators on our kernel, for ONNX's reference evaluator and its test runner.

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

It needs ``pip install "mha_fast[onnx]"``; ``import mha_fast`` does not load it.
"""

from .attention import Attention
from .evaluator import Backend, ReferenceEvaluator, ops
from .rotary import RotaryEmbedding
from .scatter import TensorScatter

__all__ = [
    "Attention",
    "Backend",
    "ReferenceEvaluator",
    "RotaryEmbedding",
    "TensorScatter",
    "ops",
]
