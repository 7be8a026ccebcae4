"""Do NumPy's BLAS threads and ours get in each other's way on this machine?

Alternates a matrix product and an attention call in one process and compares the time of the pair
with the sum of its parts, once for each setting of the environment that can help. Each setting
needs a process of its own, because both thread pools read the environment only once.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np

from .attention import attention

TOKENS = (16, 128, 512)
WIDTH, HEADS = 768, 12
SETTINGS = {
    "as it is": {},
    "BLAS threads sleep early": {"OPENBLAS_THREAD_TIMEOUT": "10"},
    "OpenMP threads sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "both": {"OPENBLAS_THREAD_TIMEOUT": "10", "OMP_WAIT_POLICY": "PASSIVE"},
    "BLAS on one thread": {"OPENBLAS_NUM_THREADS": "1"},
}
GOOD = 1.15  # a pair that costs at most this times the sum of its parts is fine


def doctor():
    """Measure every setting, print a table and an advice."""
    print(f"{WIDTH} wide, {HEADS} heads; microseconds of product + attention, and times the sum")
    print(f"{'':30}" + "".join(f"{n:>10} tokens" for n in TOKENS))
    pairs = {}
    for name, variables in SETTINGS.items():
        rows = json.loads(_measure_elsewhere(variables))
        pairs[name] = [row["pair"] for row in rows]
        cells = (f"{1e6 * r['pair']:9.0f} {r['pair'] / r['parts']:5.2f}x" for r in rows)
        print(f"{name:30}" + " ".join(cells), flush=True)
    usual = pairs["as it is"]
    gain = {name: _mean_ratio(times, usual) for name, times in pairs.items()}
    best = min(gain, key=gain.get)
    if gain[best] > 1 / GOOD:
        print("\nNo setting is worth changing.")
        return
    exports = " ".join(f"{key}={value}" for key, value in SETTINGS[best].items())
    print(f"\nStarting Python with {exports} makes these pairs {1 / gain[best]:.1f} times faster.")


def _mean_ratio(times, others):
    return float(np.exp(np.mean(np.log(np.divide(times, others)))))


def _measure_elsewhere(variables):
    command = [sys.executable, "-P", "-c", "from mha_fast import doctor; doctor.measure()"]
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout


def measure():
    """Print the times of one process as JSON."""
    rng = np.random.default_rng(0)
    rows = []
    for n in TOKENS:
        x = rng.standard_normal((n, WIDTH), dtype=np.float32)
        w = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32)
        qkv = rng.standard_normal((3, HEADS, n, WIDTH // HEADS), dtype=np.float32)
        parts = [_median(lambda x=x, w=w: x @ w), _median(lambda qkv=qkv: attention(*qkv))]
        pair = _median(lambda x=x, w=w, qkv=qkv: (x @ w, attention(*qkv)))
        rows.append({"parts": sum(parts), "pair": pair})
    print(json.dumps(rows))


def _median(call, repeats=60):
    time.sleep(0.1)  # let the threads of the measurement before go to sleep
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
