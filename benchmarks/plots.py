"""Results as pictures. Colours are Okabe and Ito's, told apart by colour-blind eyes."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import report
from matplotlib.ticker import LogLocator, NullLocator

LOOK = {  # system: (colour, marker)
    "mha_fast": ("#D55E00", "o"),
    "numpy": ("#0072B2", "s"),
    "torch": ("#009E73", "^"),
    "ort": ("#E69F00", "D"),
    "ort23": ("#56B4E9", "v"),
    "openvino": ("#CC79A7", "P"),
}
plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.dpi": 150,
        "font.size": 9,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)


def line(axes, system, x, y):
    colour, marker = LOOK[system]
    width = 2.2 if system == report.OURS else 1.3
    axes.plot(x, y, color=colour, marker=marker, ms=4.5, lw=width, label=system)


def points(results, system, x_key, y):
    """The x and y of the cases that `system` was timed on."""
    timed = [r for r in results if report.time_of(r, system) is not None]
    return [r["params"][x_key] for r in timed], [y(r, system) for r in timed]


def picoseconds_per_flop(result, system):
    return 1e3 / report.rate(result, system)


def finish(figure, machine, title, path):
    """Title, legend and where it was measured; then the file."""
    handles, labels = {}, []
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [name for name in LOOK if name in handles]
    figure.legend(
        [handles[name] for name in labels],
        labels,
        loc="outside lower center",
        ncols=max(1, len(labels)),
    )
    where = f"{machine['cpu']}, {machine['threads']} threads"
    isa = f", {machine['isa']}" if machine["isa"] else ""
    figure.suptitle(f"{title}\n{where}{isa}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def time_axis(axes):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: report.duration(value))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("best time")


def power_of_two_axis(axes, values):
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def heads_plot(results, systems, machine, path):
    """Time against the number of heads, one panel a model width."""
    widths = sorted({r["params"]["heads"] * r["params"]["head_dim"] for r in results})
    figure, panels = plt.subplots(
        1,
        len(widths),
        figsize=(3.6 * len(widths), 3.8),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, d_model in zip(panels[0], widths, strict=True):
        chosen = [r for r in results if r["params"]["heads"] * r["params"]["head_dim"] == d_model]
        for system in systems:
            x, y = points(chosen, system, "heads", report.time_of)
            if x:
                line(axes, system, x, y)
        power_of_two_axis(axes, {r["params"]["heads"] for r in chosen})
        time_axis(axes)
        axes.label_outer()
        axes.set(title=f"d_model {d_model}", xlabel="heads (head_dim = d_model / heads)")
    seqlen = results[0]["params"]["seqlen_q"]
    finish(figure, machine, f"Time against the number of heads, {seqlen} tokens", path)


def lengths_plot(results, systems, machine, path):
    """Time, and time per FLOP, against the sequence length."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for system in systems:
        x, y = points(results, system, "seqlen_q", report.time_of)
        if not x:
            continue
        line(left, system, x, y)
        x, y = points(results, system, "seqlen_q", picoseconds_per_flop)
        line(right, system, x, y)
    peaks = [peak for r in results for peak in r["fma_peak"]]
    if peaks:
        right.axhline(1e3 / max(peaks), color="black", lw=0.8, ls="--")
        right.annotate(
            "FMA peak",
            (0.01, 1e3 / max(peaks)),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=8,
        )
    for axes in (left, right):
        power_of_two_axis(axes, {r["params"]["seqlen_q"] for r in results})
        axes.tick_params("x", rotation=45)
        axes.set_xlabel("sequence length")
    time_axis(left)
    right.set_ylim(bottom=0)
    right.set_ylabel("time per FLOP (ps): flat is good")
    params = results[0]["params"]
    shape = f"{params['heads']} heads, head_dim {params['head_dim']}"
    finish(figure, machine, f"Time against the sequence length, {shape}", path)


def table_plot(results, systems, machine, path):
    """One row a case, one mark a system; a panel for each unit."""
    peak = any(r["fma_peak"] for r in results)
    kinds = (
        ("flops", "share of the FMA peak (%)" if peak else "GFLOP/s"),
        ("bandwidth", "KV bytes read (GB/s)"),
        ("latency", "time a call (us)"),
    )
    groups = [(unit, label, [r for r in results if r["unit"] == unit]) for unit, label in kinds]
    groups = [group for group in groups if group[2]]
    rows = [len(group[2]) for group in groups]
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(7.5, 1.6 + 0.26 * sum(rows) + 0.6 * len(rows)),
        height_ratios=[count + 1 for count in rows],
        layout="constrained",
        squeeze=False,
    )
    for axes, (unit, label, chosen) in zip(panels[:, 0], groups, strict=True):
        for system in reversed(systems):
            mark(axes, system, chosen, value_of(unit, peak))
        if unit == "bandwidth" and any(r["read_bandwidth"] for r in chosen):
            memory = max(peak for r in chosen for peak in r["read_bandwidth"])
            axes.axvline(memory, color="black", lw=0.8, ls="--")
            axes.set_title("dashed: read bandwidth of the memory", fontsize=8)
        axes.set_yticks(range(len(chosen)), [r["case"] for r in chosen])
        axes.set_ylim(len(chosen) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
    finish(figure, machine, "Attention on this machine", path)


def value_of(unit, peak):
    """The function of (result, system) that a panel shows; None where unknown."""
    if unit == "latency":
        return lambda result, system: scaled(1e6, report.time_of(result, system))
    if unit == "flops" and peak:
        return lambda result, system: scaled(100, report.share(result, system))
    return report.rate


def scaled(factor, value):
    return None if value is None else factor * value


def mark(axes, system, results, value):
    colour, marker = LOOK[system]
    values = [(value(result, system), row) for row, result in enumerate(results)]
    known = [(x, row) for x, row in values if x is not None]
    if known:
        x, row = zip(*known, strict=True)
        size = 46 if system == report.OURS else 26
        axes.scatter(x, row, s=size, color=colour, marker=marker, label=system, zorder=3)
