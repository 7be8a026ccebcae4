"""The pages of the guide that need another library; `make docs` runs the others."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("library", ["torch", "transformers", "jax", "dask", "onnxruntime"])
def test_page_for_those_who_come_from_another_library_is_right(library):
    pytest.importorskip(library)
    page = DOCS / f"from_{library}.rst"
    command = [sys.executable, "-P", "-W", "error", "-m", "doctest", str(page)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
