"""The figures of viz.py as matplotlib draws them: without pyplot, so no state stays behind."""

import math

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import _pictures
from ._pictures import DARK, PALE, PITCH

LARGEST = 400  # inches; the renderer stops at 65,536 pixels


def head_view(heads, tokens, key_tokens, title, note):
    """Two columns of words, and a `LineCollection` for each head."""
    words = max(len(tokens), len(key_tokens))
    figure = _figure(6.4, 1.2 + PITCH * words, title)
    left = figure.subplots()
    left.set(xlim=(0, 1), xticks=[])
    right = left.twinx()
    _write_words(left, tokens, words, {int(row) for head in heads for row in head.row})
    _write_words(right, key_tokens, words, {int(key) for head in heads for key in head.key})
    for head in heads:
        left.add_collection(_lines(head))
    labels = [head.label for head in heads]
    legend = left.legend(
        [Line2D([], [], color=head.colour, ls=head.dash, lw=3) for head in heads],
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=max(1, min(4, 90 // (max(map(len, labels)) + 6))),
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    left.set_xlabel(note, color=PALE, fontsize="small")
    return figure


def heatmaps(maps, pitch, title):
    """One `imshow` for each map, all in one colour scale."""
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    height, width = (max(1.6, pitch * len(a.ticks)) for a in (maps[0].rows, maps[0].columns))
    figure = _figure(1.8 + width * columns, 1.2 + height * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    scale = PowerNorm(0.5, 0, max(np.nanmax(m.cells) for m in maps) or 1)
    for place, (axes, m) in enumerate(zip(grid.flat, maps, strict=False)):
        image = axes.imshow(m.cells, cmap="Blues", norm=scale, aspect="auto")
        axes.set_title(m.title, fontsize="medium", parse_math=False)
        axes.set_xticks(list(m.columns.ticks), m.columns.ticks.values(), parse_math=False)
        axes.set_yticks(list(m.rows.ticks), m.rows.ticks.values(), parse_math=False)
        axes.tick_params(length=0, labelsize=min(10, 50 * pitch))
        last = place + columns >= len(maps)
        axes.tick_params("x", rotation=90 if pitch <= PITCH else 0, labelbottom=last)
        axes.tick_params("y", labelleft=place % columns == 0)
        axes.spines[:].set_visible(False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid, shrink=0.6, fraction=0.05, pad=0.02, label="weight")
    bar.outline.set_visible(False)
    return figure


def _figure(width, height, title):
    figure = Figure((min(width, LARGEST), min(height, LARGEST)), layout="constrained")
    figure.set_facecolor("white")
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _write_words(axes, texts, words, joined):
    """The words beside an axis; those that no line meets in grey."""
    axes.set_ylim(words - 0.4, -0.6)
    axes.set_yticks(range(len(texts)), texts, parse_math=False)
    axes.tick_params(length=0, pad=6)
    axes.spines[:].set_visible(False)
    for i, label in enumerate(axes.get_yticklabels()):
        label.set_color(DARK if i in joined else PALE)


def _lines(head):
    """All lines of a head, each with its own width and opacity."""
    colours = np.tile(to_rgba(head.colour), (len(head.weight), 1))
    colours[:, 3] = _pictures.opacity(head.weight)
    return LineCollection(
        head.curves,
        linewidths=_pictures.width(head.weight),
        colors=colours,
        linestyles=head.dash,
        label=head.label,
    )
