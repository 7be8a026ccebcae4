"""Time mha_fast and its peers. ``python benchmarks/bench.py --help`` lists the knobs.

How it measures: every system in its own process, one at work and the others stopped; in
rounds, so that a change of clock hits all systems alike; the machine's FMA peak and
read bandwidth in every round. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import pathlib
import signal
import statistics
import sys

import machine
import report
from cases import CASES, heads_sweep, lengths_sweep
from systems import SYSTEMS
from team import Team, WorkerError, end_all
from worker import PEAK

SWEEP_SYSTEMS = ("mha_fast", "numpy", "torch")
QUICK_FLOPS = 5e10  # larger cases are left out of --quick


def parse(arguments):
    parser = argparse.ArgumentParser(description="Time mha_fast and its peers on this machine.")
    add = parser.add_argument
    add("--cases", nargs="+", metavar="GLOB", help="cases to run, by name")
    add("--systems", nargs="+", metavar="NAME", choices=SYSTEMS, help="default: all")
    add("--rounds", type=int, help="rounds a case (default 5)")
    add("--seconds", type=float, help="seconds a system and round (default 0.2)")
    add("--threads", type=int, default=machine.usable_cores(), help="default: all cores")
    add("--seed", type=int, default=0, help="of the random inputs (default 0)")
    add("--quick", action="store_true", help="2 rounds of 0.05 s, no very large cases")
    add("--heads", metavar="PNG", help="time against the number of heads, plotted")
    add("--lengths", metavar="PNG", help="time against the sequence length, plotted")
    add("--json", metavar="FILE", help="store all numbers")
    add("--plot", metavar="PNG", help="plot the table")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--load", metavar="FILE", help="show a stored result, run nothing")
    add("--compare", nargs=2, metavar=("A", "B"), help="B/A per case, worst first")
    add("--list", action="store_true", help="list the cases")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 2 if options.quick else 5
    if options.seconds is None:
        options.seconds = 0.05 if options.quick else 0.2
    if min(options.rounds, options.seconds, options.threads) <= 0:
        parser.error("--rounds, --seconds and --threads must be positive")
    pictures = options.plot or options.heads or options.lengths
    if pictures and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot, --heads and --lengths need matplotlib")
    return options


def choose_cases(options):
    """Pairs (sweep, case); sweep is 'table', 'heads' or 'lengths'."""
    chosen = []
    if options.cases or not (options.heads or options.lengths):
        patterns = options.cases or ["*"]
        chosen = [
            ("table", case)
            for case in CASES
            if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
        ]
        if not chosen:
            sys.exit(f"no case matches {' '.join(patterns)}; --list shows the names")
    if options.heads:
        chosen += [("heads", case) for case in heads_sweep()]
    if options.lengths:
        chosen += [("lengths", case) for case in lengths_sweep()]
    if options.quick:
        chosen = [
            (sweep, case)
            for sweep, case in chosen
            if case.flops() < QUICK_FLOPS or (sweep == "table" and options.cases)
        ]
    return chosen


def choose_systems(options, sweeps):
    """Names of the systems to time, ours first."""
    names = options.systems or (SYSTEMS if "table" in sweeps else SWEEP_SYSTEMS)
    missing = [name for name in names if not SYSTEMS[name].installed()]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    found = [name for name in SYSTEMS if name in names and name not in missing]
    return found or sys.exit("no system to time")


def run_case(team, case, systems, options):
    """All rounds of one case. Return its result without the sweep's name."""
    entries, ready = {}, []
    for name in systems:
        try:
            able = team.request(name, "prepare", case, options.seed)
            entries[name] = {"status": "ok" if able else "cannot"}
            if able:
                entries[name]["rounds"] = []
                ready.append(name)
        except WorkerError as error:
            entries[name] = {"status": "error", "error": str(error)}
    peaks = {"fma": [], "bandwidth": []}
    peak = {"flops": "fma", "bandwidth": "bandwidth"}.get(case.unit)
    for _ in range(options.rounds):
        if peak:
            with contextlib.suppress(WorkerError):
                value = team.request(PEAK, peak, options.seconds / 2)
                peaks[peak] += [] if value is None else [value]
        for name in list(ready):
            try:
                measured = team.request(name, "measure", options.seconds)
                entries[name]["rounds"].append(measured)
            except WorkerError as error:
                entries[name] = {"status": "error", "error": str(error)}
                ready.remove(name)
    for name in ready:
        best, median, _ = zip(*entries[name]["rounds"], strict=True)
        entries[name].update(best=min(best), median=statistics.median(median))
        team.request(name, "release")
    return {
        "case": case.name,
        "params": vars(case),
        "unit": case.unit,
        "flops": case.flops(),
        "flops_with_padding": case.flops_with_padding(),
        "kv_bytes": case.kv_bytes(),
        "fma_peak": peaks["fma"],
        "read_bandwidth": peaks["bandwidth"],
        "systems": entries,
    }


@contextlib.contextmanager
def progress_bar(total):
    """Yield a function to call with the name of each case before it runs."""
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError:
        yield lambda name: print(name, file=sys.stderr)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: print(name, file=sys.stderr)
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    # A refreshing thread would take time from the system at work.
    with Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        started = []

        def step(name):
            bar.update(task, completed=len(started), description=name, refresh=True)
            started.append(name)

        yield step
        bar.update(task, completed=total, description="done", refresh=True)


def run(options):
    """Run the chosen cases. Return the document that ``--json`` stores."""
    cases = choose_cases(options)
    sweeps = {sweep for sweep, _ in cases}
    systems = choose_systems(options, sweeps)
    results = []
    with Team(systems, options.threads) as team:
        versions, config = {}, {}
        for name in systems:
            with contextlib.suppress(WorkerError):
                versions.update(team.request(name, "versions"))
                config.update(team.request(name, "config"))
        where = machine.describe(options.threads, versions, config)
        with progress_bar(len(cases)) as step:
            for sweep, case in cases:
                step(case.name)
                wanted = [
                    name
                    for name in systems
                    if sweep == "table" or options.systems or name in SWEEP_SYSTEMS
                ]
                result = run_case(team, case, wanted, options)
                results.append({"sweep": sweep, **result})
    report.set_peaks(results)
    settings = {"rounds": options.rounds, "seconds": options.seconds}
    return {
        "machine": where,
        "settings": {**settings, "seed": options.seed},
        "systems": systems,
        "results": results,
    }


def publish(document, options):
    """Print the tables and write the plots that were asked for."""
    systems, where = document["systems"], document["machine"]
    by_sweep = {}
    for result in document["results"]:
        by_sweep.setdefault(result["sweep"], []).append(result)
    for results in by_sweep.values():
        timed = [name for name in systems if any(name in r["systems"] for r in results)]
        header, rows = report.table(results, timed)
        if options.markdown:
            print(report.markdown(header, rows))
        else:
            report.show(header, rows)
        print()
    bullet = "- " if options.markdown else ""
    print("\n".join(bullet + line for line in report.notes(document)))
    for sweep, path, drawer in (
        ("table", options.plot, "table_plot"),
        ("heads", options.heads, "heads_plot"),
        ("lengths", options.lengths, "lengths_plot"),
    ):
        if path and sweep in by_sweep:
            import plots

            getattr(plots, drawer)(by_sweep[sweep], systems, where, path)


def read(path):
    """A document that ``--json`` stored."""
    return json.loads(pathlib.Path(path).read_text())


def compare(paths, options):
    """Print the comparison of two stored documents."""
    before, after = map(read, paths)
    for system in options.systems or [report.OURS]:
        header, rows = report.compare(before, after, system)
        if options.markdown:
            print(report.markdown(header, rows))
        else:
            report.show(header, rows, title=system)
    print("\n".join(report.differences(before, after)))


def list_cases():
    header = ["case", "batch", "heads/kv", "seqlen_q x k", "head_dim", "GFLOP", "KV MB"]
    rows = [
        [
            case.name,
            str(case.batch),
            f"{case.heads}/{case.kv_heads}",
            f"{case.seqlen_q} x {case.seqlen_k}",
            str(case.head_dim),
            f"{case.flops() / 1e9:.3g}",
            f"{case.kv_bytes() / 1e6:.3g}",
        ]
        for case in CASES
    ]
    report.show(header, rows)


def main(arguments=None):
    options = parse(arguments)
    if options.list:
        list_cases()
        return
    if options.compare:
        compare(options.compare, options)
        return
    document = read(options.load) if options.load else run(options)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    publish(document, options)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_all)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
