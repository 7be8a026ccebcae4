"""Every option, alone and beside every other: it has an effect on every path, and the right one."""

from inspect import signature

import numpy as np
import oracle
import pytest
import sizes
from judge import assert_accurate, assert_same
from options import OPTIONS, PAIRS, PLAIN, Option, cut, pair_of
from sizes import KEY_BLOCK, qkv
from test_layout import LAYOUTS, heads_after_sequence, name_of

from mha_fast import attention, reference

ALL = {"return_lse": True, "return_weights": True}
EACH = pytest.mark.parametrize("name", OPTIONS)
TWO = pytest.mark.parametrize("names", PAIRS, ids=" and ".join)


def arrays(dtype=np.float32, seqlen_q=19, seqlen_k=KEY_BLOCK + 9):
    return qkv(seqlen_q, seqlen_k, 5, 9, heads=4, kv_heads=2, dtype=dtype)


NO_OPTIONS = ("q", "k", "v", "out", "return_lse", "return_weights", "weights_heads",
              "weights_rows", "threads")  # fmt: skip


def test_every_argument_of_attention_has_a_row():
    arguments = set(signature(attention).parameters) - set(NO_OPTIONS)
    assert arguments == {x for row in OPTIONS.values() for x in (row.argument, *row.beside)}


# ---- Accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 67])
def test_an_option_is_accurate(isa, dtype, option, rows):
    q, k, v = arrays(dtype, rows, 2 * KEY_BLOCK + 9)
    options = option(q, k, v)
    assert_accurate(attention(q, k, v, **ALL, **options), q, k, v, **options)


@TWO
def test_two_options_are_accurate_together(real, names):
    q, k, v = arrays(real)
    options = pair_of(names, q, k, v)
    (_, result), *others = sizes.on_every_isa(lambda: attention(q, k, v, **ALL, **options))
    assert_accurate(result, q, k, v, **options)
    for isa, other in others:
        assert_same(other, result, isa)


def test_the_reference_is_accurate_under_an_option(dtype, option):
    q, k, v = arrays(dtype)
    options = option(q, k, v)
    result = reference.attention(q, k, v, **ALL, **options)
    assert_accurate(result, q, k, v, **options)
    wide = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), **options)
    assert_accurate(attention(q, k, v, **options), q, k, v, out64=wide, **options)


@TWO
def test_the_reference_is_accurate_under_two_options(names):
    q, k, v = arrays()
    options = pair_of(names, q, k, v)
    assert_accurate(reference.attention(q, k, v, **ALL, **options), q, k, v, **options)


# ---- Every path ----------------------------------------------------------------------------------


class Wrapped:
    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


def listed(options):
    return {n: x.tolist() if isinstance(x, np.ndarray) else x for n, x in options.items()}


def out_for(q, v):
    return np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype)


PATHS = {
    "arrays": lambda q, k, v, o: attention(q, k, v, **o),
    "lists": lambda q, k, v, o: attention(q.tolist(), k.tolist(), v.tolist(), **o),
    "one list": lambda q, k, v, o: attention(q, k, v.tolist(), **o),
    "array-likes": lambda q, k, v, o: attention(Wrapped(q), k, Wrapped(v), **o),
    "options as lists": lambda q, k, v, o: attention(q, k, v, **listed(o)),
    "Fortran order": lambda q, k, v, o: attention(*map(np.asfortranarray, (q, k, v)), **o),
    "out": lambda q, k, v, o: attention(q, k, v, out=out_for(q, v), **o),
    "lse": lambda q, k, v, o: attention(q, k, v, return_lse=True, **o).out,
    "weights": lambda q, k, v, o: attention(q, k, v, return_weights=True, **o).out,
    "one thread": lambda q, k, v, o: attention(q, k, v, threads=1, **o),
    "scale": lambda q, k, v, o: attention(q, k, v, **{"scale": 5**-0.5} | o),
    "open window": lambda q, k, v, o: attention(q, k, v, **{"window": (None, None)} | o),
    "no bias": lambda q, k, v, o: attention(q, k, v, **{"bias": np.zeros((1, 1))} | o),
    "no mask": lambda q, k, v, o: attention(q, k, v, **{"mask": np.ones((1, 1), bool)} | o),
    "one batch row": lambda q, k, v, o: np.concatenate([
        attention(q[b], k[b], v[b], **without_batch(cut(o, "b", slice(b, b + 1), q, k, v)))[None]
        for b in (0, 1)
    ]),
}  # fmt: skip


def without_batch(options):
    """Of one batch row, which is no axis any more."""
    kept = dict(options)
    for row in OPTIONS.values():
        if row.axes.startswith("b") and np.ndim(kept.get(row.argument)) == len(row.axes):
            kept[row.argument] = kept[row.argument][0]
    return kept


@EACH
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seqlen_q", [1, 19])
def test_an_option_has_its_effect_on_every_path(isa, name, path, seqlen_q):
    q, k, v = arrays(np.float64, seqlen_q)
    options = OPTIONS[name](q, k, v)
    expected = attention(q, k, v, **options)
    if seqlen_q > 1:
        assert_effect(expected, attention(q, k, v))
    assert_same(PATHS[path](q, k, v, options), expected)


@EACH
def test_an_option_has_an_effect_on_all_that_the_oracle_says(isa, real, name):
    q, k, v = arrays(real)
    options = OPTIONS[name](q, k, v)
    result, plain = attention(q, k, v, **ALL, **options), attention(q, k, v, **ALL)
    twins = [reference.attention(q, k, v, **ALL, **x) for x in (options, {})]
    exact = [oracle.attention(q, k, v, wide=np.float64, **x) for x in (options, {})]
    assert (exact[0].out != exact[1].out).any()
    for field in ("out", "lse", "weights"):
        if (getattr(exact[0], field) != getattr(exact[1], field)).any():
            assert_effect(getattr(result, field), getattr(plain, field))
            assert_effect(*(getattr(twin, field) for twin in twins))


def assert_effect(result, plain):
    with pytest.raises(AssertionError, match="differ"):
        assert_same(result, plain)


@TWO
def test_an_option_has_an_effect_beside_another(names):
    q, k, v = arrays()
    options = pair_of(names, q, k, v)
    together = attention(q, k, v, **options)
    for name in names:
        alone = OPTIONS[name](q, k, v)
        if set(alone) < set(options):
            assert_effect(together, attention(q, k, v, **alone))


# ---- Layouts -------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_layout_changes_no_bit_under_an_option(isa, real, layout, name):
    q, k, v = arrays(real)
    options = OPTIONS[name](q, k, v)
    expected = attention(q, k, v, **ALL, **options)
    axes = 3 if layout is heads_after_sequence else 2
    moved = {
        name: layout(x) if isinstance(x, np.ndarray) and x.ndim >= axes else x
        for name, x in options.items()
    }
    assert_same(attention(*map(layout, (q, k, v)), **ALL, **moved), expected)


# ---- Canaries ------------------------------------------------------------------------------------


def test_canary_an_option_that_is_ignored_is_caught():
    q, k, v = arrays()
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_effect(attention(q, k, v, **PLAIN(q, k, v)), attention(q, k, v))
    ignored = attention(q, k, v)
    for name in OPTIONS:
        with pytest.raises(AssertionError, match="are wrong"):
            assert_accurate(ignored, q, k, v, **OPTIONS[name](q, k, v))


def test_canary_a_cut_at_the_wrong_place_is_caught():
    q, k, v = arrays()
    for name, axis in (("mask", "b"), ("bias", "h"), ("q_offset", "b"), ("causal", "q")):
        options = OPTIONS[name](q, k, v)
        first, second = (cut(options, axis, slice(i, i + 1), q, k, v) for i in (0, 1))
        assert any(np.any(first[n] != second[n]) for n in first)


def test_canary_an_argument_without_a_row_is_caught(monkeypatch):
    monkeypatch.setitem(OPTIONS, "new", Option("hardcap", lambda p: 3.0))
    with pytest.raises(AssertionError):
        test_every_argument_of_attention_has_a_row()


def test_an_argument_of_each_head_is_cut_by_its_row(monkeypatch):
    monkeypatch.setitem(OPTIONS, "new", Option("new", lambda p: np.arange(p.heads), "h", {}, "b"))
    q, k, v = arrays()
    options = OPTIONS["new"](q, k, v)
    assert cut(options, "h", slice(1, 3), q, k, v)["new"].tolist() == [1, 2]
    assert cut(options, "q", slice(1, 3), q, k, v)["new"].tolist() == [0, 1, 2, 3]
    with pytest.raises(pytest.skip.Exception, match="new counts them"):
        cut(options, "b", slice(0, 1), q, k, v)
