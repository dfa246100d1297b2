"""Triton's kernels on the CPU, in Triton's interpreter, against their references.

The interpreter must be selected before Triton is first imported, so the cases (interpreted/*.py) run in a separate
process.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton", reason="the extra `triton` is not installed")

CASES = sorted(each for each in Path(__file__).with_name("interpreted").glob("*.py") if each.name != "conftest.py")
CLASH = Version(triton.__version__) < Version("3.9") and Version(np.__version__) >= Version("2.4")


@pytest.mark.skipif(CLASH, reason="the interpreter of Triton before 3.9 cannot run under numpy 2.4 or later")
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_cases_pass_in_the_interpreter(marked: str) -> None:
    assert CASES
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, *map(str, CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout and "skipped" not in ran.stdout
