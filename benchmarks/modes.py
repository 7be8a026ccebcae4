"""What can be measured: the table of attention, and what options run in its place."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import backward
import layer
import linear
import packed
import pairs
import report
import scaling
import systems
from cases import CASES, heads_sweep, lengths_sweep

SWEEP_SYSTEMS = ("mha_fast", "numpy", "torch")
QUICK_FLOPS = 5e10  # larger cases are left out of --quick


@dataclass(frozen=True)
class Mode:
    """One thing to measure.

    Parameters
    ----------
    name : str
        Its option, and its key in stored results.
    title, about : str
        Over its table, and in ``--help``.
    cases : function that returns a list of Problem
    task : module
        Where `SYSTEMS` is.
    names : tuple of str, optional
        Systems that are timed unless ``--systems`` names others. Default all.
    members : function (names, threads) that returns a dictionary name -> threads
    table : function (results) that returns a header and rows
    """

    name: str
    title: str
    about: str
    cases: Callable
    task: ModuleType = systems
    names: tuple[str, ...] | None = None
    members: Callable = dict.fromkeys
    table: Callable = report.table

    def choose_cases(self, options):
        """The cases to run: all, or those that ``--cases`` names."""
        patterns = options.cases or ["*"]
        return [
            case
            for case in self.cases()
            if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
            and not (options.quick and not options.cases and case.flops() >= QUICK_FLOPS)
        ]

    def choose_members(self, options):
        """Threads of each system to time, by name, ours first."""
        known = self.task.SYSTEMS
        names = [name for name in known if name in (options.systems or ())]
        names = names or list(self.names or known)
        missing = [name for name in names if not known[name].installed()]
        if missing:
            print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
        found = [name for name in names if name not in missing]
        return self.members(found, options.threads)


MODES = {
    mode.name: mode
    for mode in (
        Mode("table", "Attention", "attention: the default", lambda: CASES),
        Mode("heads", "Heads", "time against the number of heads, plotted",
             heads_sweep, names=SWEEP_SYSTEMS),
        Mode("lengths", "Sequence lengths", "time against the sequence length, plotted",
             lengths_sweep, names=SWEEP_SYSTEMS),
        Mode("backward", "The backward pass", "gradients of q, k and v, without the forward pass",
             backward.backward_cases, backward, table=backward.table),
        Mode("linear", "Products of the layer", "the layer's products alone",
             linear.linear_sizes, linear),
        Mode("packed", "Few rows of a packed weight", "few rows times a packed weight",
             packed.packed_sizes, packed),
        Mode("layer", "The layer", "projections, attention, output projection",
             layer.layer_sizes, layer),
        Mode("pairs", "A product and attention in turn", "a product and attention in turn",
             pairs.pair_sizes, pairs, table=pairs.table),
        Mode("scaling", "Scaling over threads", "attention on 1, 2, 4 ... threads",
             scaling.scaling_cases, scaling, members=scaling.members, table=scaling.table),
    )
}  # fmt: skip
PICTURES = ("heads", "lengths")  # their options take the picture's name
FLAGS = tuple(name for name in MODES if name not in PICTURES)
