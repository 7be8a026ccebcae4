"""Fixtures: every ISA of this machine, dtypes, options, and a fresh process."""

import os
import subprocess
import sys

import hypothesis
import pytest
import sizes
from options import OPTIONS, PLAIN

import mha_fast
from mha_fast import _core

hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=int(os.environ.get("MHA_FAST_TEST_EXAMPLES", "300")),
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(params=_core.isa_names())
def isa(request):
    """Compute with this instruction set during the test."""
    with sizes.computing_with(request.param):
        yield request.param


@pytest.fixture(params=sizes.DTYPES, ids=str)
def dtype(request):
    """Every storage dtype."""
    return request.param


@pytest.fixture(params=sizes.REALS, ids=str)
def real(request):
    """Every compute dtype."""
    return request.param


@pytest.fixture(params=[PLAIN, *OPTIONS.values()], ids=["plain", *OPTIONS])
def option(request):
    """Every option by itself: a function of q, k and v."""
    return request.param


@pytest.fixture
def spied(monkeypatch):
    """A function of where a module has `attention`: the options of each call that it makes."""

    def spy_on(target):
        seen = []

        def spy(*arrays, **options):
            seen.append(options)
            return mha_fast.attention(*arrays, **options)

        monkeypatch.setattr(target, spy)
        return seen

    return spy_on


@pytest.fixture
def restored_threads():
    """Leave the number of threads as it was found."""
    yield
    mha_fast.set_num_threads(None)


@pytest.fixture
def run_python():
    """Run a script in a process of its own; environment variables as keywords."""

    def run(code, timeout=60, **variables):
        names = ("MHA_FAST_ISA", "MHA_FAST_NUM_THREADS", "OMP_NUM_THREADS")
        clean = {n: x for n, x in os.environ.items() if n not in names}
        return subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=clean | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def output_of(run_python):
    """What a script prints; it must succeed."""

    def run(code, **more):
        process = run_python(code, **more)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    return run
