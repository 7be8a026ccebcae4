"""``python -m mha_fast view``: a picture of attention weights that lie in files."""

import inspect
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from .. import viz

KINDS = {"head": viz.head_view, "heatmap": viz.heatmap, "model": viz.model_view}
SUFFIXES = {".html": "plotly", ".png": "matplotlib", ".svg": "matplotlib"}


def add_command(commands):
    """Add ``view`` to the commands of an `argparse` parser."""
    parser = commands.add_parser("view", help="draw attention weights: an HTML page, PNG or SVG")
    parser.set_defaults(run=run)
    parser.add_argument("weights", help="npz file with an array named weights, of shape "
                        "(heads, seqlen_q, seqlen_k), or with layers before")  # fmt: skip
    parser.add_argument("--tokens", required=True, help="JSON file with a list of strings")
    parser.add_argument("--key-tokens", help="likewise for the keys; default: as --tokens")
    parser.add_argument("-o", "--output", required=True, help="a name in " + ", ".join(SUFFIXES))
    parser.add_argument("--kind", choices=KINDS, default="head", help="default: head")
    parser.add_argument("--layer", type=int, help="which layer, where the array has layers")
    parser.add_argument("--head", "--heads", dest="heads", type=int, nargs="+", metavar="HEAD")
    parser.add_argument("--row", "--rows", dest="rows", type=int, nargs="+", metavar="ROW",
                        help="draw lines from these words only, counted from 0")  # fmt: skip
    parser.add_argument("--threshold", type=float, help="leave out lines of smaller weights")
    parser.add_argument("--title")


def run(**arguments):
    """`view`, with one line and exit code 2 for bad input."""
    try:
        view(**arguments)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def view(weights, tokens, output, kind, layer=None, key_tokens=None, **options):
    """Draw the weights in a file and write the picture; nothing is written after an error."""
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output is {str(output)!r}, expected a name in {', '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise ValueError(f"output is {str(output)!r}, expected a directory that exists")
    options = {name: x for name, x in options.items() if x is not None}
    for name in options.keys() - inspect.signature(KINDS[kind]).parameters.keys():
        raise ValueError(f"--{name} does not go with --kind {kind}")
    figure = KINDS[kind](
        _choose_layer(_load_weights(weights), layer, kind),
        _load_strings(tokens),
        key_tokens and _load_strings(key_tokens),
        backend=SUFFIXES[output.suffix],
        **options,
    )
    _write(figure, output)


def _load_weights(path):
    """The array `weights` of an npz file, never unpickled."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is no npz file, expected what numpy.savez writes")
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if "weights" in arrays:
                    return arrays["weights"]
                names = sorted(arrays)
        except Exception as error:  # whatever damage makes zip, zlib or NumPy raise
            raise ValueError(f"{path} cannot be read as an npz file: {error}") from error
    raise ValueError(f"{path} holds the arrays {names}, expected one named 'weights'")


def _choose_layer(weights, layer, kind):
    """All layers for the model, else one, which may be left out where there are no layers."""
    found = f"weights has shape {weights.shape}"
    if layer is None:
        if weights.ndim == 4 and kind != "model":
            raise ValueError(f"{found}, expected --layer 0 to {len(weights) - 1}, to choose one")
        return weights
    if weights.ndim != 4:
        raise ValueError(f"{found}, expected (layers, heads, seqlen_q, seqlen_k) with --layer")
    if not 0 <= layer < len(weights):
        raise ValueError(f"--layer is {layer}, expected 0 to {len(weights) - 1}")
    return weights[layer]


def _load_strings(path):
    try:
        strings = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(strings, list):
        raise ValueError(f"{path} holds a {type(strings).__name__}, expected a list of strings")
    return strings


def _write(figure, path):
    """Under another name first, so that no half-written file is ever found."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".html":
            figure.write_html(part, include_plotlyjs=True)
        else:
            figure.savefig(part, format=path.suffix[1:], dpi=150)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
