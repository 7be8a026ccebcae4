"""Do NumPy's BLAS threads and ours get in each other's way on this machine?

Alternates a matrix product and an attention call in one process and compares the time of the pair
with the sum of its parts: with NumPy's product once for each setting of the environment that can
help, with `mha_fast.linear`, which computes the product in our threads, and with torch's where that
is installed. Each setting needs a process of its own, because thread pools read the environment
only once; so does torch, beside which our team is another one.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np

from ..attention import attention
from ..model.projection import linear

TOKENS = (16, 128, 512)
WIDTH, HEADS = 768, 12
SETTINGS = {
    "as it is": {},
    "BLAS threads sleep early": {"OPENBLAS_THREAD_TIMEOUT": "10"},
    "OpenMP threads sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "both": {"OPENBLAS_THREAD_TIMEOUT": "10", "OMP_WAIT_POLICY": "PASSIVE"},
    "BLAS on one thread": {"OPENBLAS_NUM_THREADS": "1"},
}
OURS = "mha_fast.linear for NumPy's @"
GOOD = 1.15  # a pair that costs at most this times the sum of its parts is fine


def doctor():
    """Measure every setting, print a table and an advice."""
    print(f"{WIDTH} wide, {HEADS} heads; microseconds of product + attention, and times the sum")
    print(f"{'':30}" + "".join(f"{n:>10} tokens" for n in TOKENS))
    pairs = {}
    for name, variables in SETTINGS.items():
        rows = json.loads(_measure_elsewhere(variables))
        pairs[name] = _show(name, rows, "matmul")
        if not variables:
            ours = _show(OURS, rows, "linear")
    if importlib.util.find_spec("torch"):
        _show("torch's product", json.loads(_measure_elsewhere({}, "torch, ")), "torch")
    print(f"\n{_advice(pairs)}")
    print(_advice_on_products(pairs["as it is"], ours))


def _advice(pairs):
    """Which setting helps, if one does."""
    gain = {name: _mean_ratio(pairs["as it is"], times) for name, times in pairs.items()}
    best = max(gain, key=gain.get)
    if gain[best] <= GOOD:
        return "No setting is worth changing."
    exports = " ".join(f"{key}={value}" for key, value in SETTINGS[best].items())
    return f"Starting Python with {exports} makes these pairs {gain[best]:.1f} times faster."


def _advice_on_products(usual, ours):
    """At which sizes `mha_fast.linear` helps, if it does."""
    better = [i for i, (a, b) in enumerate(zip(usual, ours, strict=True)) if a > GOOD * b]
    if not better:
        return f"{OURS} makes these pairs no faster."
    gain = _mean_ratio([usual[i] for i in better], [ours[i] for i in better])
    tokens = ", ".join(str(TOKENS[i]) for i in better)
    return f"{OURS} makes these pairs {gain:.1f} times faster at {tokens} tokens."


def _show(name, rows, product):
    """Print how pairs with this product do, and return their times."""
    pairs = [row[f"{product}+attention"] for row in rows]
    sums = [row[product] + row["attention"] for row in rows]
    cells = (f"{1e6 * p:9.0f} {p / s:5.2f}x" for p, s in zip(pairs, sums, strict=True))
    print(f"{name:30}" + " ".join(cells), flush=True)
    return pairs


def _mean_ratio(times, others):
    return float(np.exp(np.mean(np.log(np.divide(times, others)))))


def _measure_elsewhere(variables, beside=""):
    script = f"import {beside}mha_fast.process.doctor as doctor; doctor.measure()"
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout


def measure():
    """Print the times of one process as JSON."""
    rows = []
    for tokens in TOKENS:
        timed = calls(**arrays(tokens))
        rows.append({name: _median(call) for name, call in timed.items()})
    print(json.dumps(rows))


def arrays(tokens, seed=0):
    """What `calls` computes with: `x`, `weight`, and q, k and v as one array."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (tokens, WIDTH),
        "weight": (WIDTH, WIDTH),
        "qkv": (3, HEADS, tokens, WIDTH // HEADS),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def calls(x, weight, qkv):
    """The parts and the pairs, each a function without arguments."""

    def attend():
        return attention(*qkv)

    products = {"matmul": lambda: x @ weight.T, "linear": lambda: linear(x, weight)}
    if torch := sys.modules.get("torch"):
        products = {
            "torch": partial(torch.nn.functional.linear, *map(torch.from_numpy, (x, weight)))
        }
    pairs = {
        f"{name}+attention": lambda product=product: (product(), attend())
        for name, product in products.items()
    }
    return {**products, "attention": attend, **pairs}


def _median(call, repeats=60):
    time.sleep(0.1)  # let the threads of the measurement before go to sleep
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
