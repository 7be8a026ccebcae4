"""The figures of viz.py as plotly draws them; every switch on the page is one of plotly's own."""

import math
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sequential
from plotly.subplots import make_subplots

from . import _pictures
from ._pictures import DARK, PALE, PITCH

INCH = 96  # pixels
BANDS = 6  # of weight: a trace has one width and one opacity, so a head has a trace for each
DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot"}


def head_view(heads, tokens, key_tokens, title, note):
    """A trace for each head and band of weights, a legend of heads, a menu of words."""
    words = max(len(tokens), len(key_tokens))
    tokens, key_tokens = list(map(escape, tokens)), list(map(escape, key_tokens))
    entry = 8 + 6 * max(len(head.label) for head in heads)
    top = 70 + 25 * math.ceil(len(heads) / max(1, 600 // (entry + 50)))  # title and legend
    figure = go.Figure(layout=_layout(880, top + 60 + INCH * PITCH * words, title))
    bands = [(head, lines) for head in heads for lines in _bands(head)]
    for head, lines in bands:
        figure.add_scatter(
            **_points(head, lines, tokens, key_tokens),
            **_look(head, head.weight[lines].mean()),
            showlegend=False,
            hoverinfo="text",
        )
    for head in heads:  # the legend's own traces, because the menu may empty those above
        figure.add_scatter(
            x=[None], y=[None], yaxis="y2", name=escape(head.label), **_look(head, 1)
        )
    figure.update_layout(
        hovermode="closest",
        margin=dict(t=top, b=60),
        legend=dict(
            orientation="h", x=0, y=1, yanchor="bottom", entrywidth=entry, itemwidth=34
        ),
        xaxis=dict(range=[0, 1], fixedrange=True, visible=False),
        yaxis=_words(tokens, {int(row) for head in heads for row in head.row}, words),
        yaxis2=dict(
            overlaying="y",
            side="right",
            matches="y",
            **_words(key_tokens, {int(key) for head in heads for key in head.key}, words),
        ),
        updatemenus=[_menu(bands, tokens, key_tokens)],
        shapes=[
            dict(
                type="rect", xref="paper", x0=-0.17, x1=0, y0=0, y1=1,
                visible=False, layer="below", line_width=0, fillcolor="#E4E4E4",
            )
        ],
        annotations=[
            dict(
                text=escape(note), x=0.5, xref="paper", y=0, yref="paper", yanchor="top",
                showarrow=False, font=dict(size=11, color=PALE),
            )
        ],
    )  # fmt: skip
    return figure


def heatmaps(maps, pitch, title):
    """A trace for each map, all in one colour scale."""
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    height, width = (INCH * max(1.6, pitch * len(a.ticks)) for a in (maps[0].rows, maps[0].columns))
    layout = _layout(250 + width * columns, 200 + height * rows, title)
    figure = make_subplots(
        rows, columns,
        subplot_titles=[escape(m.title) for m in maps],
        horizontal_spacing=20 / layout["width"], vertical_spacing=40 / layout["height"],
    ).update_layout(layout)  # fmt: skip
    for place, m in enumerate(maps):
        row, column = place // columns + 1, place % columns + 1
        figure.add_heatmap(
            x=list(map(escape, m.columns.names)),
            y=list(map(escape, m.rows.names)),
            z=m.cells,
            coloraxis="coloraxis",
            hoverongaps=False,
            name=escape(m.title),
            hovertemplate="%{y} → %{x}<br>weight %{z:.3f}<extra>%{fullData.name}</extra>",
            row=row,
            col=column,
        )
        last = place + columns >= len(maps)
        figure.update_xaxes(
            **_labels(m.columns, pitch, last),
            tickangle=-90 if pitch <= PITCH else 0,
            row=row,
            col=column,
        )
        figure.update_yaxes(
            **_labels(m.rows, pitch, column == 1), autorange="reversed", row=row, col=column
        )
    largest = max(float(np.nanmax(m.cells)) for m in maps) or 1
    blues = [[(i / 8) ** 2, colour] for i, colour in enumerate(sequential.Blues)]
    figure.update_layout(
        coloraxis=dict(colorscale=blues, cmin=0, cmax=largest, colorbar_title_text="weight")
    )
    return figure


def _layout(width, height, title):
    return dict(
        template="none",
        width=round(width),
        height=round(height),
        title=dict(text=escape(title), x=0.5, y=1, yanchor="top", pad_t=16),
    )


def _bands(head):
    """The lines of a head, sorted by weight, cut where a band of weights ends."""
    level = np.ceil(head.weight * BANDS)
    parts = np.split(np.arange(len(level)), np.flatnonzero(np.diff(level)) + 1)
    return [lines for lines in parts if lines.size]


def _look(head, weight):
    """How a trace of lines of about this weight looks, and to which head it belongs."""
    return dict(
        mode="lines",
        legendgroup=head.label,
        opacity=_pictures.opacity(weight),
        line=dict(
            color=head.colour,
            width=_pictures.width(weight) * INCH / 72,
            dash=DASHES[head.dash],
            shape="spline",
        ),
    )


def _points(head, lines, tokens, key_tokens):
    """Curves as one trace holds them, None between two, and what the pointer reads there."""
    x, y, text = [], [], []
    for line in lines:
        curve = head.curves[line, ::3].round(3).tolist()
        words = f"{tokens[head.row[line]]} → {key_tokens[head.key[line]]}"
        label = f"{words}<br>weight {head.weight[line]:.3f}<br>{escape(head.label)}"
        x += [point[0] for point in curve] + [None]
        y += [point[1] for point in curve] + [None]
        text += [label] * len(curve) + [None]
    return dict(x=x, y=y, hovertext=text)


def _words(words, joined, length):
    """A column of words beside the lines; those that no line meets in grey."""
    shown = [
        word if i in joined else f"<span style='color:{PALE}'>{word}</span>"
        for i, word in enumerate(words)
    ]
    return dict(
        range=[length - 0.4, -0.6],
        tickvals=list(range(len(words))),
        ticktext=shown,
        tickfont=dict(size=14, color=DARK),
        ticks="outside",
        tickcolor="white",
        automargin=True,
        showgrid=False,
        zeroline=False,
    )


def _menu(bands, tokens, key_tokens):
    """All words, or the lines of one, with a bar behind it; the heads stay switched as they are."""

    def button(label, rows):
        parts = [
            _points(head, lines[np.isin(head.row[lines], rows)], tokens, key_tokens)
            for head, lines in bands
        ]
        data = {name: [part[name] for part in parts] for name in ("x", "y", "hovertext")}
        bar = {
            "shapes[0].visible": len(rows) == 1,
            "shapes[0].y0": rows[0] - 0.5,
            "shapes[0].y1": rows[0] + 0.5,
        }
        return dict(label=label, method="update", args=[data, bar, list(range(len(bands)))])

    rows = sorted({int(row) for head, _ in bands for row in head.row})
    buttons = [button("all words", rows)] if rows else []
    buttons += [button(f"{tokens[row]} ({row})", [row]) for row in rows]
    return dict(buttons=buttons, x=0, xanchor="right", y=1, yanchor="bottom")


def _labels(axis, pitch, shown):
    """An axis of a heat map: a category for every cell, which hovering shows; labels at some."""
    return dict(
        type="category",
        tickvals=[escape(axis.names[i]) for i in axis.ticks],
        ticktext=list(map(escape, axis.ticks.values())),
        tickfont_size=min(13, 66 * pitch),
        showticklabels=shown,
        automargin=True,
        showgrid=False,
        ticks="",
    )
