"""What other programs gain by our kernel: each door against what they use without it.

    python benchmarks/doors.py onnxruntime torch dask

A row is best (median) in ms of runs in turn, `ROUNDS` of each side. Both sides have `THREADS`
threads; between them all threads have time to go to sleep.
"""

from __future__ import annotations

import sys
import time
from functools import partial

import machine
import numpy as np

ROUNDS = 15
SECONDS = 0.3  # of runs in a round
PAUSE = 0.1  # seconds in which spinning threads give up
THREADS = machine.usable_cores()
WIDTH, HEADS, LAYERS = 768, 12, 4


def onnxruntime():
    """Layers of MatMul, Attention and MatMul in an unchanged model."""
    for tokens, causal in ((128, False), (512, False), (1024, True), (2048, True)):
        model = attention_model(tokens, causal).SerializeToString()
        x = np.random.default_rng(0).standard_normal((1, tokens, WIDTH)).astype(np.float32)
        sides = {
            name: runner_of(model, x, ours) for name, ours in (("theirs", False), ("ours", True))
        }
        a, b = (run() for run in sides.values())
        assert np.abs(a - b).max() < 1e-3 * np.abs(a).max()
        compare(f"onnxruntime, {tokens} tokens{', causal' * causal}", sides)


def runner_of(model, x, ours):
    import onnxruntime

    import mha_fast.onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    if ours:
        mha_fast.onnx.register(options)
    session = onnxruntime.InferenceSession(model, options)
    return lambda: session.run(None, {"x0": x})[0]


def attention_model(tokens, causal):
    import onnx
    from onnx import helper

    rng = np.random.default_rng(1)
    nodes, weights = [], []
    for i in range(LAYERS):
        for name, columns in ((f"in{i}", 3 * WIDTH), (f"out{i}", WIDTH)):
            w = rng.standard_normal((WIDTH, columns)).astype(np.float32) * WIDTH**-0.5
            weights.append(onnx.numpy_helper.from_array(w, name))
        qkv = [f"{name}{i}" for name in "qkv"]
        nodes += [
            helper.make_node("MatMul", [f"x{i}", f"in{i}"], [f"p{i}"]),
            helper.make_node("Split", [f"p{i}"], qkv, axis=2, num_outputs=3),
            helper.make_node(
                "Attention", qkv, [f"a{i}"], is_causal=int(causal),
                q_num_heads=HEADS, kv_num_heads=HEADS,
            ),
            helper.make_node("MatMul", [f"a{i}", f"out{i}"], [f"x{i + 1}"]),
        ]  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, tokens, WIDTH])
        for name in ("x0", f"x{LAYERS}")
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    opset = helper.make_opsetid("", 23)
    return helper.make_model(graph, opset_imports=[opset], ir_version=11)


def torch():
    """Calls of scaled_dot_product_attention, alone and with the way back."""
    import torch as library

    from mha_fast.torch import scaled_dot_product_attention

    theirs = library.nn.functional.scaled_dot_product_attention
    functions = {"theirs": theirs, "ours": scaled_dot_product_attention}
    library.set_num_threads(THREADS)
    for title, batch, heads, kv_heads, rows, keys, dtype in (
        ("1 x 12 x 16", 1, 12, 12, 16, 16, "float32"),
        ("8 x 12 x 128", 8, 12, 12, 128, 128, "float32"),
        ("1 x 12 x 1,024", 1, 12, 12, 1024, 1024, "float32"),
        ("1 x 32 / 8 x 2,048", 1, 32, 8, 2048, 2048, "float32"),
        ("1 x 32 / 8, a row over 1,024, bfloat16", 1, 32, 8, 1, 1024, "bfloat16"),
    ):
        shapes = (batch, heads, rows, 64), (batch, kv_heads, keys, 64), (batch, kv_heads, keys, 64)
        tensors = [library.randn(shape).to(getattr(library, dtype)) for shape in shapes]
        options = {"is_causal": rows > 512, "enable_gqa": heads != kv_heads}
        for grad in (False, True) if rows > 1 else (False,):
            leaves = [x.clone().requires_grad_(grad) for x in tensors]
            sides = {
                name: partial(call_of_torch, f, leaves, options) for name, f in functions.items()
            }
            compare(f"torch, {title}{', with gradients' * grad}", sides)


def call_of_torch(function, leaves, options):
    out = function(*leaves, **options)
    if out.requires_grad:
        out.sum().backward()
    return out


def dask():
    """Two workers of a thread each, against one call on all cores."""
    import dask.array as da
    from distributed import Client, LocalCluster

    import mha_fast.dask

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for tokens, q_chunk, k_chunk in ((16_384, 4096, 6144), (65_536, 8192, 12_288)):
            drawn = da.random.default_rng(0).standard_normal
            lazy = [
                client.persist(drawn((8, tokens, 64), chunks=(8, n, 64)).astype("f4"))
                for n in (q_chunk, k_chunk, k_chunk)
            ]
            whole = [x.compute() for x in lazy]
            out = mha_fast.dask.attention(*lazy, causal=True)
            sides = {
                "one process": partial(mha_fast.attention, *whole, causal=True),
                "two workers": out.compute,
            }
            compare(f"dask, 8 x {tokens:,} tokens, causal", sides, rounds=3)


def compare(title, sides, rounds=ROUNDS):
    """Print best (median) of each side, and the ratio of the best and of the medians."""
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            time.sleep(PAUSE)
            run()
            times[name] += timed(run)
    (a, am), (b, bm) = ((min(x), float(np.median(x))) for x in times.values())
    row = ", ".join(
        f"{name} {1e3 * low:.2f} ({1e3 * middle:.2f})"
        for name, low, middle in zip(sides, (a, b), (am, bm), strict=True)
    )
    print(f"{title}: {row} ms, {a / b:.2f}x ({am / bm:.2f}x)", flush=True)


def timed(run):
    """Seconds of each of the runs of a round."""
    seconds, end = [], time.perf_counter() + SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


DOORS = {f.__name__: f for f in (onnxruntime, torch, dask)}

if __name__ == "__main__":
    print(f"{machine.cpu_name()}, {THREADS} threads")
    for door in sys.argv[1:] or DOORS:
        DOORS[door]()
