"""The workers as the parent sees them: one works, the others stand still.

Idle threads of OpenBLAS and onnxruntime spin on after a call and can double the time of
whoever comes next. So every system has its own process, and every process but the one
at work is stopped with SIGSTOP.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time

import worker

# One count for every pool that a system may bring along.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NPROC",  # of JAX
)
SETTLE = 0.005  # seconds for a stop to reach every thread of a process


class WorkerError(Exception):
    """A request failed; the text says why."""


class Worker:
    """One stopped process. It runs only while it answers a request."""

    def __init__(self, task, name, threads):
        self.name = name
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=worker.main, args=(theirs, task, name, threads), name=name, daemon=True
        )
        self.process.start()
        theirs.close()
        try:
            self._receive()
        except WorkerError:
            self.close()
            raise
        self._signal("SIGSTOP")

    def request(self, method, *arguments):
        """Let the worker go on, wait for its answer, stop it again."""
        self._signal("SIGCONT")
        try:
            with contextlib.suppress(BrokenPipeError):
                self.pipe.send((method, arguments))
            return self._receive()
        finally:
            self._signal("SIGSTOP")
            time.sleep(SETTLE)

    def alive(self):
        return self.process.is_alive()

    def close(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _receive(self):
        try:
            status, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            raise WorkerError(f"worker died with exit code {code}") from None
        if status == "error":
            raise WorkerError(value)
        return value

    def _signal(self, name):
        # Windows has no such signals: there the workers stay awake.
        if hasattr(signal, name) and self.process.is_alive():
            os.kill(self.process.pid, getattr(signal, name))


class Team:
    """All workers by name. Use as a context manager.

    Parameters
    ----------
    task : str
        Name of the module that has the systems.
    members : dict of str to int
        Threads of each system.
    threads : int
        Of the worker that measures peaks.
    """

    def __init__(self, task, members, threads):
        self.task = task
        self.members = members
        self.threads = {worker.PEAK: threads, **members}
        self.workers = {}
        self.failed = {}

    def hire(self, name):
        try:
            self.workers[name] = Worker(self.task, name, self.threads[name])
        except WorkerError as error:
            self.failed[name] = str(error)

    def request(self, name, method, *arguments):
        """Ask one worker; one that died is replaced first."""
        if name in self.workers and not self.workers[name].alive():
            self.workers.pop(name).close()
            self.hire(name)
        if name not in self.workers:
            raise WorkerError(self.failed.get(name, "no such worker"))
        return self.workers[name].request(method, *arguments)

    def close(self):
        for member in self.workers.values():
            member.close()

    def __enter__(self):
        try:
            for name in self.threads:
                self.hire(name)
        except BaseException:  # a stopped process outlives us unless it is killed
            self.close()
            raise
        return self

    def __exit__(self, *exception):
        self.close()


def end_all(*_):
    """Signal handler: leave at once. A stopped process outlives us unless killed."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(143)
