"""Our operators in sessions of onnxruntime."""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

from .. import _core
from .microsoft import group_query_attention_node, multi_head_attention_node
from .node import attention_node

OLDEST = (1, 17)  # the first with threads for operators from outside
FLOAT, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16  # ONNX's numbers of element types

_lock = threading.Lock()
_registered = weakref.WeakKeyDictionary()  # options: operators


class Operator(NamedTuple):
    """An operator as onnxruntime has to know it."""

    domain: str
    name: str
    inputs: str  # types, a letter each: T the element type, * any, 4 int32, 8 int64, f float32
    outputs: str
    required: int  # the first of the inputs
    elements: tuple  # what T may be
    integers: tuple  # names of attributes
    reals: tuple
    only: tuple  # (attribute, the one value that is supported)
    function: Callable

    def of_node(self, attributes):
        """A function of a call and its inputs; raises ValueError."""
        attributes = dict(attributes)
        for attribute, supported in self.only:
            value = attributes.pop(attribute, supported)
            if value != supported:
                raise ValueError(
                    f"mha_fast: {self.name} has {attribute}={value}, expected {supported}; "
                    f"leave {self.name} out of the operators= of mha_fast.onnx.register"
                )
        return functools.partial(self.function, **attributes)


OPERATORS = (
    Operator(
        "", "Attention", "TTT*TT8", "TTTT", 3, (FLOAT, FLOAT16, DOUBLE, BFLOAT16),
        ("is_causal", "kv_num_heads", "left_window_size", "q_num_heads", "qk_matmul_output_mode",
         "right_window_size", "softmax_precision"),
        ("scale", "softcap"),
        (),
        attention_node,
    ),
    Operator(
        "com.microsoft", "MultiHeadAttention", "TTTT4TTT44", "TTTT", 1,
        (FLOAT, FLOAT16, BFLOAT16),
        ("num_heads", "unidirectional"),
        ("mask_filter_value", "scale"),
        (),
        multi_head_attention_node,
    ),
    Operator(
        "com.microsoft", "GroupQueryAttention", "TTTTT44TT8TTffTT4", "TTTT", 1,
        (FLOAT, FLOAT16, BFLOAT16),
        ("causal", "do_rotary", "kv_num_heads", "local_window_size", "num_heads", "qk_output",
         "rotary_interleaved", "sliding_window_cache", "smooth_softmax"),
        ("scale", "softcap"),
        (("qk_output", 0), ("sliding_window_cache", 0)),
        group_query_attention_node,
    ),
)  # fmt: skip


def register(options, operators=None):
    """Have our kernel compute the attention of sessions made with these options.

    Models stay as they are: our operators take the place of onnxruntime's own in every node of
    their names, and run on the threads of the session.

    Parameters
    ----------
    options : onnxruntime.SessionOptions
        Set its ``intra_op_num_threads`` before, if at all.
    operators : list of str, optional
        Some of "Attention" (opsets 23 to 25), "MultiHeadAttention" and "GroupQueryAttention" (both
        of the domain com.microsoft); default all.

    Returns
    -------
    onnxruntime.SessionOptions
        The same options.

    Raises
    ------
    ImportError
        onnxruntime is missing, or older than 1.17.
    TypeError
        `options` is something else.
    ValueError
        An operator is unknown, or others were registered with the same options.

    Notes
    -----
    An operator's errors, of wrong shapes for instance, come as onnxruntime's, when the session
    runs. The GIL is needed for 10 to 40 microseconds a node, to look at its shapes and options;
    what takes time runs without it.

    Examples
    --------
    >>> import onnxruntime
    >>> options = register(onnxruntime.SessionOptions())
    """
    session_options = supported_onnxruntime().SessionOptions
    if not isinstance(options, session_options):
        raise TypeError(f"options is {options!r}, expected an onnxruntime.SessionOptions")
    wanted = chosen(operators)
    with _lock:
        before = _registered.get(options)
        if before is None:
            _core.register_onnxruntime(options, wanted, options.intra_op_num_threads)
            _registered[options] = wanted
        elif before != wanted:
            names = ", ".join(operator.name for operator in before)
            raise ValueError(f"options have {names} of ours already, expected new options")
    return options


def supported_onnxruntime():
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('onnxruntime is missing: pip install "mha_fast[onnxruntime]"') from error
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(
            f"onnxruntime {onnxruntime.__version__} is too old, expected 1.17 or later"
        )
    return onnxruntime


def chosen(names):
    """The operators of these names, each once."""
    known = {operator.name: operator for operator in OPERATORS}
    if names is None:
        return OPERATORS
    names = list(names)
    for name in names:
        if name not in known:
            raise ValueError(f"operators names {name!r}, expected some of {', '.join(known)}")
    return tuple(operator for operator in OPERATORS if operator.name in names)
