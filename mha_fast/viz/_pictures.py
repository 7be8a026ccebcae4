"""What a picture of attention weights shows, whoever draws it: lines, heat maps, colours."""

from typing import NamedTuple

import numpy as np

# Red, blue, green and violet, of lightness that keeps them apart for everybody: as seen with
# the protanopia, deuteranopia and tritanopia of Machado, Oliveira and Fernandes
# (doi 10.1109/TVCG.2009.113, severity 1), the closest two are 21 CIEDE2000 apart, where those of
# Okabe and Ito ("Color universal design", 2008) are 12. Each stands out 3 to 1 from white.
# Among all eight the closest two are 12 apart, where those of Okabe and Ito are 11.
COLOURS = {
    "red": "#BA1A1A",
    "blue": "#174EA6",
    "green": "#2AA179",
    "violet": "#A27CF5",
    "black": "#1A1A1A",
    "gold": "#D4B106",
    "sky": "#6FC3EA",
    "pink": "#E75AA8",
}
DASHES = ("solid", "dashed", "dotted")  # heads beyond the eighth repeat the colours like this
POINTS = 25  # of a curve
DARK, PALE = "#1A1A1A", "#A8A8A8"  # words with and without a line
PITCH = 0.25  # inches from one word to the next


class Head(NamedTuple):
    """What is drawn of a head: its place in the legend, and the lines from rows to keys."""

    label: str
    colour: str
    dash: str
    row: np.ndarray
    key: np.ndarray
    weight: np.ndarray
    curves: np.ndarray  # (lines, POINTS, 2): x from 0 to 1, y from word row to word key


class Axis(NamedTuple):
    """One side of a heat map: a name for every cell, and the labels printed at some of them."""

    names: list
    ticks: dict


class Map(NamedTuple):
    """A heat map of cells (rows, columns)."""

    title: str
    cells: np.ndarray
    rows: Axis
    columns: Axis


def head(weights, rows, threshold, name, place, heads):
    """The `Head` at a place in the legend, from weights (seqlen_q, seqlen_k).

    Weak lines come first, to lie below strong ones; those of different heads run side by side.
    """
    colour, dash = list(COLOURS)[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]
    look = colour if dash == "solid" else f"{colour}, {dash}"
    label = f"{name} ({look})" if name else look
    row, key = np.nonzero((weights[rows] >= threshold) & (weights[rows] > 0))
    row = np.asarray(rows)[row]
    order = np.argsort(weights[row, key], kind="stable")
    row, key = row[order], key[order]
    x = np.linspace(0, 1, POINTS)
    y = row[:, None] + (key - row)[:, None] * x**2 * (3 - 2 * x)
    y += (place - (heads - 1) / 2) * min(0.2, 0.75 / heads)
    curves = np.stack(np.broadcast_arrays(x, y), axis=-1)
    return Head(label, COLOURS[colour], dash, row, key, weights[row, key], curves)


def width(weight):
    """Of a line, in points."""
    return 0.6 + 3.4 * weight


def opacity(weight):
    """Of a line; faint ones stay visible."""
    return 0.25 + 0.75 * weight


def word_cells(words, size, ticks=80):
    """Where the blocks of words start that share a cell, at most `size`; and their `Axis`."""
    step = -(-len(words) // size)
    starts = np.arange(0, len(words), step)
    stops = np.minimum(starts + step, len(words)) - 1
    names = [
        f"{words[a]} ({a})" if a == b else f"{words[a]} ... {words[b]} ({a} to {b})"
        for a, b in zip(starts, stops, strict=True)
    ]
    every = -(-len(starts) // max(1, min(ticks, 80)))
    ticks = {i: words[starts[i]] for i in range(0, len(starts), every)}
    return starts, Axis(names, ticks)


def coarse(weights, starts, key_starts):
    """The largest weight of each block."""
    return np.maximum.reduceat(np.maximum.reduceat(weights, starts, -2), key_starts, -1)


def mosaic(cells, rows, columns):
    """One `Map` of cells (layers, heads, rows, columns), with empty cells between the maps."""
    layers, heads = cells.shape[:2]
    wide = np.full((layers, heads, *(n + 1 for n in cells.shape[2:])), np.nan, cells.dtype)
    wide[..., :-1, :-1] = cells
    wide = wide.swapaxes(1, 2).reshape(layers * wide.shape[2], heads * wide.shape[3])
    rows, columns = _repeated(rows, "layer", layers), _repeated(columns, "head", heads)
    return Map("", wide[:-1, :-1], rows, columns)


def _repeated(axis, name, count):
    """The axis of `count` maps side by side, with one empty cell between."""
    cells = [*axis.names, ""]
    names = [f"{name} {i}: {cell}" for i in range(count) for cell in cells][:-1]
    ticks = {i * len(cells) + len(axis.names) // 2: f"{name} {i}" for i in range(count)}
    return Axis(names, ticks)
