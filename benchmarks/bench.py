"""Time mha_fast and its peers. ``python benchmarks/bench.py --help`` lists the knobs.

How it measures: every system in its own process, one at work and the others stopped; in
rounds, so that a change of clock hits all systems alike; the machine's FMA peak and
read bandwidth in every round. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import signal
import sys

import machine
import report
from modes import FLAGS, MODES, PICTURES
from runs import choose, run
from team import end_all


def parse(arguments):
    parser = argparse.ArgumentParser(description="Time mha_fast and its peers on this machine.")
    add = parser.add_argument
    add("--cases", nargs="+", metavar="GLOB", help="cases to run, by name")
    names = {name: None for mode in MODES.values() for name in mode.task.SYSTEMS}
    add("--systems", nargs="+", metavar="NAME", choices=names, help="default: all")
    add("--rounds", type=int, help="rounds a case (default 5)")
    add("--seconds", type=float, help="seconds a system and round (default 0.2)")
    add("--threads", type=int, default=machine.usable_cores(), help="default: all cores")
    add("--seed", type=int, default=0, help="of the random inputs (default 0)")
    add("--quick", action="store_true", help="2 rounds of 0.05 s, no very large cases")
    for name in PICTURES:
        add(f"--{name}", metavar="PNG", help=MODES[name].about)
    for name in FLAGS:
        add(f"--{name}", action="store_true", help=MODES[name].about)
    add("--all", action="store_true", help=f"--{' --'.join(FLAGS)}")
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
    if options.all:
        vars(options).update(dict.fromkeys(FLAGS, True))
    options.table = options.table or not any(getattr(options, name) for name in MODES)
    return options


def publish(document, options):
    """Print the tables and write the plots that were asked for."""
    by_sweep = {}
    for result in document["results"]:
        by_sweep.setdefault(result["sweep"], []).append(result)
    for name, results in by_sweep.items():
        mode = MODES[name]
        output(*mode.table(results), options, mode.title if len(by_sweep) > 1 else None)
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

            drawn = by_sweep[sweep]
            getattr(plots, drawer)(drawn, report.timed(drawn), document["machine"], path)


def output(header, rows, options, title=None):
    """Print a table, with rich or as Markdown."""
    if not options.markdown:
        report.show(header, rows, title)
        return
    if title:
        print(f"### {title}\n")
    print(report.markdown(header, rows))


def read(path):
    """A document that ``--json`` stored."""
    return json.loads(pathlib.Path(path).read_text())


def compare(paths, options):
    """Print the comparison of two stored documents."""
    before, after = map(read, paths)
    for system in options.systems or [report.OURS]:
        output(*report.compare(before, after, system), options, system)
    print("\n".join(report.differences(before, after)))


def list_cases(options):
    for mode, cases in choose(options):
        header = ["case", *cases[0].columns()]
        rows = [[case.name, *case.columns().values()] for case in cases]
        output(header, rows, options, mode.title)
        print()


def main(arguments=None):
    options = parse(arguments)
    if options.list:
        list_cases(options)
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
