"""What a result must say about where it was measured. No host names."""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import platform
import subprocess
import sys


def usable_cores():
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe(threads, versions, config):
    """The machine and software as a dictionary for the JSON file.

    `config` is what ``mha_fast.show_config(mode="dicts")`` says, or empty.
    """
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": threads,
        "isa": config.get("Instruction sets", {}).get("in use"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "mha_fast_config": config,
    }


def cpu_name():
    """The processor's name, as well as the system tells it."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        return output_of("sysctl", "-n", "machdep.cpu.brand_string") or "unknown"
    return platform.processor() or platform.machine() or "unknown"


def commit():
    """Short commit hash of this checkout, '+' if files differ from it, or None."""
    revision = output_of("git", "rev-parse", "--short", "HEAD")
    if not revision:
        return None
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return revision + ("+" if changed else "")


def output_of(*command):
    """What a command prints, or None if it cannot be run or fails."""
    folder = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
