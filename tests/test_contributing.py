"""CONTRIBUTING.md counts the places of a change; here its table is held to the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text() if (ROOT / "CONTRIBUTING.md").is_file() else ""
ROW = r"^\| (an? [^|]+?) +\| +(\d+) +\| (.+?) +\|$"

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")

# How each option is spelled: its keyword in Python and Cython, its field in C. The keyword says
# nothing in C, where `bias` is also that of an exponent; other locals are called `left`.
KEYWORD = {"window": r"\bwindow\b", "bias": r"\bbias\b"}
FIELD = {
    "window": r"\bspans(\.|->)(left|right)\b|^ *idx left\b",
    "bias": r"\bscoring(\.|->)(terms|num_terms)\b|^ *mha_array \*?terms\b",
}
# Files beyond the row's that may spell it. A linear layer says that its spans are open; ONNX has an
# attribute for each side of a window; a cache has a window too. A bias is a transform with an array
# of its own, so C finds its rows for a tile and reads them; a number (softcap) needs neither;
# packed sequences have none;
# doors into other programs name what they differentiate.
# The `bias` of a product or a norm is another argument, so its files are not searched.
ROW_OF = {"window": "an interval mask", "bias": "a score transform"}
ALSO = {
    "window": {
        "mha_fast/_linear.pxi",
        "mha_fast/onnx/node.py",
        "mha_fast/onnx/microsoft.py",
        "mha_fast/model/cache.py",
        "mha_fast/model/cache_file.py",
        "mha_fast/torch.py",
        "mha_fast/state.py",
        "mha_fast/dask.py",
        "mha_fast/transformers/mask.py",
    },
    "bias": {
        "csrc/tile.c",
        "csrc/terms.inc.h",
        "mha_fast/varlen.py",
        "mha_fast/state.py",
        "mha_fast/dask.py",
        "mha_fast/autograd.py",
        "mha_fast/jax.py",
        "mha_fast/torch.py",
        "mha_fast/transformers/attend.py",
        "mha_fast/onnx/microsoft.py",
    },
}
NOT_SEARCHED = {
    "window": (),
    "bias": ("mha_fast/model/", "mha_fast/_linear.pxi", "mha_fast/_norm.pxi"),
}
# Listed, but without a word about these options: where a transform is a line of the kernel, a bias
# is one of the terms that come as vectors, and the canonical arithmetic is a comment.
SILENT = {
    "window": set(),
    "bias": {"csrc/score.inc.h", "csrc/kernel.inc.h", "csrc/gradient_scores.inc.h"},
}
# A storage dtype that is also read by vectors; files have names of their own for dtypes.
BFLOAT16 = r"(?i)(?<![a-z])bfloat16|bf16"
NAMES_IN_FILES = {
    "mha_fast/model/weights_file.py",
    "mha_fast/model/cache_file.py",
    "mha_fast/torch.py",
    "mha_fast/_onnxruntime.pxi",
    "mha_fast/onnx/runtime.py",
}


def table(text):
    """Change: (number, places)."""
    rows = re.findall(ROW, text, re.M)
    return {change: (int(number), places.split(";")) for change, number, places in rows}


def files(text):
    """Every file that a text names in backticks, patterns aside."""
    named = re.findall(r"`([\w./*-]+(?:/|\.(?:py|pyx|pxi|pxd|pyi|c|h|def|md)))`", text)
    return {name for name in named if "/" in name and "*" not in name}


def wrong_counts(text):
    return {
        change: (number, len(places))
        for change, (number, places) in table(text).items()
        if number != len(places)
    }


def code_of(path):
    """Without comments and docstrings; other strings stay: the keys of OPTIONS are some."""
    comment = (
        r"/\*.*?\*/" if path.suffix in (".c", ".h", ".def") else r'""".*?"""|(?<!["\'])#[^\n]*'
    )
    return re.sub(comment, "", path.read_text(), flags=re.S)


def product():
    """Name and code of every file of the product, without `_core.c`, which Cython makes."""
    kinds = (".c", ".h", ".def", ".py", ".pyx", ".pxi", ".pxd", ".pyi")
    for folder in ("csrc", "mha_fast"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in kinds and path.name != "_core.c":
                yield path.relative_to(ROOT).as_posix(), code_of(path)


def files_that_spell(option):
    found = set()
    for name, code in product():
        patterns = [FIELD[option]] + [KEYWORD[option]] * name.startswith("mha_fast/")
        if not name.startswith(NOT_SEARCHED[option]) and re.search("|".join(patterns), code, re.M):
            found.add(name)
    return found


def files_that_name_isa(isa):
    return {name for name, code in product() if re.search(rf"(?<![a-z]){isa}(?![a-z0-9_])", code)}


def files_that_name_bfloat16():
    return {name for name, code in product() if re.search(BFLOAT16, code)}


def functions(text):
    """(name, file) of every function that a text finds in a file."""
    return re.findall(r"`(\w+)(?:\(\))?` in `((?:csrc|mha_fast)/[\w./]+)`", text)


def isas():
    return re.findall(r"^MHA_ISA\((\w+)", (ROOT / "csrc" / "isa.def").read_text(), re.M)


def test_table_has_every_change_that_is_counted():
    assert {"an instruction set", "a storage dtype", *ROW_OF.values()} <= set(table(TEXT))
    assert TEXT.count("\n| a") == len(table(TEXT))


def test_number_of_each_change_is_that_of_its_places():
    assert wrong_counts(TEXT) == {}


def test_every_file_that_is_named_exists():
    assert len(files(TEXT)) > 20
    assert [name for name in files(TEXT) if not (ROOT / name).exists()] == []


def test_every_function_is_in_the_file_that_is_named():
    assert ("span", "csrc/tile.c") in functions(TEXT) and len(functions(TEXT)) > 5
    for name, path in functions(TEXT):
        assert re.search(rf"\b{name}\b", code_of(ROOT / path)), f"{name} in {path}"


def test_every_file_of_the_readme_exists():
    rows = (ROOT / "README.md").read_text().partition("| `mha_fast/` |")[2].partition("\n\n")[0]
    named = re.findall(r"`([\w.*]+(?:/(?:\*\.c)?|\.\w+))`", rows)
    assert len(named) > 20
    for name in named:
        assert any(list((ROOT / folder).glob(name)) for folder in ("", "mha_fast", "csrc")), name


def test_every_file_that_knows_bfloat16_is_named():
    dtype = files(";".join(table(TEXT)["a storage dtype"][1]))
    by_vectors = files(TEXT.partition("**A dtype**")[2].partition("\n\n")[0])
    words = {f"csrc/isa/{isa}.c" for isa in isas()} | {"csrc/isa/generic_words.inc.h"}
    assert dtype <= files_that_name_bfloat16()
    named = dtype | by_vectors | words | NAMES_IN_FILES
    assert files_that_name_bfloat16() - named == set()


@pytest.mark.parametrize("option", ROW_OF)
def test_option_is_spelled_in_its_places_and_nowhere_else(option):
    listed = files(";".join(table(TEXT)[ROW_OF[option]][1]))
    listed = {name for name in listed if not name.startswith("tests/")}
    assert files_that_spell(option) == (listed | ALSO[option]) - SILENT[option]


def test_instruction_set_is_named_in_its_file_and_in_the_list():
    assert len(isas()) > 2
    for isa in isas():
        assert files_that_name_isa(isa) == {"csrc/isa.def", f"csrc/isa/{isa}.c"}


def test_canary_a_place_that_is_not_counted_is_found(tmp_path, monkeypatch):
    guilty = "| a mask of the moon | 2 | `csrc/moon.c`; `csrc/mha.h`; `mha_fast/moon.py` |\n"
    assert wrong_counts(guilty) == {"a mask of the moon": (2, 3)}
    assert files(guilty) == {"csrc/moon.c", "csrc/mha.h", "mha_fast/moon.py"}
    everything = dict(product()) | {
        "csrc/moon.c": 'if (p->spans.left) use("avx2");',
        "mha_fast/moon.py": "moon(window=3, dtype='bfloat16')",
    }
    monkeypatch.setitem(globals(), "product", lambda: everything.items())
    assert files_that_name_isa("avx2") - {"csrc/moon.c"} == {"csrc/isa.def", "csrc/isa/avx2.c"}
    with pytest.raises(AssertionError, match="moon"):
        test_option_is_spelled_in_its_places_and_nowhere_else("window")
    with pytest.raises(AssertionError):
        test_instruction_set_is_named_in_its_file_and_in_the_list()
    with pytest.raises(AssertionError, match="moon"):
        test_every_file_that_knows_bfloat16_is_named()
