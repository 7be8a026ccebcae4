"""The rules of the house that a machine can check. They need the source tree."""

import re
from pathlib import Path

import pytest
import sizes

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="needs the source tree")

C_FILES = sorted(CSRC.rglob("[!.]*.[chd]*")) if CSRC.is_dir() else []
PYTHON_FILES = sorted(
    path
    for folder in ("mha_fast", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".pyx", ".pxd", ".pxi", ".pyi")
)
ENTRY_POINT = "RegisterCustomOps"  # so named by onnxruntime
CYTHON_FILES = [path for path in PYTHON_FILES if path.suffix in (".pyx", ".pxi")]


def listed(name, macro):
    """First arguments of an X-macro list."""
    return re.findall(rf"^{macro}\((\w+)", (CSRC / name).read_text(), re.M)


def name_of(path):
    return str(path.relative_to(ROOT))


def code_of(path):
    """C without comments and strings."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.S)
    return re.sub(r'"(\\.|[^"\n])*"', '""', text)


def test_isas_listed_are_the_files_there_are():
    files = {path.stem for path in (CSRC / "isa").glob("*.c")}
    assert set(listed("isa.def", "MHA_ISA")) == files


def test_dtypes_of_the_tests_are_those_of_the_kernel():
    short = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
    names = [short[dtype.name] for dtype in sizes.DTYPES]
    assert ["BOOL", *names] == listed("dtype.def", "MHA_DTYPE")


@pytest.mark.parametrize("path", C_FILES, ids=name_of)
def test_c_is_ascii_and_starts_with_what_the_file_is_for(path):
    text = path.read_bytes().decode("ascii")
    assert text.startswith("/* ")


@pytest.mark.parametrize("path", C_FILES, ids=name_of)
def test_c_knows_no_python_and_never_prints_aborts_or_exits(path):
    code = code_of(path)
    assert "Python.h" not in path.read_text()
    called = r"\b(\w*printf|puts|putchar|fwrite|abort|_?exit|assert|raise)\s*\("
    assert not re.findall(called, code)


def test_public_symbols_are_named_mha():
    definition = r"^(?!static|WORD|typedef|extern|return|else)\w[\w *]*?(\w+)\([^;]*\n\{"
    for path in CSRC.rglob("*.[ch]"):
        names = set(re.findall(definition, code_of(path), re.M)) - {ENTRY_POINT}
        assert all(name.startswith("mha_") for name in names), f"{path.name}: {names}"


@pytest.mark.parametrize("path", [*C_FILES, *PYTHON_FILES], ids=name_of)
def test_file_is_short_narrow_and_has_no_open_task(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines), default=0) <= 100
    marker = "TO" + "DO"
    assert not [x for x in lines if re.search(rf"\b{marker}\b(?!.*#\d)", x)]


def vocabulary():
    text = (CSRC / "isa" / "vocabulary.h").read_text()
    return set(re.findall(r"^#define (v_\w+) FN", text, re.M))


@pytest.mark.parametrize("isa", listed("isa.def", "MHA_ISA") if C_FILES else [])
def test_isa_file_holds_the_vocabulary_and_nothing_else(isa):
    text = (CSRC / "isa" / f"{isa}.c").read_text()
    for line, name in re.findall(r'(#include "(\w+_words.inc.h)")', text):
        text = text.replace(line, (CSRC / "isa" / name).read_text(), 1)
    words = re.findall(r"^WORD [\w ]+?\b(\w+)\(", text, re.M)
    spoken = {word for word in words if word.startswith("v_")}
    assert spoken == vocabulary()
    assert all(words.count(word) == 2 for word in spoken), "one for each REAL"
    assert not re.search(r"mha_(tile|problem|array)|MHA_KEY_BLOCK", text)
    assert text.count('#include "../kernel.inc.h"') == 2


@pytest.mark.parametrize("path", CYTHON_FILES, ids=name_of)
def test_cython_has_no_fused_type_and_no_code_per_dtype(path):
    text = path.read_text()
    assert not re.search(r"\b(ctypedef fused|cython\.floating|REAL)\b", text)
    for dtype in ("MHA_F16", "MHA_BF16"):  # its row of the table, and where NumPy finds bfloat16
        assert len(re.findall(rf"\b{dtype}\b", text)) <= (3 if path.name == "_arrays.pxi" else 0)


def parameters(text):
    """Name and number of parameters of each function that is defined in C or Cython."""
    text = re.sub(r"\bFN\((\w+)\)", r"\1", text)
    c = r"^\w[^;{}=#]*?\b(\w+)\(([^;{}]*?)\)\s*\{"
    cython = r"^ *(?:cdef|cpdef|def) [^=\n]*?\b(\w+)\(([^:]*?)\)[^()]*:$"
    for name, found in re.findall(c, text, re.M) + re.findall(cython, text, re.M):
        yield name, len([x for x in re.sub(r"\([^()]*\)", "", found).split(",") if x.strip("* ")])


@pytest.mark.parametrize("path", [*C_FILES, *CYTHON_FILES], ids=name_of)
def test_function_takes_at_most_seven_parameters(path):
    text = code_of(path) if path in C_FILES else path.read_text()
    for name, count in parameters(text):
        assert count <= 7 or name == "ask", f"{name} takes {count}"  # the question's options


def test_parameters_are_counted_in_every_kind_of_function():
    product = (CSRC / "product.inc.h").read_text()
    assert ("multiply", 6) in parameters(product) and ("product_tile", 6) in parameters(product)
    words = (CSRC / "isa" / "avx2.c").read_text()
    assert ("v_fma", 3) in parameters(words) and ("v_if_less", 4) in parameters(words)
    plan, team = ((ROOT / "mha_fast" / f"_{x}.pxi").read_text() for x in ("plan", "team"))
    assert ("plan_of", 4) in parameters(plan) and ("claim_threads", 1) in parameters(team)
    guilty = "static int f(int a, int b, int c, int d,\n    int e, int f, int g, int h)\n{\n}\n"
    assert list(parameters(guilty)) == [("f", 8)]


def test_source_asks_the_cpu_itself():
    assert not any("__builtin_cpu" in code_of(path) for path in C_FILES)


def test_hard_dependencies_are_numpy_and_threadpoolctl():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w.-]+", text)[0] for text in project["dependencies"]}
    assert names == {"numpy", "threadpoolctl"}


def test_every_test_function_is_a_sentence():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M):
            assert name.count("_") >= 3, f"{path.name}: {name}"


def test_the_one_literal_tolerance_is_in_judge():
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        if path.name not in ("judge.py", "test_house_rules.py"):
            assert not re.search(r"\b(rtol|atol|approx|allclose)\b", text), path.name


def test_canary_a_forbidden_call_is_found(tmp_path):
    guilty = tmp_path / "guilty.c"
    guilty.write_text('/* x */ void f(void) { printf("%d"); }')
    with pytest.raises(AssertionError):
        test_c_knows_no_python_and_never_prints_aborts_or_exits(guilty)
