"""The order of things: modes, cases, rounds, systems."""

from __future__ import annotations

import contextlib
import statistics
import sys

import machine
import report
from modes import MODES
from team import Team, WorkerError
from worker import PEAK


def choose(options):
    """Pairs (mode, cases) that have something to run."""
    chosen = []
    for mode in MODES.values():
        if getattr(options, mode.name):
            cases = mode.choose_cases(options)
            impossible = [case.name for case in cases if not case.possible()]
            if impossible:
                print(f"need ml_dtypes, left out: {', '.join(impossible)}", file=sys.stderr)
            cases = [case for case in cases if case.name not in impossible]
            chosen += [(mode, cases)] if cases else []
    if not chosen:
        sys.exit(f"no case matches {' '.join(options.cases or [])}; --list shows the names")
    return chosen


def run(options):
    """Run the chosen cases. Return the document that ``--json`` stores."""
    chosen = choose(options)
    results, versions, config, where = [], {}, {}, None
    with progress_bar(sum(len(cases) for _, cases in chosen)) as step:
        for mode, cases in chosen:
            members = mode.choose_members(options)
            if not members:
                continue
            with Team(mode.task.__name__, members, options.threads) as team:
                for name in members:
                    with contextlib.suppress(WorkerError):
                        versions.update(team.request(name, "versions"))
                        config.update(team.request(name, "config"))
                where = where or machine.describe(options.threads, versions, config)
                for case in cases:
                    step(case.name)
                    results.append({"sweep": mode.name, **run_case(team, case, options)})
    if where is None:
        sys.exit("no system to time")
    report.set_peaks(results)
    settings = {"rounds": options.rounds, "seconds": options.seconds, "seed": options.seed}
    return {"machine": where, "settings": settings, "results": results}


def run_case(team, case, options):
    """All rounds of one case. Return its result without the mode's name."""
    entries, ready = {}, []
    for name in team.members:
        try:
            able = team.request(name, "prepare", case, options.seed)
            entries[name] = {"status": "ok" if able else "cannot"}
            if able:
                entries[name]["rounds"] = []
                ready.append(name)
        except WorkerError as error:
            entries[name] = {"status": "error", "error": str(error)}
    peak = {"flops": "fma", "bandwidth": "bandwidth"}.get(case.unit)
    peaks = {count: [] for count in sorted({*team.members.values(), options.threads})}
    for _ in range(options.rounds):
        for count, measured in peaks.items():
            if peak:
                with contextlib.suppress(WorkerError):
                    value = team.request(PEAK, peak, options.seconds / 2, count)
                    measured += [] if value is None else [value]
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
        "fma_peak": peaks[options.threads] if peak == "fma" else [],
        "read_bandwidth": peaks[options.threads] if peak == "bandwidth" else [],
        "peaks_by_system": {name: peaks[count] for name, count in team.members.items()},
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
