"""What runs inside a worker process: one system, or the machine's own peaks.

A worker answers one request at a time: ``(method name, arguments)`` in, ``("ok",
value)`` or ``("error", text)`` out. Between requests the parent keeps it stopped.
"""

from __future__ import annotations

import importlib
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PEAK = "peak"
READ_BUFFER_BYTES = 256 * 2**20  # a thread; far larger than any cache
FMA_ROUNDS = 1_000_000  # a few milliseconds
LONG_CALL = 1.0  # seconds; such a call needs no warm-up and few repetitions


class SystemWorker:
    """Runs one system."""

    def __init__(self, task, name, threads):
        self.system = importlib.import_module(task).SYSTEMS[name](threads)
        self.call = None

    def versions(self):
        return self.system.versions()

    def config(self):
        """What mha_fast says about itself; empty for the peers."""
        if "mha_fast" not in self.system.packages:
            return {}
        import mha_fast

        return mha_fast.show_config(mode="dicts")

    def prepare(self, case, seed):
        """Build the inputs and check one result. False: the case cannot be said."""
        inputs = case.make_inputs(seed)
        self.call = None
        if set(case.options) <= set(self.system.options):
            self.call = self.system.prepare(case, inputs)
        if self.call is None:
            return False
        case.check(inputs, self.system.canonical(self.call(), case))
        return True

    def measure(self, seconds):
        return time_calls(self.call, seconds)

    def release(self):
        self.call = None


def time_calls(call, seconds):
    """Time `call` for about `seconds`, at least 3 times: (best, median, calls)."""
    start = time.perf_counter()
    call()  # its caches were left to others meanwhile
    warm_up = time.perf_counter() - start
    times = [warm_up] if warm_up > LONG_CALL else []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if sum(times[:3]) > 3 * LONG_CALL:
            break
    return min(times), statistics.median(times), len(times)


class PeakWorker:
    """Measures what the machine can do: FMA rate and read bandwidth.

    Both loops come from mha_fast's compiled core, which releases the GIL. Without it
    the answers are None.
    """

    def __init__(self):
        self.buffers = []
        try:
            from mha_fast import _core
        except ImportError:
            _core = None
        self.core = _core

    def fma(self, seconds, threads):
        """GFLOP/s in float32 of so many threads together, or None."""
        if self.core is None:
            return None
        return sum(self.at_once(self.fma_rate, [seconds] * threads)) / 1e9

    def fma_rate(self, seconds):
        """FLOP/s of this thread, the best of many calls."""
        best, end = 0.0, time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            flops = self.core.fma_chain(FMA_ROUNDS)
            best = max(best, flops / (time.perf_counter() - start))
        return best

    def bandwidth(self, seconds, threads):
        """GB/s read by so many threads together, the best pass, or None."""
        if self.core is None:
            return None
        while len(self.buffers) < threads:
            self.buffers.append(np.ones(READ_BUFFER_BYTES // 4, np.float32))
        fastest, end = float("inf"), time.perf_counter() + seconds
        while fastest == float("inf") or time.perf_counter() < end:
            spans = self.at_once(self.read, self.buffers[:threads])
            starts, ends = zip(*spans, strict=True)
            fastest = min(fastest, max(ends) - min(starts))
        return threads * READ_BUFFER_BYTES / fastest / 1e9

    def read(self, buffer):
        """Start and end of one pass over `buffer`."""
        start = time.perf_counter()
        self.core.read_all(buffer)
        return start, time.perf_counter()

    def at_once(self, function, arguments):
        """Call `function` with each argument, a thread each; return the results."""
        with ThreadPoolExecutor(len(arguments)) as pool:
            barrier = threading.Barrier(len(arguments))

            def run(argument):
                barrier.wait()
                return function(argument)

            return list(pool.map(run, arguments))


def main(pipe, task, name, threads):
    """Serve requests until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    try:
        worker = PeakWorker() if name == PEAK else SystemWorker(task, name, threads)
    except Exception as error:
        worker = None
        pipe.send(("error", describe(error)))
    else:
        pipe.send(("ok", None))
    while worker is not None:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", getattr(worker, method)(*arguments)))
        except Exception as error:
            pipe.send(("error", describe(error)))


def describe(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
