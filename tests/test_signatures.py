"""The list of options is one: whatever spells the options spells those of mha_fast/options.py."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from mha_fast import _core, attention, reference
from mha_fast.options import OPTIONS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(inspect.getfile(_core)).parent
ARRAYS = ("q", "k", "v")


def defaults_of(function):
    """Names and defaults, in order."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name not in ARRAYS]


def stub():
    return ast.parse((PACKAGE / "_core.pyi").read_text())


def assert_options_come_first(function):
    options = [(name, default) for name, (default, _) in OPTIONS.items()]
    assert defaults_of(function)[: len(options)] == options


@pytest.mark.parametrize("function", [attention, reference.attention, _core.ask])
def test_signature_begins_with_the_options_in_order(function):
    assert_options_come_first(function)
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    assert kinds[:4] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 4
    assert set(kinds[4:]) == {inspect.Parameter.KEYWORD_ONLY}


def test_reference_takes_what_attention_takes():
    assert inspect.signature(reference.attention) == inspect.signature(attention)


def test_extension_is_asked_nothing_but_options():
    assert len(defaults_of(_core.ask)) == len(OPTIONS)


def test_question_keeps_every_option_under_its_name():
    values = {name: object() for name in OPTIONS}
    question = _core.ask(*ARRAYS, **values)
    assert not question.plain
    assert {name: getattr(question, name) for name in OPTIONS} == values


def test_stub_spells_the_functions_and_attributes_that_there_are():
    body = stub().body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    public = {name for name, x in vars(_core).items() if inspect.isroutine(x) and name[0] != "_"}
    assert set(functions) == public
    for name, node in functions.items():
        spelled = [a.arg for a in node.args.args + node.args.kwonlyargs]
        if name not in ("overlap", "overlaps_itself"):  # cpdef: no signature to compare with
            assert spelled == list(inspect.signature(getattr(_core, name)).parameters), name
    [question] = (node for node in body if isinstance(node, ast.ClassDef))
    spelled = {n.target.id for n in question.body if isinstance(n, ast.AnnAssign)}
    assert spelled == {*ARRAYS, *OPTIONS, "plain"}


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_in_docstring_and_guide(name):
    assert re.search(rf"^(\w+, )*{name}(, \w+)* : ", inspect.getdoc(attention), re.M)
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.rst"))
    assert re.search(rf"\b{name}\b", pages)


def test_reference_imports_neither_the_checks_nor_the_extension():
    tree = ast.parse(Path(inspect.getfile(reference)).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {getattr(n, "module", None) or n.names[0].name for n in imports}
    assert names == {"numpy", "results", "typing"}
    results = Path(inspect.getfile(import_module("mha_fast.results"))).read_text()
    assert not re.search(r"^\s*(from \.|import \.)", results, re.M)


def test_canary_a_forgotten_option_is_found(monkeypatch):
    monkeypatch.setitem(OPTIONS, "softest", (None, None))
    with pytest.raises(AssertionError):
        assert_options_come_first(attention)
    with pytest.raises(TypeError, match="softest"):
        _core.ask(*ARRAYS, **{name: default for name, (default, _) in OPTIONS.items()})
