"""Scaling over threads: attention on one thread, on two, four and so on, up to all.

Each thread count is a system of its own, in a process of its own, and is held against the
peak of as many threads.
"""

from __future__ import annotations

import machine
import report
from cases import CASES
from systems import MhaFast

LARGE = (
    "bert_b8_s128",
    "gpt2_s1024",
    "llama_s2048",
    "long_s8192",
    "window_s4096_w1024",
    "decode_b16_2k",
)


def label(count):
    return "1 thread" if count == 1 else f"{count} threads"


SYSTEMS = {label(count): MhaFast for count in range(1, machine.usable_cores() + 1)}


def members(names, threads):
    """Threads of each system: powers of two, and `threads`."""
    counts = sorted({threads, *(2**power for power in range(threads.bit_length()))})
    return {label(count): count for count in counts if label(count) in names}


def scaling_cases():
    return [case for case in CASES if case.name in LARGE]


def table(results):
    """Header and rows: time and share of each thread count, and the gain of the last."""
    counts = report.timed(results)
    header = ["case"]
    for count in counts:
        header += [count, "share"]
    rows = []
    for result in results:
        cells = []
        for count in counts:
            cells += [report.duration(report.time_of(result, count))]
            cells += [report.percent(share(results, result, count))]
        rows.append([result["case"], *cells, speed_up(result, counts)])
    return [*header, "speed-up"], rows


def share(results, result, count):
    """Rate over the peak of as many threads: as `report.set_peaks`, for each count."""
    reached = report.rate(result, count)
    same = [result] if result["unit"] == "bandwidth" else results
    peaks = [
        peak
        for other in same
        if other["unit"] == result["unit"]
        for peak in other["peaks_by_system"].get(count, [])
    ]
    return reached / max(peaks) if reached and peaks else None


def speed_up(result, counts):
    first, last = (report.time_of(result, count) for count in (counts[0], counts[-1]))
    return report.MISSING if None in (first, last) else f"{first / last:.2f}x"
