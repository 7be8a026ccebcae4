"""viz: bad arguments are named, with what was found and what was expected."""

import math

import numpy as np
import pytest

from mha_fast import viz

pytest.importorskip("matplotlib", reason='pip install "mha_fast[viz]"')

WORDS = ["laws", "making", "voting", "more", "difficult"]
WEIGHTS = np.random.default_rng(7).dirichlet(np.ones(5), (2, 5))
BAD = {
    "weights integer": (dict(weights=np.ones((2, 5, 5), int)), TypeError, "weights has dtype int"),
    "weights rank": (dict(weights=WEIGHTS[None]), ValueError, r"weights has shape \(1, 2, 5, 5\)"),
    "weights vector": (dict(weights=WEIGHTS[0, 0]), ValueError, r"weights has shape \(5,\)"),
    "weights empty": (dict(weights=WEIGHTS[:0]), ValueError, "at least 1"),
    "weights nan": (dict(weights=WEIGHTS * np.nan), ValueError, "weights holds nan"),
    "weights negative": (dict(weights=-WEIGHTS), ValueError, "weights holds -.*expected 0 to 1"),
    "weights scores": (dict(weights=9 * WEIGHTS), ValueError, "expected 0 to 1"),
    "weights ragged": (dict(weights=[[1.0], [1.0, 2.0]]), ValueError, "weights is a list"),
    "tokens short": (dict(tokens=WORDS[1:]), ValueError, "tokens has length 4, expected 5"),
    "tokens string": (dict(tokens="words"), TypeError, "tokens is a str"),
    "tokens numbers": (dict(tokens=[1, 2, 3, 4, 5]), TypeError, r"tokens\[0\] is a int"),
    "tokens none": (dict(tokens=None), TypeError, "tokens is a NoneType"),
    "keys long": (dict(key_tokens=[*WORDS, "."]), ValueError, "key_tokens has length 6"),
    "keys missing": (dict(weights=WEIGHTS[..., :3]), ValueError, "key_tokens, by default"),
    "heads range": (dict(heads=[0, 2]), ValueError, "heads holds 0 to 2, expected -2 to 1"),
    "heads negative": (dict(heads=-3), ValueError, "heads holds -3 to -3"),
    "heads twice": (dict(heads=[1, 1]), ValueError, "heads names an entry twice"),
    "heads none": (dict(heads=[]), ValueError, "heads is empty, expected at least one"),
    "heads float": (dict(heads=[0.0]), TypeError, "heads has dtype float64, expected ints"),
    "heads text": (dict(heads="01"), TypeError, "heads has dtype <U2"),
    "rows range": (dict(rows=5), ValueError, "rows holds 5 to 5, expected -5 to 4"),
    "rows bool": (dict(rows=[True]), TypeError, "rows has dtype bool"),
    "names short": (dict(names=["a"]), ValueError, "names has length 1, expected 2"),
    "threshold nan": (dict(threshold=math.nan), ValueError, "threshold is nan"),
    "threshold large": (dict(threshold=5), ValueError, "threshold is 5, expected 0 to 1"),
    "threshold text": (dict(threshold="0.1"), TypeError, "threshold is '0.1'"),
    "title number": (dict(title=3), TypeError, "title is a int"),
    "backend other": (dict(backend="bokeh"), ValueError, "backend is 'bokeh'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named_with_what_was_found(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        viz.head_view(**{"weights": WEIGHTS, "tokens": WORDS} | change)


def test_model_view_names_its_own_argument_and_axes():
    with pytest.raises(ValueError, match=r"weights_per_layer has shape .*\(layers, heads,"):
        viz.model_view(WEIGHTS)


def test_canary_good_arguments_raise_nothing():
    viz.head_view(WEIGHTS, WORDS)
