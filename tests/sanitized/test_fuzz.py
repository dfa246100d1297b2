"""The fuzzer: it finds no defect in the library without sanitizers, and names the call that crashes a process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qpcompile.kernels.native import library as native

FUZZ = Path(__file__).with_name("fuzz.py")
BEFORE = 'print("@6 rope", flush=True); print("answered"); print("@7 rows", flush=True)\n'


@pytest.fixture
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
def test_bent_operands_are_refused_or_answered() -> None:
    here = os.environ | {"PYTHONPATH": str(FUZZ.parents[2])}
    done = subprocess.run([sys.executable, FUZZ, "3", "60"], env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'answered': " in done.stdout and "'refused': " in done.stdout


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ("import os; os.abort()", "the process ended with -6"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, -1))\nwhile True: pass",
            "it took more than 10 s of the processor",
        ),
        ('print("raw: rows: IndexError: 3")', ""),
    ],
    ids=["dies", "does not end", "ends"],
)
def test_the_call_is_named(
    fuzz: ModuleType, calls: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "calls.py"
    script.write_text(BEFORE + calls)
    monkeypatch.setattr(fuzz, "__file__", str(script))
    tally = fuzz.Tally()
    assert fuzz.watch(1, 0, 9, tally) == problem
    assert (tally.last, tally.what, tally.counts["answered"]) == (7, "rows", 1)
    assert tally.bad == ({} if problem else {"raw: rows: IndexError: 3": 7})
