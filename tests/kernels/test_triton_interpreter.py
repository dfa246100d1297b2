"""Triton kernels on the CPU, in Triton's interpreter, against their references.

The interpreter must be chosen before Triton is first imported, so the cases (interpreted/*.py) run in a process of
their own, all of them once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton", reason="the extra `triton` is not installed")

FOLDER = Path(__file__).with_name("interpreted")
CASES = sorted(each.stem for each in FOLDER.glob("*.py") if each.name != "conftest.py")
CLASH = Version(triton.__version__) < Version("3.9") and Version(np.__version__) >= Version("2.4")

pytestmark = pytest.mark.skipif(
    CLASH, reason="the interpreter of Triton before 3.9 cannot run under numpy 2.4 or later"
)


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """(file, test, what is wrong: empty if it passed) of every case in a report of pytest."""
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = "".join(f"{each.tag}: {each.get('message')}\n{each.text}" for each in case)
        yield case.get("classname", "").rpartition(".")[2], case.get("name", ""), wrong


def run(marked: str, report: Path) -> dict[str, dict[str, str]]:
    """File -> test -> what is wrong, of the cases with a mark."""
    files = [str(FOLDER / f"{name}.py") for name in CASES]
    options = ["-q", "-p", "no:cacheprovider", "-m", marked, f"--junitxml={report}"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), ran.stdout[-8000:] + ran.stderr[-2000:]
    found: dict[str, dict[str, str]] = {}
    for file, name, wrong in outcomes(report):
        found.setdefault(file, {})[name] = wrong
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The default cases."""
    return run("not slow", tmp_path_factory.mktemp("triton") / "report.xml")


@pytest.mark.parametrize("name", CASES)
def test_cases_pass_in_the_interpreter(found: dict[str, dict[str, str]], name: str) -> None:
    assert found[name] and not any(found[name].values()), "\n".join(filter(None, found[name].values()))


@pytest.mark.slow
def test_larger_cases_pass_in_the_interpreter(tmp_path: Path) -> None:
    found = run("slow", tmp_path / "report.xml")
    wrong = [text for cases in found.values() for text in cases.values() if text]
    assert found and not wrong, "\n".join(wrong)
