"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil
import re

import pytest

import mha_fast

MODULES = [
    module.name.removeprefix("mha_fast.")
    for module in pkgutil.walk_packages(mha_fast.__path__, "mha_fast.")
    if "._" not in module.name
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name):
    extra = name.split(".")[0]
    if extra in ("autograd", "dask", "jax", "onnx", "torch", "transformers", "viz"):
        library = "matplotlib" if extra == "viz" else extra
        pytest.importorskip(library, reason=f'pip install "mha_fast[{extra}]"')
    if name == "onnx.runtime":
        pytest.importorskip("onnxruntime", reason='pip install "mha_fast[onnxruntime]"')
    module = importlib.import_module(f"mha_fast.{name}")
    assert doctest.testmod(module).failed == 0


def test_public_functions_have_examples_and_say_what_they_raise():
    for name in mha_fast.__all__:
        member = getattr(mha_fast, name)
        assert member.__doc__, f"{name} has no docstring"
        if callable(member) and not isinstance(member, type):
            assert ">>> " in member.__doc__, f"{name} has no example"


def test_every_public_name_exists_and_nothing_else_is_public():
    public = {name for name in dir(mha_fast) if not name.startswith("_")}
    modules = set(MODULES)
    assert set(mha_fast.__all__) <= public
    assert public - modules <= set(mha_fast.__all__)
    assert sorted(mha_fast.__all__) == list(mha_fast.__all__)


FUNCTIONS = ["attention", "attention_varlen", "linear", "merge"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_has_the_same_signature(name):
    import inspect

    fast = inspect.signature(getattr(mha_fast, name))
    assert fast == inspect.signature(getattr(mha_fast.reference, name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_describes_every_parameter(name):
    import inspect

    function = getattr(mha_fast, name)
    described = re.findall(r"\n(\w+(?:, \w+)*) : ", inspect.getdoc(function))
    names = {name for line in described for name in line.split(", ")}
    parameters = inspect.signature(function).parameters.values()
    assert {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} <= names
