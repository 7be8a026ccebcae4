"""Results as text: the table, its Markdown form, and the comparison of two files.

A result is one case: ``{"case", "sweep", "unit", "flops", ..., "systems": {name:
{"status", "best", "median", ...}}}``, as stored by ``--json``.
"""

from __future__ import annotations

import shutil
import sys

OURS = "mha_fast"
MISSING = "-"


def time_of(result, system):
    """Best seconds of a system, or None if it was not timed."""
    return result["systems"].get(system, {}).get("best")


def rate(result, system):
    """GFLOP/s, or GB/s of KV bytes for a bandwidth case, or None."""
    best = time_of(result, system)
    if best is None or result["unit"] == "latency":
        return None
    work = result["kv_bytes" if result["unit"] == "bandwidth" else "flops"]
    return work / best / 1e9


def share(result, system):
    """Rate over the machine's peak, or None."""
    reached = rate(result, system)
    return reached / result["peak"] if reached and result["peak"] else None


def set_peaks(results):
    """Give each result the peak that its rates are held against, or None.

    The FMA peak belongs to the machine: the best of the whole run, so that a neighbour
    who disturbs one measurement cannot flatter a case. A vector holds half as many
    float64, which halves it. The memory is shared with others and its bandwidth comes
    and goes: the best of the case's own rounds.
    """
    fma = max((peak for r in results for peak in r["fma_peak"]), default=None)
    for result in results:
        result["peak"] = None
        if result["unit"] == "bandwidth":
            result["peak"] = max(result["read_bandwidth"], default=None)
        elif result["unit"] == "flops" and fma:
            halved = result["params"]["dtype"] == "float64"
            result["peak"] = fma / 2 if halved else fma


def duration(seconds):
    """Three digits and a unit: '2.42 ms'."""
    if seconds is None:
        return MISSING
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def percent(value):
    return MISSING if value is None else f"{100 * value:.0f} %"


def speed(result, system):
    """Rate with its unit."""
    value = rate(result, system)
    if value is None:
        return MISSING
    unit = "GB/s" if result["unit"] == "bandwidth" else "GFLOP/s"
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def peer_cell(result, peer):
    """How much longer the peer takes, and how fast it is."""
    entry = result["systems"].get(peer)
    if entry is None or entry["status"] == "cannot":
        return MISSING
    if entry["status"] == "error":
        return "error"
    figure = percent(share(result, peer))
    if figure == MISSING:
        figure = speed(result, peer)
    if figure == MISSING:
        figure = duration(entry["best"])
    ours = time_of(result, OURS)
    return figure if ours is None else f"{entry['best'] / ours:.2f}x  {figure}"


def timed(results):
    """Names of all systems in these results, in order."""
    return list({name: None for result in results for name in result["systems"]})


def table(results):
    """Header and rows: our times, then the peers."""
    peers = [system for system in timed(results) if system != OURS]
    header = ["case", "best", "median", "rate", "share", *peers]
    rows = []
    for result in results:
        entry = result["systems"].get(OURS, {"status": "cannot"})
        failed = entry["status"] == "error"
        rows.append(
            [
                result["case"],
                "error" if failed else duration(entry.get("best")),
                duration(entry.get("median")),
                speed(result, OURS),
                percent(share(result, OURS)),
                *(peer_cell(result, peer) for peer in peers),
            ]
        )
    return header, rows


def notes(document):
    """Lines under the table: the machine, the peaks, padding, errors."""
    machine, results = document["machine"], document["results"]
    where = [machine["cpu"], f"{machine['threads']} threads"]
    where += [f"{key} {machine[key]}" for key in ("isa", "commit") if machine[key]]
    lines = [
        ", ".join([*where, machine["date"]]),
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    ]
    if machine["load_average"]:
        lines.append(f"load average before: {machine['load_average'][0]:.2f}")
    for key, label, unit in (
        ("fma_peak", "FMA peak, float32", "GFLOP/s"),
        ("read_bandwidth", "read bandwidth", "GB/s"),
    ):
        peaks = [peak for result in results for peak in result[key]]
        if peaks:
            lines.append(f"{label}: {min(peaks):.1f} to {max(peaks):.1f} {unit}")
    for result in results:
        reached = share(result, OURS)
        if reached is not None and result["flops_with_padding"] > result["flops"]:
            whole = reached * result["flops_with_padding"] / result["flops"]
            if result["unit"] == "flops":
                lines.append(f"{result['case']}: {percent(whole)} if padding counts as work")
    for result in results:
        for name, entry in result["systems"].items():
            if entry["status"] == "error":
                lines.append(f"error: {result['case']}, {name}: {entry['error']}")
    return lines


def markdown(header, rows):
    """A table in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(header, rows):
    """A table as aligned text."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for line in (header, *rows):
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def show(header, rows, title=None):
    """Print a table, with rich on a terminal that is wide enough for it."""
    text = "\n".join(filter(None, [title, plain(header, rows)]))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(text)
        return
    needed = max(map(len, text.splitlines())) + len(header) + 2
    if not sys.stdout.isatty() or shutil.get_terminal_size().columns < needed:
        print(text)
        return
    pretty = Table(title=title, header_style="bold")
    for index, name in enumerate(header):
        pretty.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        pretty.add_row(*row)
    Console().print(pretty)


def compare(before, after, system=OURS):
    """Header and rows: time after / time before per case, worst first."""
    old = {(result["sweep"], result["case"]): result for result in before["results"]}
    found = []
    for result in after["results"]:
        same = old.get((result["sweep"], result["case"]), {"systems": {}})
        first, second = time_of(same, system), time_of(result, system)
        if first is not None and second is not None:
            found.append((second / first, same, result))
    found.sort(key=lambda item: -item[0])
    header = ["case", "A", "B", "B/A", "share A", "share B"]
    rows = [
        [
            second["case"],
            duration(time_of(first, system)),
            duration(time_of(second, system)),
            f"{ratio:.3f}",
            percent(share(first, system)),
            percent(share(second, system)),
        ]
        for ratio, first, second in found
    ]
    return header, rows


def differences(before, after):
    """Lines that name what besides the code differs between two files."""
    old, new = before["machine"], after["machine"]
    pairs = [(key, old[key], new[key]) for key in ("cpu", "threads", "isa", "python")]
    for package in old["versions"].keys() & new["versions"].keys():
        pairs.append((package, old["versions"][package], new["versions"][package]))
    return [f"note: {key}: A {a}, B {b}" for key, a, b in sorted(pairs) if a != b]
