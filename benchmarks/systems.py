"""The systems that are timed: one class each, none of them required but NumPy.

A system turns a case into a function without arguments that computes it. Whatever can
be done once (converting masks, building a graph) happens before the clock runs; what
every call needs (allocating the result, checking arguments) is part of the time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np

# NumPy users keep the whole score matrix. Beyond this it is not a fair contest.
LARGEST_SCORES = 4 * 2**30


class System:
    """A way to compute attention."""

    name = ""
    packages = ()
    options = ()  # of a case that it can say

    def __init__(self, threads):
        self.threads = threads

    @classmethod
    def installed(cls):
        return all(importlib.util.find_spec(package) for package in cls.packages)

    @classmethod
    def versions(cls):
        return {package: _version(package) for package in cls.packages}

    def prepare(self, case, inputs):
        """Return a function without arguments, or None if the case cannot be said."""
        raise NotImplementedError

    def canonical(self, output, case):
        """The output as ``case.check`` wants it: NumPy arrays with our axes."""
        return output


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def split_mask(case, inputs):
    """Say the case's mask as (causal from the top left, boolean mask or None)."""
    plain = case.window is None and case.mask is None
    if case.causal and plain and case.seqlen_q == case.seqlen_k:
        return True, None
    if case.mask == "padding" and not case.causal and case.window is None:
        return False, inputs["mask"]
    return False, case.visible()


def bias_of(case, inputs):
    """What is added to scores, (heads, seqlen_q, seqlen_k), or None."""
    if "alibi_slopes" not in inputs:
        return inputs.get("bias")
    position = np.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q
    distance = np.abs(position - np.arange(case.seqlen_k))
    return (-inputs["alibi_slopes"][:, None, None] * distance).astype(inputs["q"].dtype)


def merge_bias(case, inputs):
    """Say mask and bias as (causal, one boolean or float 4-D mask or None)."""
    causal, mask = split_mask(case, inputs)
    bias = bias_of(case, inputs)
    if bias is None:
        return causal, mask
    bias = bias[None]
    if mask is not None:
        bias = np.where(mask, bias, np.asarray(-np.inf, bias.dtype))
    return causal, bias


class MhaFast(System):
    """This package, called as its users call it."""

    name = "mha_fast"
    packages = ("mha_fast",)
    options = ("softcap", "alibi", "sinks", "dropout")

    def __init__(self, threads):
        super().__init__(threads)
        import mha_fast

        self.package = mha_fast
        mha_fast.set_num_threads(threads)

    def prepare(self, case, inputs):
        attention = self.package.attention
        return lambda: attention(**inputs)


class NumPy(System):
    """What a careful NumPy user writes: two matmuls and a softmax in place."""

    name = "numpy"
    packages = ("numpy",)
    options = ("softcap", "alibi", "sinks")

    def prepare(self, case, inputs):
        if case.score_bytes() > LARGEST_SCORES:
            return None
        causal, visible = split_mask(case, inputs)
        if causal:
            visible = case.visible()
        hidden = None if visible is None else ~visible
        tensors = inputs["q"], inputs["k"], inputs["v"]
        more = {"bias": bias_of(case, inputs), "return_weights": case.weights}
        more |= {name: inputs.get(name) for name in ("softcap", "sinks")}
        return lambda: self.attention(*tensors, hidden, **more)

    @staticmethod
    def attention(q, k, v, hidden, *, bias=None, softcap=None, sinks=None, return_weights=False):
        dtype = q.dtype
        if dtype.itemsize == 2:  # has no BLAS
            q, k, v = (x.astype(np.float32) for x in (q, k, v))
        batch, heads, seqlen_q, head_dim = q.shape
        kv_heads, seqlen_k = k.shape[1:3]
        # The heads of a group are rows of one product, so K and V are not repeated.
        rows = heads // kv_heads * seqlen_q
        q = q.reshape(batch, kv_heads, rows, head_dim) * np.float32(head_dim**-0.5)
        s = q @ k.swapaxes(-1, -2)
        by_head = s.reshape(batch, heads, seqlen_q, seqlen_k)
        if softcap is not None:
            s /= np.float32(softcap)
            np.tanh(s, out=s)
            s *= np.float32(softcap)
        if bias is not None:
            by_head += bias
        if hidden is not None:
            np.copyto(by_head, -np.inf, where=hidden)
        most = s.max(axis=-1, keepdims=True)
        s -= most
        np.exp(s, out=s)
        total = s.sum(axis=-1, keepdims=True)
        if sinks is not None:
            shape = kv_heads, heads // kv_heads, 1
            sinks = np.broadcast_to(sinks.reshape(shape), (*shape[:2], seqlen_q))
            total += np.exp(sinks.reshape(kv_heads, rows, 1) - most).astype(s.dtype)
        if return_weights:
            s /= total
        out = s @ v
        if not return_weights:
            out /= total
        out = out.reshape(batch, heads, seqlen_q, -1).astype(dtype, copy=False)
        return (out, by_head) if return_weights else out


class Torch(System):
    """torch.nn.functional.scaled_dot_product_attention."""

    name = "torch"
    packages = ("torch",)
    options = ("alibi",)

    def __init__(self, threads):
        super().__init__(threads)
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def prepare(self, case, inputs):
        attend = self.torch.nn.functional.scaled_dot_product_attention
        q, k, v = (self.tensor(inputs[name]) for name in "qkv")
        if case.weights:
            return lambda: self.attention(q, k, v)
        options = self.sdpa_options(case, inputs)
        return lambda: attend(q, k, v, **options)

    def sdpa_options(self, case, inputs):
        causal, mask = merge_bias(case, inputs)
        options = {"is_causal": causal, "enable_gqa": case.group_size > 1}
        return options if mask is None else {**options, "attn_mask": self.tensor(mask)}

    def attention(self, q, k, v):
        """As its own module computes it for need_weights."""
        weights = self.torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)
        return weights @ v, weights

    def tensor(self, array):
        if array.dtype.name == "bfloat16":
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def canonical(self, output, case):
        if case.weights:
            return tuple(part.numpy() for part in output)
        return (output.float() if case.dtype == "bfloat16" else output).numpy()


class Onnx(System):
    """A graph of one node, run by onnxruntime. The base of the two below."""

    packages = ("onnxruntime", "onnx")

    def __init__(self, threads):
        super().__init__(threads)
        import onnx
        import onnxruntime

        self.onnx = onnx
        self.onnxruntime = onnxruntime

    def session(self, op, feeds, domain, opsets, **attributes):
        """Return a function that runs the node `op` on `feeds` (name -> array)."""
        helper = self.onnx.helper
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in feeds.items()
            if array is not None
        ]
        dtype = helper.np_dtype_to_tensor_dtype(feeds["q"].dtype)
        output = helper.make_tensor_value_info("out", dtype, None)
        names = [name if array is not None else "" for name, array in feeds.items()]
        while not names[-1]:
            names.pop()
        node = helper.make_node(op, names, ["out"], domain=domain, **attributes)
        graph = helper.make_graph([node], op, inputs, [output])
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*opset) for opset in opsets],
            ir_version=11,
        )
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = self.onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        given = {
            name: np.ascontiguousarray(array) for name, array in feeds.items() if array is not None
        }
        return lambda: session.run(None, given)[0]


class OrtMultiHead(Onnx):
    """onnxruntime's com.microsoft.MultiHeadAttention: (batch, seqlen, hidden)."""

    name = "ort"

    def prepare(self, case, inputs):
        causal, mask = split_mask(case, inputs)
        padding = None
        if case.mask in ("padding", "lengths") and not case.causal:
            padding, mask = case.lengths().astype(np.int32), None
        if (
            mask is not None
            or case.weights
            or case.dtype != "float32"
            or case.group_size > 1
            or case.head_dim_v != case.head_dim
        ):
            return None
        q, k, v = (
            inputs[name].swapaxes(1, 2).reshape(case.batch, -1, case.heads * width)
            for name, width in zip(
                "qkv", (case.head_dim, case.head_dim, case.head_dim_v), strict=True
            )
        )
        bias = inputs["bias"][None] if "bias" in inputs else None
        feeds = {"q": q, "k": k, "v": v, "projection_bias": None}
        return self.session(
            "MultiHeadAttention",
            {**feeds, "key_padding_mask": padding, "attention_bias": bias},
            "com.microsoft",
            [("", 17), ("com.microsoft", 1)],
            num_heads=case.heads,
            unidirectional=int(causal),
        )

    def canonical(self, output, case):
        shape = case.batch, case.seqlen_q, case.heads, case.head_dim_v
        return output.reshape(shape).swapaxes(1, 2)


class OrtAttention(Onnx):
    """onnxruntime's standard Attention of opset 23."""

    name = "ort23"
    options = ("softcap", "alibi")

    def prepare(self, case, inputs):
        if case.score_bytes() > LARGEST_SCORES or case.weights or case.dtype == "bfloat16":
            return None
        causal, mask = merge_bias(case, inputs)
        if mask is not None:  # it refuses a mask that broadcasts over the rows
            pairs = case.seqlen_q, case.seqlen_k
            mask = np.broadcast_to(mask, (*mask.shape[:2], *pairs))
        feeds = {"q": inputs["q"], "k": inputs["k"], "v": inputs["v"], "mask": mask}
        more = {"softcap": inputs["softcap"]} if "softcap" in inputs else {}
        return self.session("Attention", feeds, "", [("", 23)], is_causal=int(causal), **more)


class OpenVino(System):
    """OpenVINO's scaled_dot_product_attention on its CPU plugin."""

    name = "openvino"
    packages = ("openvino",)
    options = ("alibi",)

    def __init__(self, threads):
        super().__init__(threads)
        import openvino
        import openvino.opset13

        self.openvino = openvino
        self.core = openvino.Core()
        # Its default on CPUs with bfloat16 units is to round float32 to bfloat16.
        self.config = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }

    def prepare(self, case, inputs):
        causal, mask = merge_bias(case, inputs)
        if case.dtype != "float32" or case.weights or case.score_bytes() > LARGEST_SCORES:
            return None
        feeds = [np.ascontiguousarray(inputs[name]) for name in "qkv"]
        if case.group_size > 1:
            # It knows no groups, but broadcasts leading axes.
            feeds = self.grouped(case, *feeds)
            mask = None if mask is None else mask[:, :, None]
        if mask is not None:
            feeds.append(np.ascontiguousarray(mask))
        ops = self.openvino.opset13
        parameters = [ops.parameter(array.shape, array.dtype) for array in feeds]
        node = ops.scaled_dot_product_attention(*parameters, causal=causal)
        model = self.openvino.Model([node.output(0)], parameters, "attention")
        request = self.core.compile_model(model, "CPU", self.config)
        request = request.create_infer_request()
        # Tensors bound once and shared: its cheapest call from Python.
        for index, array in enumerate(feeds):
            tensor = self.openvino.Tensor(array, shared_memory=True)
            request.set_input_tensor(index, tensor)
        self.shared = feeds  # the tensors do not keep the arrays alive
        return lambda: request.infer(share_outputs=True)[0]

    @staticmethod
    def grouped(case, q, k, v):
        split = case.batch, case.kv_heads, case.group_size, case.seqlen_q
        return [q.reshape(*split, case.head_dim), k[:, :, None], v[:, :, None]]

    def canonical(self, output, case):
        shape = case.batch, case.heads, case.seqlen_q, case.head_dim_v
        return np.asarray(output).reshape(shape)


SYSTEMS = {
    system.name: system for system in (MhaFast, NumPy, Torch, OrtMultiHead, OrtAttention, OpenVino)
}
