"""The page of the guide that needs torch; `make docs` runs the others."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_page_for_those_who_come_from_torch_is_right():
    page = DOCS / "from_torch.rst"
    command = [sys.executable, "-P", "-W", "error", "-m", "doctest", str(page)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
