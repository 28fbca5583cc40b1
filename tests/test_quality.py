"""The type checker and the linter find nothing, and nobody silenced them without saying why."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, project_files

pytestmark = pytest.mark.skipif(ROOT is None, reason="their settings are only in a checkout")


def checked(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_types_fit():
    "setup.cfg says how strictly: every function of the package is annotated and checked."
    checked("mypy")


def test_the_linter_finds_nothing():
    "ruff.toml says what it looks at: the package, the notebooks, the tests."
    checked("ruff", "check", ".")


def test_whoever_silences_a_check_says_why():
    "`# type: ignore[code]  # why`, and the same for noqa."
    silenced = re.compile(r"# (?:type: ignore|noqa)(?!(?:\[[\w-]+\]|: \w+)  (?:# )?\w)")
    for path in project_files():
        if path.suffix in (".py", ".ipynb") and path.name != "test_quality.py":
            assert not silenced.search(path.read_text(encoding="utf-8")), path.name
