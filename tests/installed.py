"""What is checked of an installed wheel (pyproject.toml, cibuildwheel): installed.py TESTBEDS

It runs away from the sources: the package is the installed one, its kernels in C load, and a testbed is compiled,
saved, loaded and asked for its report.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import qpcompile
from qpcompile.kernels.native import library


def main(testbeds: Path) -> None:
    """Raises AssertionError for an installation that is not whole."""
    place = Path(qpcompile.__file__)
    assert testbeds.parents[1] not in place.parents, f"{place} is the source tree, not an installation"
    kernels = library.library()
    assert kernels.path is not None, kernels.problem
    keys = ["calibration.samples=1", "quality.samples=1", "quantize.weights.solver=rtn"]
    recipe = qpcompile.Recipe.load("w4a8kv4").with_overrides(keys)
    compiled = qpcompile.compile(testbeds / "llava", recipe, calibration=testbeds / "calibration" / "llava")
    assert not compiled.decode_problem, compiled.decode_problem
    with tempfile.TemporaryDirectory() as folder:
        compiled.save_pretrained(Path(folder, "out"))
        qpcompile.load(Path(folder, "out")).report(Path(folder, "report.html"))
    print(f"{place.parent}: {library.LEVELS[kernels.level]} kernels")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
