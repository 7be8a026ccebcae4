"""The command ``view``, and the page it writes in a browser without network.

The browser is Debian's package chromium; matplotlib and plotly are in the dependency group `test`.
"""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from mha_fast import viz
from mha_fast.viz._pictures import COLOURS

matplotlib = pytest.importorskip("matplotlib", reason='pip install "mha_fast[viz]"')
plotly = pytest.importorskip("plotly", reason='pip install "mha_fast[viz]"')

CHROMIUM = shutil.which("chromium")
FIRST = [COLOURS[name] for name in ("red", "blue", "green", "violet")]
WORDS = ["laws", "making", "voting", "more", "difficult"]


@pytest.fixture
def files(tmp_path):
    """Weights of two layers and four heads, and their words."""
    weights = np.random.default_rng(3).dirichlet(np.ones(5), (2, 4, 5))
    np.savez(tmp_path / "weights.npz", weights=weights[0])
    np.savez(tmp_path / "model.npz", weights=weights)
    (tmp_path / "tokens.json").write_text(json.dumps(WORDS))
    return tmp_path


def view(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-P", "-m", "mha_fast", "view", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


START = {".html": b"<html>", ".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml"}


@pytest.mark.parametrize("suffix", START)
def test_view_writes_what_the_suffix_says_and_nothing_else(files, suffix):
    before = set(files.iterdir())
    out = files / f"page{suffix}"
    done = view(files, "weights.npz", "--tokens", "tokens.json", "-o", out.name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert START[suffix] in out.read_bytes()[:100]
    assert set(files.iterdir()) == before | {out}


@pytest.mark.parametrize(
    "options",
    [
        ["weights.npz", "--head", "2", "--row", "1", "4", "--threshold", "0.1"],
        ["model.npz", "--layer", "1", "--heads", "0", "3", "--title", "Two heads"],
        ["weights.npz", "--kind", "heatmap", "--heads", "1", "--key-tokens", "tokens.json"],
        ["model.npz", "--kind", "model"],
    ],
    ids=" ".join,
)
def test_view_takes_every_kind_and_option(files, options):
    done = view(files, *options, "--tokens", "tokens.json", "-o", "page.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert (files / "page.svg").read_text().rstrip().endswith("</svg>")


def write_bad_files(folder):
    np.savez(folder / "other.npz", scores=np.ones((1, 5, 5)), k=np.ones(3))
    np.savez(folder / "vector.npz", weights=np.ones(5))
    np.savez(folder / "nan.npz", weights=np.full((1, 5, 5), np.nan))
    np.savez(folder / "integer.npz", weights=np.ones((1, 5, 5), int))
    np.savez(folder / "pickle.npz", weights=np.array([{}], object))
    np.save(folder / "single.npy", np.ones((1, 5, 5)))
    (folder / "text.npz").write_text("not an archive")
    (folder / "cut.npz").write_bytes((folder / "weights.npz").read_bytes()[:-40])
    damaged = bytearray((folder / "weights.npz").read_bytes())
    damaged[300:320] = bytes(20)
    (folder / "damaged.npz").write_bytes(damaged)
    (folder / "broken.json").write_text('["laws", ')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    (folder / "object.json").write_text('{"laws": 1}')
    (folder / "numbers.json").write_text("[1, 2, 3, 4, 5]")
    (folder / "short.json").write_text('["laws", "making"]')


BAD = {
    "missing weights": (["none.npz"], "none.npz"),
    "missing key": (["other.npz"], r"holds the arrays \['k', 'scores'\], expected .* 'weights'"),
    "vector": (["vector.npz"], r"shape \(5,\), expected at least \(seqlen_q, seqlen_k\)"),
    "layers": (["model.npz"], r"shape \(2, 4, 5, 5\), expected --layer 0 to 1"),
    "no layers": (["weights.npz", "--layer", "0"], r"expected \(layers, heads, .* with --layer"),
    "layer": (["model.npz", "--layer", "2"], "--layer is 2, expected 0 to 1"),
    "nan": (["nan.npz"], "weights holds nan"),
    "integer": (["integer.npz"], "weights has dtype int64, expected float16"),
    "pickle": (["pickle.npz"], "pickle.npz cannot be read"),
    "npy": (["single.npy"], "single.npy is no npz file"),
    "text": (["text.npz"], "text.npz is no npz file"),
    "cut": (["cut.npz"], "cut.npz"),
    "damaged": (["damaged.npz"], "damaged.npz"),
    "head": (["weights.npz", "--head", "4"], "heads holds 4 to 4, expected -4 to 3"),
    "threshold": (["weights.npz", "--threshold", "nan"], "threshold is nan, expected 0 to 1"),
    "option": (["weights.npz", "--kind", "heatmap", "--row", "0"], "--rows .* --kind heatmap"),
    "suffix": (["weights.npz", "-o", "page.gif"], "'page.gif', expected a name in .html, .png"),
    "folder": (["weights.npz", "-o", "none/page.html"], "expected a directory that exists"),
    "missing tokens": (["weights.npz", "--tokens", "none.json"], "none.json"),
    "broken": (["weights.npz", "--tokens", "broken.json"], "broken.json is not JSON"),
    "deep": (["weights.npz", "--tokens", "deep.json"], "deep.json is not JSON"),
    "binary": (["weights.npz", "--tokens", "binary.json"], "binary.json is not JSON"),
    "object": (["weights.npz", "--tokens", "object.json"], "a dict, expected a list of strings"),
    "numbers": (["weights.npz", "--tokens", "numbers.json"], r"tokens\[0\] is a int"),
    "short": (["weights.npz", "--tokens", "short.json"], "tokens has length 2, expected 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_two_and_no_file(files, capsys, monkeypatch, case):
    from mha_fast import __main__

    write_bad_files(files)
    monkeypatch.chdir(files)
    before = set(files.iterdir())
    arguments, message = BAD[case]
    usual = ["view", "--tokens", "tokens.json", "-o", "page.html"]
    monkeypatch.setattr(sys, "argv", ["mha_fast", *usual, *arguments])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert re.search(message, printed.err), printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert set(files.iterdir()) == before


def test_a_failing_write_leaves_the_old_file_and_no_other(files, monkeypatch):
    from mha_fast.viz.view import view

    (files / "page.svg").write_text("old")
    before = set(files.iterdir())

    def fail(self, path, **options):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        view(files / "weights.npz", files / "tokens.json", files / "page.svg", "head")
    assert (files / "page.svg").read_text() == "old"
    assert set(files.iterdir()) == before


class Resources(HTMLParser):
    """Collects what a page would load."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "data")]


def peaked_weights():
    """Each head attends to one word, with a weight of 1 and so in its full colour."""
    weights = np.zeros((4, 5, 5))
    weights[np.arange(4), :, [4, 1, 3, 0]] = 1
    return weights


def peaked_figure():
    return viz.head_view(peaked_weights(), WORDS, backend="plotly")


@pytest.fixture
def page(files):
    """What the command writes."""
    np.savez(files / "weights.npz", weights=peaked_weights())
    done = view(files, "weights.npz", "--tokens", "tokens.json", "-o", "view.html")
    assert done.returncode == 0, done.stderr
    return (files / "view.html").read_text("utf-8")


def test_page_loads_nothing_from_elsewhere(page):
    assert Resources(page).found == []


def test_canary_a_page_that_loads_its_script_is_found():
    page = peaked_figure().to_html(include_plotlyjs="cdn")
    assert any(address.startswith("https://") for address in Resources(page).found)


@pytest.fixture
def browse(tmp_path):
    """Open a page in a browser that can reach nothing."""
    if CHROMIUM is None:
        pytest.skip("needs the command chromium: apt-get install chromium")

    def run(page, *options):
        (tmp_path / "page.html").write_text(page, "utf-8")
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
            "--disable-background-networking --disable-component-update --disable-sync "
            "--hide-scrollbars --force-color-profile=srgb --window-size=900,600 "
            "--virtual-time-budget=20000"
        )
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [CHROMIUM, *flags.split(), "--host-resolver-rules=MAP * ~NOTFOUND", profile]
        return subprocess.run(
            [*command, *options, (tmp_path / "page.html").as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout

    return run


@pytest.fixture
def colours_drawn(browse, tmp_path):
    """How many pixels of each of the first four colours a page shows below its legend."""

    def count(page, top):
        from matplotlib.image import imread

        browse(page, f"--screenshot={tmp_path / 'shot.png'}")
        shot = np.round(255 * imread(tmp_path / "shot.png")[top:, :, :3])
        colours = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in FIRST]
        return [int((shot == colour).all(axis=-1).sum()) for colour in colours]

    return count


def page_of(figure, clicks=""):
    return figure.to_html(include_plotlyjs=True, post_script=clicks)


def test_browser_without_network_draws_all_four_colours(colours_drawn, page):
    assert min(colours_drawn(page, peaked_figure().layout.margin.t)) > 300


def test_canary_a_page_without_plotly_draws_no_colour(colours_drawn):
    figure = peaked_figure()
    blank = figure.to_html(include_plotlyjs=False)
    assert colours_drawn(blank, figure.layout.margin.t) == [0, 0, 0, 0]


def test_a_click_in_the_legend_switches_a_head_off(colours_drawn):
    figure = peaked_figure()
    click = """
        const head = document.querySelectorAll('.legendtoggle')[1];
        for (const kind of ['mousedown', 'mouseup']) head.dispatchEvent(new MouseEvent(kind));
    """
    red, blue, green, violet = colours_drawn(page_of(figure, click), figure.layout.margin.t)
    assert blue == 0
    assert min(red, green, violet) > 300


def test_the_menu_isolates_a_word_and_marks_it(browse):
    choose = """
        const click = (name, i) =>
            document.querySelectorAll(name)[i].dispatchEvent(new MouseEvent('click'));
        click('.updatemenu-header', 0);
        click('.updatemenu-dropdown-button', 2);
    """
    for clicks, lines, bars in (("", 4 * 5, 0), (choose, 4, 1)):
        page = browse(page_of(peaked_figure(), clicks), "--dump-dom")
        curves = re.findall(r'class="js-line"[^>]* d="([^"]*)"', page)
        assert sum(curve.count("M") for curve in curves) == lines + 4  # of the legend
        assert len(re.findall(r'<path data-index="0"', page)) == bars


def test_the_pointer_over_a_line_reads_words_weight_and_head(browse):
    hover = """
        const area = document.querySelector('.nsewdrag'), box = area.getBoundingClientRect();
        area.dispatchEvent(new MouseEvent('mousemove', {
            clientX: box.left + 0.5 * box.width, clientY: box.top + 0.29 * box.height,
            bubbles: true,
        }));
    """
    for script, expected in (
        ("", []),
        (hover, ["making → making", "weight 1.000", "head 1 (blue)"]),
    ):
        page = browse(page_of(peaked_figure(), script), "--dump-dom")
        labels = re.findall(r'<g class="hovertext".*?</g>', page)
        assert re.findall(r"<tspan[^>]*>([^<]*)</tspan>", "".join(labels)) == expected
