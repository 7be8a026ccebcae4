"""The reference: alone in its room, with the functions of the package, and as exact.

What it gives under every option is judged in test_options.py.
"""

import importlib
import sys
import types
from inspect import signature

import numpy as np
import pytest
import sizes
from judge import assert_accurate, assert_same
from sizes import PRIMES, qkv

import mha_fast
from mha_fast import reference

FUNCTIONS = ["attention", "attention_varlen", "linear", "merge"]
FORBIDDEN = ["_core", "arguments"]


def import_alone(monkeypatch, forbidden):
    """The module `reference` of a package without some modules."""
    package = types.ModuleType("alone")
    package.__path__ = mha_fast.__path__
    monkeypatch.setitem(sys.modules, "alone", package)
    for name in forbidden:
        monkeypatch.setitem(sys.modules, f"alone.{name}", None)
    monkeypatch.delitem(sys.modules, "alone.reference", raising=False)
    try:
        return importlib.import_module("alone.reference")
    finally:
        for name in [x for x in sys.modules if x.startswith("alone.") and sys.modules[x]]:
            del sys.modules[name]


def test_it_needs_neither_the_extension_nor_the_checks(monkeypatch):
    alone = import_alone(monkeypatch, FORBIDDEN)
    q, k, v = qkv(5, 13)
    assert_same(alone.attention(q, k, v, causal=True), reference.attention(q, k, v, causal=True))


def test_canary_a_module_that_is_missing_is_noticed(monkeypatch):
    with pytest.raises(ImportError):
        import_alone(monkeypatch, [*FORBIDDEN, "results"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_takes_the_arguments_of_the_package(name):
    package, simple = (signature(getattr(m, name)).parameters for m in (mha_fast, reference))
    assert [*simple.values()] == [*package.values()]


@pytest.mark.parametrize("seqlen", PRIMES)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_reference_is_accurate_in_every_batch_shape(real, seqlen, batch):
    q, k, v = qkv(seqlen, 101, 16, 5, batch=batch, heads=4, kv_heads=2, dtype=real)
    options = {"causal": True, "window": (50, None), "scale": -0.3}
    options["bias"] = sizes.random(seqlen, 101, dtype=real)
    options["mask"] = sizes.random_mask(4, seqlen, 101)
    result = reference.attention(q, k, v, return_lse=True, **options)
    assert_accurate(result, q, k, v, **options)


def test_canary_a_reference_that_forgets_an_option_is_caught():
    q, k, v = qkv(5, 13)
    with pytest.raises(AssertionError, match="out: .* are wrong"):
        assert_accurate(reference.attention(q, k, v), q, k, v, scale=np.pi)
