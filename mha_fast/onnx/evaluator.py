"""Models that run with our operators: ONNX's evaluator, and the backend for its test runner."""

import onnx.backend.base
import onnx.reference

from .attention import Attention
from .rotary import RotaryEmbedding
from .scatter import TensorScatter

ops = [Attention, RotaryEmbedding, TensorScatter]


class ReferenceEvaluator(onnx.reference.ReferenceEvaluator):
    """ONNX's evaluator with our operators, in subgraphs and in the model's own functions too.

    ``onnx.reference.ReferenceEvaluator(model, new_ops=mha_fast.onnx.ops)`` does the same for a
    model without functions of its own; into these it does not pass `new_ops` on.

    Parameters
    ----------
    proto : onnx.ModelProto, str, bytes or another of ONNX's messages
        As ONNX's class takes it.
    new_ops : list of type, optional
        More operators; they come before ours.
    **options
        For ONNX's class.

    Examples
    --------
    >>> import numpy as np
    >>> import onnx.helper
    >>> node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
    >>> q, k, v = (np.random.rand(2, 4, 10, 8) for _ in range(3))
    >>> (y,) = ReferenceEvaluator(node).run(None, {"q": q, "k": k, "v": v})
    >>> y.shape
    (2, 4, 10, 8)
    """

    def __init__(self, proto, *args, new_ops=None, **options):
        super().__init__(proto, *args, new_ops=[*(new_ops or []), *ops], **options)


class Backend(onnx.backend.base.Backend):
    """What ``onnx.backend.test.BackendTest(mha_fast.onnx.Backend, __name__)`` takes.

    It runs any model that ONNX's evaluator runs, with our operators, on device "CPU".

    Examples
    --------
    >>> import numpy as np
    >>> import onnx.helper
    >>> node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"])
    >>> (y,) = Backend.run_node(node, [np.ones((1, 1, 3, 2), np.float32)] * 3)
    >>> y.tolist()
    [[[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]]]
    """

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        """The model, checked, as an object whose ``run(inputs)`` returns a tuple of arrays."""
        super().prepare(model, device, **kwargs)
        return _Prepared(ReferenceEvaluator(model))

    @classmethod
    def run_node(cls, node, inputs, device="CPU", outputs_info=None, **kwargs):
        """Outputs of one operator; `inputs` are those that have a name in the node."""
        super().run_node(node, inputs, device, outputs_info, **kwargs)
        return _Prepared(ReferenceEvaluator(node)).run(inputs)

    @classmethod
    def supports_device(cls, device):
        """Only the CPU."""
        return device.partition(":")[0] == "CPU"


class _Prepared(onnx.backend.base.BackendRep):
    def __init__(self, evaluator):
        self.evaluator = evaluator

    def run(self, inputs, **kwargs):
        stored = self.evaluator.rt_inits_
        names = [name for name in self.evaluator.input_names if name and name not in stored]
        outputs = [name for name in self.evaluator.output_names if name]
        return tuple(self.evaluator.run(outputs, dict(zip(names, inputs, strict=True))))
