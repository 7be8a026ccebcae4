"""What this build is and what it will do: for bug reports and for tuning."""

import os
import platform

import numpy as np

from .. import _core
from . import threads

VARIABLES = ("MHA_FAST_ISA", threads.VARIABLE, "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def show_config(mode="stdout"):
    """Show version, compiler, instruction sets, OpenMP and threads.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print, or return a dict; as in `numpy.show_config`.

    Returns
    -------
    dict or None

    Raises
    ------
    ValueError
        `mode` is neither of the two.

    Examples
    --------
    >>> show_config(mode="dicts")["OpenMP"]["threads"] >= 1
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode is {mode!r}, expected 'stdout' or 'dicts'")
    config = _config()
    if mode == "dicts":
        return config
    for section, entries in config.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")
    return None


def _config():
    # Here, not above: 5 ms that `import mha_fast` need not pay.
    from threadpoolctl import threadpool_info

    from .. import __version__

    pools = [
        f"{pool['internal_api']} ({pool['num_threads']} threads)" for pool in threadpool_info()
    ]
    return {
        "Versions": {
            "mha_fast": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "compiler": _core.COMPILER,
        },
        "Instruction sets": {
            "in use": _core.get_isa(),
            "usable here": ", ".join(_core.isa_names()),
            "compiled in": ", ".join(_core.isa_names(usable=False)),
        },
        "OpenMP": {
            "version": _core.openmp_version() or "none: this build is serial",
            "threads": threads.get_num_threads(),
            "because of": _reason(),
            "thread pools": ", ".join(pools),
        },
        "Environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _reason():
    """Which rule of threads.py decided."""
    if _core.is_forked():
        return "a forked child of a process that may have used OpenMP stays serial"
    if _core.get_threads_set():
        return f"set_num_threads or {threads.VARIABLE}"
    if "OMP_NUM_THREADS" in os.environ:
        return "OMP_NUM_THREADS"
    quota = threads.cpu_quota()
    if quota and quota == threads.get_num_threads():
        return "the CPU quota of the container"
    return "OpenMP: CPUs this process may use, or a limit of threadpoolctl"
