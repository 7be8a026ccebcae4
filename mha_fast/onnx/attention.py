"""The operator Attention, for ONNX's evaluator."""

import numpy as np
from onnx.reference.op_run import OpRun

from .node import attention_node


class Attention(OpRun):
    """Attention of the domain "", opsets 23, 24 and 25, computed by `mha_fast.attention`.

    All inputs, attributes and outputs, with Q, K and V of four axes or packed into three. A class
    for ``onnx.reference.ReferenceEvaluator(model, new_ops=[Attention])``, which finds an operator
    by its domain and name, so that one class serves every opset.

    Raises
    ------
    TypeError
        An input has an unsupported dtype.
    ValueError
        Shapes do not fit, attributes contradict them, a length is out of range, or past and
        present caches are not used together.

    Notes
    -----
    It follows the text of the operator as corrected in onnx 1.23: `softcap` before the mask, query
    head ``h`` reads KV head ``h // (heads // kv_heads)``, query ``i`` stands at the position
    ``i + offset``, where the offset is the length of the past, or ``nonpad_kv_seqlen`` less the
    number of queries, or 0. Beyond the text:

    - Keys that no query may see are never read, so a NaN there does no harm.
    - 16-bit floats are computed in float32, with one rounding at the end. `softmax_precision`
      raises all of the computation to float64, and never lowers it.
    - `scale` may be negative, because it is not split into square roots.
    - ``qk_matmul_output_mode=0`` is the scaled product before `softcap`.

    Examples
    --------
    >>> from mha_fast import attention
    >>> q, k, v = (np.random.rand(2, 4, 10, 8) for _ in range(3))
    >>> y = Attention.eval(q, k, v, n_outputs=1, is_causal=1)
    >>> bool((y == attention(q, k, v, causal=True)).all())
    True
    """

    op_domain = ""

    def _run(self, *inputs, **attributes):
        call = Call(self.output)
        attention_node(call, *inputs, **attributes)
        return tuple(call.results)

    def _check_and_fix_outputs(self, results):
        """The evaluator keeps an output without a name under "", where the next operator looks
        for the inputs that it does not have. So None has to pass."""
        return results


class Call:
    """One run of a node: outputs by their place, None where the graph has no name for one."""

    def __init__(self, names):
        self.names = names
        self.results = [None] * len(names)

    def wants(self, output):
        return len(self.names) > output and self.names[output] != ""

    def new(self, output, shape, dtype):
        if not self.wants(output):
            return None
        self.results[output] = np.empty(shape, dtype)
        return self.results[output]
