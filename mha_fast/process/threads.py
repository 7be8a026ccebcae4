"""How many threads a call may use.

In this order: the call's ``threads=``, `set_num_threads`, ``MHA_FAST_NUM_THREADS``, and what
OpenMP says, which knows ``OMP_NUM_THREADS``, CPU affinity and threadpoolctl; capped by the
container's CPU quota where neither variable is set. Small calls use fewer, or one.
"""

import math
import os

from .. import _core
from ..arguments import thread_count

VARIABLE = "MHA_FAST_NUM_THREADS"


def set_num_threads(count):
    """Set the number of threads of calls that do not say ``threads=``, process-wide.

    Parameters
    ----------
    count : int or None
        At least 1. None goes back to the environment's and OpenMP's choice.

    Raises
    ------
    TypeError, ValueError
        `count` is not an int, or less than 1.

    Examples
    --------
    >>> before = get_num_threads()
    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(None)
    >>> get_num_threads() == before
    True
    """
    _core.set_threads(from_environment() if count is None else thread_count("count", count))


def get_num_threads():
    """Number of threads that a large call made now, from this thread, would use.

    Examples
    --------
    >>> get_num_threads() >= 1
    True
    """
    return _core.get_threads()


def from_environment():
    """The count that MHA_FAST_NUM_THREADS asks for; 0 where it is not set."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{VARIABLE}={text!r}, expected a positive integer")
    return min(int(text), 2**20)


def _read(name):
    with open(f"/sys/fs/cgroup/{name}") as file:
        return file.read()


def cpu_quota():
    """CPUs that the container's control group grants, rounded up; 0 where it sets no limit.

    Reads the Linux kernel's interface files: cpu.max (version 2), cpu.cfs_* (version 1).
    """
    try:
        quota, period = _read("cpu.max").split()
    except (OSError, ValueError):
        try:
            quota, period = _read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")
        except OSError:
            return 0
    try:
        return max(0, math.ceil(int(quota) / int(period)))
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return 0


set_num_threads(None)
if not os.environ.get("OMP_NUM_THREADS"):
    _core.set_quota(cpu_quota())
