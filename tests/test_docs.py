"""The guide: nothing on its pages escapes `make docs` and `make oracles`, which run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mha_fast

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.rst"))
ids = {"ids": lambda path: path.stem}

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")


def unchecked(text):
    """Blocks that look like code and are no doctest: all but shell and pictures of shapes."""
    blocks = re.findall(
        r"^\.\. (?:code|code-block|sourcecode|plot|literalinclude)::.*$", text, re.M
    )
    blocks = [block for block in blocks if block != ".. code-block:: console"]
    literals = re.findall(r"(?<!:)::\n\n((?: +.*\n|\n)+)", text)
    literals = [block for block in literals if re.search(r"\bimport\b|[^=!<>]=[^=]|\(\)", block)]
    return blocks + literals


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_code_block_of_a_page_is_a_doctest(page):
    assert unchecked(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_picture_of_a_page_is_made_on_the_page(page):
    text = page.read_text()
    shown = set(re.findall(r"^\.\. image:: (\S+)|:download:`[^<]*<(\S+)>`", text, re.M))
    made = set(re.findall(r'(?:savefig|write_html)\("([^"]+)"', text))
    assert {image or file for image, file in shown} == made


@pytest.mark.parametrize("page", PAGES, **ids)
def test_page_is_narrow_and_in_the_index(page):
    assert max(map(len, page.read_text().splitlines())) <= 100
    index = (DOCS / "index.rst").read_text()
    assert page.stem == "index" or f"\n   {page.stem}\n" in index


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.rst").read_text()
    for name in mha_fast.__all__:
        assert re.search(rf"^\.\. auto\w+:: (mha_fast\.)?{name}$", text, re.M), name


def test_no_page_is_left_out_by_make():
    makefile = (DOCS.parent / "Makefile").read_text()
    left_out = re.search(r"^PAGES := \$\(filter-out (.*?),", makefile, re.M)[1]
    libraries = [page.stem.removeprefix("from_") for page in PAGES if page.match("from_*.rst")]
    assert left_out == "from_%.rst" and "torch" in libraries
    oracles = (DOCS.parent / "tests" / "oracles" / "test_guide.py").read_text()
    assert all(f'"{library}"' in oracles for library in libraries)


def test_canary_code_that_is_wrong_or_never_runs_is_found(tmp_path):
    page = tmp_path / "page.rst"
    page.write_text("A sum:\n\n>>> 1 + 1\n3\n")
    command = [sys.executable, "-P", "-m", "doctest", str(page)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "Expected:\n    3\nGot:\n    2" in process.stdout
    assert unchecked(".. code-block:: python\n\n   x = f()\n") != []
    assert unchecked("So::\n\n   x = f()\n\nText.\n") != []
    assert unchecked("So::\n\n   x   (6, 512)\n\n.. code-block:: console\n\n   $ ls\n") == []
