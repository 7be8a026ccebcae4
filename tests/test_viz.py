"""viz: what the figures hold, read back from the objects of matplotlib and plotly.

Both libraries are in the dependency group `test` and in the extra `viz`.
"""

import itertools
import math
import re

import ml_dtypes
import numpy as np
import pytest
from judge import assert_same

from mha_fast import viz
from mha_fast.viz._pictures import COLOURS

needs = 'pip install "mha_fast[viz]"'
pytest.importorskip("matplotlib", reason=needs)
pytest.importorskip("plotly", reason=needs)

FIRST = ["red", "blue", "green", "violet"]
OKABE_ITO = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"]
WORDS = ["laws", "making", "voting", "more", "difficult"]


def some_weights(*leading, seqlen_q=5, seqlen_k=5, dtype=np.float32):
    """Random weights with a peak in each row."""
    rng = np.random.default_rng(7)
    p = np.exp(3 * rng.standard_normal((*leading, seqlen_q, seqlen_k)))
    return (p / p.sum(axis=-1, keepdims=True)).astype(dtype)


def lines_in(figure):
    """Every line of a head view as (colour, row, key), from either library."""
    if hasattr(figure, "axes"):
        from matplotlib.colors import to_hex

        found = [
            (to_hex(colour).upper(), segment[:, 1])
            for collection in figure.axes[0].collections
            for segment, colour in zip(
                collection.get_segments(), collection.get_colors(), strict=True
            )
        ]
    else:
        found = [
            (trace.line.color, np.array(list(curve), float))
            for trace in figure.data
            for gap, curve in itertools.groupby(trace.y, lambda y: y is None)
            if not gap
        ]
    return sorted((colour, round(y[0]), round(y[-1])) for colour, y in found)


def lines_expected(weights, threshold=0.05, heads=None, rows=None):
    colours = list(COLOURS.values())
    heads = range(len(weights)) if heads is None else heads
    return sorted(
        (colours[place], int(row), int(key))
        for place, head in enumerate(heads)
        for row, key in np.argwhere(weights[head] >= threshold)
        if rows is None or row in rows
    )


@pytest.fixture(params=["matplotlib", "plotly"])
def backend(request):
    return request.param


def test_head_view_draws_every_weight_from_the_threshold_on(backend):
    weights = some_weights(4)
    figure = viz.head_view(weights, WORDS, backend=backend)
    assert lines_in(figure) == lines_expected(weights)
    figure = viz.head_view(weights, WORDS, threshold=0.5, backend=backend)
    assert lines_in(figure) == lines_expected(weights, 0.5)
    figure = viz.head_view(weights, WORDS, threshold=0, backend=backend)
    assert len(lines_in(figure)) == weights.size


def test_head_view_of_some_heads_and_rows_draws_these_alone(backend):
    weights = some_weights(6)
    expected = lines_expected(weights, heads=[5, 2], rows=[1])
    for heads, rows in (([5, 2], 1), (np.array([-1, 2]), [-4])):
        figure = viz.head_view(weights, WORDS, heads=heads, rows=rows, backend=backend)
        assert lines_in(figure) == expected


def test_head_view_takes_two_dimensions_and_other_keys(backend):
    weights = some_weights(1, seqlen_k=3)
    keys = ["one", "two", "three"]
    figure = viz.head_view(weights[0], WORDS, keys, backend=backend)
    assert lines_in(figure) == lines_expected(weights)
    assert words_beside(figure) == (WORDS, keys)


def words_beside(figure):
    if hasattr(figure, "axes"):
        left, right = ([text.get_text() for text in a.get_yticklabels()] for a in figure.axes)
    else:
        left, right = (
            [re.sub("<.*?>", "", text) for text in axis.ticktext]
            for axis in (figure.layout.yaxis, figure.layout.yaxis2)
        )
    return left, right


def test_legend_names_number_and_colour_of_each_head(backend):
    expected = [f"head {i} ({colour})" for i, colour in enumerate(FIRST)]
    assert legend_of(viz.head_view(some_weights(4), WORDS, backend=backend)) == expected
    many = legend_of(viz.head_view(some_weights(20), WORDS, backend=backend))
    assert many[8:20:8] == ["head 8 (red, dashed)", "head 16 (red, dotted)"]
    named = viz.head_view(some_weights(2), WORDS, names=["copies", "looks <b>"], backend=backend)
    assert legend_of(named)[0] == "copies (red)"


def legend_of(figure):
    if hasattr(figure, "axes"):
        return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    return [trace.name for trace in figure.data if trace.showlegend is not False]


def test_first_four_colours_are_red_blue_green_and_violet():
    import colorsys

    from matplotlib.colors import to_rgb

    assert list(COLOURS)[:4] == FIRST
    hues = [360 * colorsys.rgb_to_hsv(*to_rgb(COLOURS[name]))[0] for name in FIRST]
    ranges = [(-15, 15), (210, 240), (120, 165), (250, 290)]
    assert all(low <= hue <= high for hue, (low, high) in zip(hues, ranges, strict=True))


# Machado, Oliveira and Fernandes (doi 10.1109/TVCG.2009.113), severity 1, linear RGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(colour, seen):
    """CIELAB of an sRGB colour, as somebody sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(seen @ linear, 0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def closest_pair(colours, seen):
    points = [lab(colour, np.array(seen)) for colour in colours]
    return min(math.dist(a, b) for a, b in itertools.combinations(points, 2))


def test_first_four_colours_lie_farther_apart_than_those_of_okabe_and_ito():
    ours = [COLOURS[name] for name in FIRST]
    worst = min(closest_pair(ours, seen) for seen in SEEN_BY.values())
    assert worst > min(closest_pair(OKABE_ITO, seen) for seen in SEEN_BY.values())


def test_stronger_weights_are_drawn_wider_and_less_transparent(backend):
    weights = np.array([[[0.1, 0.2, 0.7]]])
    figure = viz.head_view(weights, ["a"], ["x", "y", "z"], backend=backend)
    if backend == "matplotlib":
        (lines,) = figure.axes[0].collections
        widths, opacities = lines.get_linewidths(), lines.get_colors()[:, 3]
    else:
        traces = [trace for trace in figure.data if trace.showlegend is False]
        widths, opacities = [t.line.width for t in traces], [t.opacity for t in traces]
    assert list(widths) == sorted(set(widths)) and len(widths) == 3
    assert list(opacities) == sorted(set(opacities)) and max(opacities) <= 1


def test_words_that_no_line_meets_are_pale(backend):
    weights = np.eye(3)[None]
    figure = viz.head_view(weights, ["a", "b", "c"], rows=1, backend=backend)
    if backend == "matplotlib":
        colours = [text.get_color() for text in figure.axes[1].get_yticklabels()]
        assert colours[0] == colours[2] != colours[1]
    else:
        pale = ["<span" in text for text in figure.layout.yaxis2.ticktext]
        assert pale == [True, False, True]


def test_default_threshold_rises_until_the_lines_are_few_and_is_printed(backend):
    weights = some_weights(4)
    assert "below 0.05" in note_of(viz.head_view(weights, WORDS, backend=backend))
    words = [str(i) for i in range(200)]
    many = some_weights(8, seqlen_q=200, seqlen_k=200, dtype=np.float64)
    assert (many >= 0.05).sum() > viz.MOST_LINES
    figure = viz.head_view(many, words, backend=backend)
    kept = np.sort(many, axis=None)[-viz.MOST_LINES]
    assert len(lines_in(figure)) == viz.MOST_LINES
    assert f"below {kept:.2g}" in note_of(figure)


def note_of(figure):
    if hasattr(figure, "axes"):
        return figure.axes[0].get_xlabel()
    return figure.layout.annotations[0].text


def test_hovering_tells_both_words_the_weight_and_the_head():
    weights = np.array([[[0.25, 0.75], [0, 1]]], np.float32)
    figure = viz.head_view(weights, ["a", "<b>"], names=["it"], backend="plotly")
    texts = {text for trace in figure.data for text in trace.hovertext or () if text}
    assert texts == {
        "a → a<br>weight 0.250<br>it (red)",
        "a → &lt;b&gt;<br>weight 0.750<br>it (red)",
        "&lt;b&gt; → &lt;b&gt;<br>weight 1.000<br>it (red)",
    }


def test_traces_of_a_head_are_one_group_of_the_legend():
    figure = viz.head_view(some_weights(4), WORDS, backend="plotly")
    groups = {trace.legendgroup: trace.line.color for trace in figure.data}
    assert len(groups) == 4
    assert list(groups.values()) == [COLOURS[name] for name in FIRST]
    assert all(trace.line.color == groups[trace.legendgroup] for trace in figure.data)


def test_menu_isolates_each_word_and_brings_all_back():
    weights = some_weights(3)
    figure = viz.head_view(weights, WORDS, backend="plotly")
    (menu,) = figure.layout.updatemenus
    whole = figure.to_dict()["data"]
    for label, rows in [
        ("all words", range(5)),
        *((f"{w} ({i})", [i]) for i, w in enumerate(WORDS)),
    ]:
        (button,) = [button for button in menu.buttons if button.label == label]
        data, _, traces = button.args
        for i, place in enumerate(traces):
            whole[place] |= {name: values[i] for name, values in data.items()}
        shown = lines_in(type(figure)(data=whole))
        assert shown == lines_expected(weights, rows=rows)


def test_head_view_of_no_line_is_still_drawn(backend):
    figure = viz.head_view(np.zeros((2, 3, 3)), ["a", "b", "c"], backend=backend)
    assert lines_in(figure) == []
    assert len(legend_of(figure)) == 2


def cells_of(figure):
    if hasattr(figure, "axes"):
        return [np.asarray(image.get_array()) for a in figure.axes for image in a.get_images()]
    return [np.asarray(trace.z) for trace in figure.data]


def test_heatmap_shows_the_weights_of_each_head(backend):
    weights = some_weights(3, seqlen_k=4)
    keys = list("wxyz")
    maps = cells_of(viz.heatmap(weights, WORDS, keys, backend=backend))
    for cells, expected in zip(maps, weights, strict=True):
        assert_same(np.asarray(cells, np.float32), expected)
    (one,) = cells_of(viz.heatmap(weights[1], WORDS, keys, backend=backend))
    (same,) = cells_of(viz.heatmap(weights, WORDS, keys, heads=1, backend=backend))
    assert_same(np.asarray(one, np.float32), weights[1])
    assert_same(one, same)


def test_heat_maps_share_one_scale_from_zero_to_the_largest_weight(backend):
    weights = some_weights(3)
    weights[:2] /= 2
    figure = viz.heatmap(weights, WORDS, backend=backend)
    if backend == "matplotlib":
        limits = {image.get_clim() for a in figure.axes for image in a.get_images()}
    else:
        assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
        limits = {(figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax)}
    assert limits == {(0, float(weights.max()))}


def test_heat_maps_label_rows_and_columns_and_the_page_tells_the_words():
    weights = some_weights(3)
    figure = viz.heatmap(weights, WORDS)
    bottom_left = figure.axes[2]
    assert [text.get_text() for text in bottom_left.get_xticklabels()] == WORDS
    assert [text.get_text() for text in bottom_left.get_yticklabels()] == WORDS
    page = viz.heatmap(weights, [*WORDS[:4], "<s>"], backend="plotly")
    assert page.data[0].x[1] == "making (1)"
    assert page.data[0].y[4] == "&lt;s&gt; (4)"
    assert page.layout.xaxis.ticktext[4] == "&lt;s&gt;"
    assert [a.text for a in page.layout.annotations] == ["head 0", "head 1", "head 2"]


def test_large_heat_maps_show_the_largest_weight_of_each_block(backend, monkeypatch):
    monkeypatch.setattr(viz, "MOST_CELLS", 2 * 10 * 10)
    weights = some_weights(2, seqlen_q=24, seqlen_k=25)
    words, keys = [[str(i) for i in range(n)] for n in (24, 25)]
    maps = cells_of(viz.heatmap(weights, words, keys, backend=backend))
    padded = np.pad(weights, ((0, 0), (0, 0), (0, 2)))
    expected = padded.reshape(2, 8, 3, 9, 3).max(axis=(2, 4))
    for cells, blocks in zip(maps, expected, strict=True):
        assert_same(np.asarray(cells, np.float32), blocks)


def test_model_view_has_a_row_for_each_layer_and_a_column_for_each_head(backend):
    weights = some_weights(3, 4, seqlen_k=4)
    (cells,) = cells_of(viz.model_view(weights, WORDS, list("wxyz"), backend=backend))
    assert cells.shape == (3 * 6 - 1, 4 * 5 - 1)
    for layer, head in np.ndindex(3, 4):
        part = cells[6 * layer : 6 * layer + 5, 5 * head : 5 * head + 4]
        assert_same(np.asarray(part, np.float32), weights[layer, head])
    assert np.isnan(cells[5]).all() and np.isnan(cells[:, 4]).all()


def test_model_view_tells_layer_head_and_words_of_a_cell():
    page = viz.model_view(some_weights(3, 4), WORDS, backend="plotly").data[0]
    assert page.y[6 + 1] == "layer 1: making (1)"
    assert page.x[2 * 6 + 4] == "head 2: difficult (4)"
    assert len(set(page.x)) == len(page.x) and len(set(page.y)) == len(page.y)


def test_model_view_of_long_sequences_stays_small():
    weights = some_weights(2, 3, seqlen_q=300, seqlen_k=300)
    (cells,) = cells_of(viz.model_view(weights))
    assert cells.size <= 2 * 3 * 65 * 65
    assert np.nanmax(cells) == weights.max()


def test_every_storage_dtype_can_be_drawn(dtype, backend):
    weights = some_weights(2, dtype=dtype)
    figure = viz.head_view(weights, WORDS, backend=backend)
    assert lines_in(figure) == lines_expected(weights.astype(np.float64))
    viz.model_view(weights[None], backend=backend)


STRANGE = ["$x_$", "a\nb", "</script>", "\ud800", ""]


def test_strange_words_are_drawn_as_they_are(backend, tmp_path):
    for figure in (
        viz.head_view(some_weights(1), STRANGE, names=["$x_$"], title="$", backend=backend),
        viz.heatmap(some_weights(1), STRANGE, title="$_$", names=["$$"], backend=backend),
    ):
        if backend == "matplotlib":
            figure.savefig(tmp_path / "strange.svg")
            assert "a\\nb" in [text.get_text() for text in figure.axes[0].get_yticklabels()]
        else:
            figure.write_html(tmp_path / "strange.html", include_plotlyjs=False)
            page = (tmp_path / "strange.html").read_text("utf-8")
            assert page.count("</script>") == page.count("<script")


def test_missing_library_is_an_error_that_says_what_to_install(output_of, backend):
    script = f"""
import sys
sys.modules[{backend!r}] = None
from mha_fast import viz
try:
    viz.head_view([[1.0]], ["a"], backend={backend!r})
except ImportError as error:
    print(error)
"""
    assert 'pip install "mha_fast[viz]"' in output_of(script)


def test_import_loads_no_library_and_drawing_no_pyplot(output_of):
    script = """
import sys
from mha_fast import viz
print({"matplotlib", "plotly"} & set(sys.modules))
viz.head_view([[1.0]], ["a"])
print("plotly" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    assert output_of(script).split("\n") == ["set()", "False False"]


def test_bfloat16_unit_above_one_is_a_weight():
    above = np.nextafter(ml_dtypes.bfloat16(1), ml_dtypes.bfloat16(2))
    viz.head_view(np.full((1, 1, 1), above), ["a"])


def test_canary_a_line_that_is_missing_is_found(backend):
    weights = some_weights(4)
    figure = viz.head_view(weights, WORDS, backend=backend)
    weights[0, 0, weights[0, 0].argmax()] = 0
    assert lines_in(figure) != lines_expected(weights)
