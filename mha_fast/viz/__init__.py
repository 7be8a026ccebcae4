"""Pictures of attention weights: which word attends to which, head by head.

Every function takes weights as `attention(..., return_weights=True)` gives them and returns the
figure object of the library that drew it: ``matplotlib.figure.Figure`` for files, or with
``backend="plotly"`` a ``plotly.graph_objects.Figure``, which
``figure.write_html(path, include_plotlyjs=True)`` turns into one page that needs no network.
Both come with ``pip install "mha_fast[viz]"``. A weight tells how much of a value was mixed into
a row. It does not tell why a model answers as it does.
"""

import numbers
from importlib import import_module

import numpy as np

from ..arguments import compute_dtype, floats, places_of, plain_array
from . import _pictures

THRESHOLD = 0.05
MOST_LINES = 2000  # a page with more is slow to draw and shows nothing
MOST_CELLS = 2**20  # of all heat maps of a figure together, for the same reason
MOST = 1 + 2**-7  # a weight of 1 may be a unit of bfloat16 more


def head_view(
    weights,
    tokens,
    key_tokens=None,
    *,
    heads=None,
    rows=None,
    names=None,
    threshold=None,
    title=None,
    backend="matplotlib",
):
    """Lines from every word to the words it attends to, in one colour a head.

    Queries stand left, keys right. A line's width and opacity grow with its weight, and the
    lines of different heads run side by side. Words without a line are grey. In the page that
    plotly makes, a click in the legend switches a head off and on and a double click leaves it
    alone, the menu isolates a word, and the pointer reads a line's words, head and weight.

    Parameters
    ----------
    weights : array_like, shape (heads, seqlen_q, seqlen_k)
        Attention weights of one layer, 0 to 1, in any float dtype. A two-dimensional array is
        one head.
    tokens : sequence of str, length seqlen_q
        The words of the queries.
    key_tokens : sequence of str, length seqlen_k, optional
        The words of the keys; default `tokens`.
    heads : int or sequence of int, optional
        Heads to draw, the first in red, blue, green, violet; default all.
    rows : int or sequence of int, optional
        Query words to draw lines from, so ``rows=tokens.index("making")`` isolates one word;
        default all.
    names : sequence of str, length heads, optional
        What the legend calls the heads; default ``"head 0"``, ``"head 1"``, and
        so on, and nothing for a single head.
    threshold : float, optional
        Lines of a smaller weight are left out, and the figure says so. Default 0.05, or as much
        more as leaves 2,000 lines.
    title : str, optional
        Printed above.
    backend : {"matplotlib", "plotly"}
        Who draws.

    Returns
    -------
    matplotlib.figure.Figure or plotly.graph_objects.Figure

    Raises
    ------
    TypeError
        An argument has an unsupported dtype or kind.
    ValueError
        Shapes, lengths or indices do not fit, or a weight is not a number from 0 to 1.
    ImportError
        The backend is not installed.

    Notes
    -----
    The picture is that of Vaswani et al., "Attention is all you need" (arXiv 1706.03762),
    figures 3 to 5, and of Vig, "A multiscale visualization of attention" (arXiv 1906.05714).

    Examples
    --------
    >>> figure = head_view(np.full((2, 2, 2), 0.5), ["soft", "choice"], rows=0)
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['head 0 (red)', 'head 1 (blue)']
    """
    weights = _weights("weights", weights, "heads", "seqlen_q", "seqlen_k")
    tokens, key_tokens = _words(tokens, key_tokens, weights.shape)
    names = _names(names, weights.shape[0])
    heads = _chosen("heads", heads, weights.shape[0])
    rows = _chosen("rows", rows, weights.shape[1])
    threshold = _threshold(threshold, weights[np.ix_(heads, rows)])
    drawn = [
        _pictures.head(weights[head], rows, threshold, names[head], place, len(heads))
        for place, head in enumerate(heads)
    ]
    note = f"weights below {threshold:.2g} are not drawn" if threshold else ""
    return _drawer(backend).head_view(drawn, tokens, key_tokens, _title(title), note)


def heatmap(
    weights,
    tokens,
    key_tokens=None,
    *,
    heads=None,
    names=None,
    title=None,
    backend="matplotlib",
):
    """Heat maps of weights: a row for each query, a column for each key, a map for each head.

    All maps share one colour scale, from 0 to the largest weight drawn, in which colour follows
    the square root of the weight, so that small weights show. Maps with more than a million
    cells in all are coarsened: each cell then shows the largest of a block of weights.

    Parameters
    ----------
    weights : array_like, shape (seqlen_q, seqlen_k) or (heads, seqlen_q, seqlen_k)
        Attention weights of one head or one layer, 0 to 1, in any float dtype.
    tokens, key_tokens, heads, names, title, backend
        As in `head_view`.

    Returns
    -------
    matplotlib.figure.Figure or plotly.graph_objects.Figure

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `head_view`.

    Examples
    --------
    >>> figure = heatmap([[0.1, 0.9], [1.0, 0.0]], ["soft", "choice"])
    >>> figure.axes[0].images[0].get_array().shape
    (2, 2)
    """
    weights = _weights("weights", weights, "heads", "seqlen_q", "seqlen_k")
    tokens, key_tokens = _words(tokens, key_tokens, weights.shape)
    names = _names(names, weights.shape[0])
    heads = _chosen("heads", heads, weights.shape[0])
    size, ticks = int((MOST_CELLS / len(heads)) ** 0.5), int(160 / len(heads) ** 0.5)
    starts, rows = _pictures.word_cells(tokens, size, ticks)
    key_starts, columns = _pictures.word_cells(key_tokens, size, ticks)
    maps = [
        _pictures.Map(
            names[head], _pictures.coarse(weights[head], starts, key_starts), rows, columns
        )
        for head in heads
    ]
    pitch = _pictures.PITCH if len(maps) == 1 else 0.65 * _pictures.PITCH
    return _drawer(backend).heatmaps(maps, pitch, _title(title))


def model_view(
    weights_per_layer,
    tokens=None,
    key_tokens=None,
    *,
    title=None,
    backend="matplotlib",
):
    """A grid of small heat maps: a row for each layer, a column for each head.

    In every map queries go down and keys go right; the colour scale is that of `heatmap`. Maps
    of more than 64 words a side are coarsened: each cell then shows the largest of a block of
    weights. In the page that plotly makes, the pointer reads layer, head, words and weight.

    Parameters
    ----------
    weights_per_layer : array_like, shape (layers, heads, seqlen_q, seqlen_k)
        Attention weights of all layers, 0 to 1, in any float dtype.
    tokens, key_tokens : sequence of str, optional
        As in `head_view`; without them the words are numbers.
    title, backend
        As in `head_view`.

    Returns
    -------
    matplotlib.figure.Figure or plotly.graph_objects.Figure

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `head_view`.

    Examples
    --------
    >>> figure = model_view(np.eye(5) * np.ones((3, 2, 1, 1)))
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['layer 0', 'layer 1', 'layer 2']
    """
    weights = _weights(
        "weights_per_layer", weights_per_layer, "layers", "heads", "seqlen_q", "seqlen_k"
    )
    if tokens is None:
        tokens = [str(i) for i in range(weights.shape[-2])]
        if key_tokens is None:
            key_tokens = [str(i) for i in range(weights.shape[-1])]
    tokens, key_tokens = _words(tokens, key_tokens, weights.shape)
    size = int(np.clip((MOST_CELLS / (weights.shape[0] * weights.shape[1])) ** 0.5, 8, 64))
    starts, rows = _pictures.word_cells(tokens, size)
    key_starts, columns = _pictures.word_cells(key_tokens, size)
    cells = _pictures.coarse(weights, starts, key_starts)
    grid = _pictures.mosaic(cells, rows, columns)
    return _drawer(backend).heatmaps([grid], 0.9, _title(title))


def _drawer(backend):
    """The module that draws with a library; only now is the library imported."""
    if backend not in ("matplotlib", "plotly"):
        raise ValueError(f"backend is {backend!r}, expected 'matplotlib' or 'plotly'")
    try:
        return import_module(f"._{backend}", __package__)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'backend {backend!r} needs {error.name}: pip install "mha_fast[viz]"'
        ) from error


def _weights(name, weights, *axes):
    """`weights` with these axes, checked to be weights; heads may be left out for one head."""
    weights = floats(name, weights, axes[-2:])
    if axes[0] == "heads" and weights.ndim == 2:
        weights = weights[None]
    if weights.ndim != len(axes) or not weights.size:
        expected = f"({', '.join(axes)}), each at least 1"
        raise ValueError(f"{name} has shape {weights.shape}, expected {expected}")
    low, high = float(weights.min()), float(weights.max())
    if not (low >= 0 and high <= MOST):
        raise ValueError(f"{name} holds {low:.4g} to {high:.4g}, expected 0 to 1")
    return np.minimum(weights.astype(compute_dtype(weights)), 1)


def _words(tokens, key_tokens, shape):
    """Both lists of words, fit to be printed."""
    tokens = _strings("tokens", tokens, shape[-2], "seqlen_q")
    if key_tokens is None:
        return tokens, _strings("key_tokens, by default tokens,", tokens, shape[-1], "seqlen_k")
    return tokens, _strings("key_tokens", key_tokens, shape[-1], "seqlen_k")


def _strings(name, strings, length, axis):
    """A list of printable strings of a given length."""
    if isinstance(strings, (str, bytes)) or not np.iterable(strings):
        raise TypeError(f"{name} is a {type(strings).__name__}, expected a sequence of str")
    strings = list(strings)
    for i, text in enumerate(strings):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] is a {type(text).__name__}, expected a str")
    if len(strings) != length:
        raise ValueError(f"{name} has length {len(strings)}, expected {length} ({axis})")
    return [_printable(text) for text in strings]


def _names(names, heads):
    """What the heads are called."""
    if names is None:
        return [""] if heads == 1 else [f"head {head}" for head in range(heads)]
    return _strings("names", names, heads, "number of heads")


def _title(title):
    """Fit to be printed; None is empty."""
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title is a {type(title).__name__}, expected a str or None")
    return _printable(title or "")


def _printable(text):
    """As it is, or with escapes for line breaks and the like."""
    return text if text.isprintable() else repr(text)[1:-1]


def _chosen(name, chosen, count):
    """Indices in the order given; None is all of them."""
    if chosen is None:
        return list(range(count))
    places = places_of(name, np.atleast_1d(plain_array(name, chosen)), count)
    chosen = np.argsort(places)[np.count_nonzero(places < 0) :].tolist()
    if not chosen:
        raise ValueError(f"{name} is empty, expected at least one of 0 to {count - 1}")
    return chosen


def _threshold(threshold, weights):
    """The least weight that is drawn."""
    if threshold is not None:
        if not isinstance(threshold, numbers.Real) or isinstance(threshold, bool):
            raise TypeError(f"threshold is {threshold!r}, expected a number or None")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold!r}, expected 0 to 1")
        return float(threshold)
    seen = weights[weights >= THRESHOLD]
    if seen.size <= MOST_LINES:
        return THRESHOLD
    return float(np.partition(seen, -MOST_LINES)[-MOST_LINES])
