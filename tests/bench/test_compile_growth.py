"""The measuring script at a size that takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest
from compile_growth import extrapolated, growth

SCRIPT = Path(__file__).parent / "compile_growth.py"
GIB = 2**30


def test_growth_is_that_of_a_layer() -> None:
    sizes = {"layers": 2, "seconds": 10.0, "peak": 3 * GIB, "weights": 2 * GIB}
    assert growth(None, sizes) == ""
    more = {"layers": 4, "seconds": 16.0, "peak": 5 * GIB, "weights": 6 * GIB}
    assert growth(sizes, more) == "3.0 s, 1.00 GiB (0.50 of its weights)"
    assert extrapolated(sizes, more, 32) == "extrapolated to 32: 2 min, 33.0 GiB (0.53 of its weights)"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_line_for_each_size_and_pass() -> None:
    shape = {"width": 64, "inner": 96, "heads": 2, "vocabulary": 1000, "tokens": 28}
    size = [text for name, number in shape.items() for text in (f"--{name}", str(number))]
    settings = ["--set", "quantize.weights.solver=rtn", "--set", "quantize.transform=hadamard"]
    command = [sys.executable, str(SCRIPT), "--layers", "1", "2", "--passes", *size, *settings]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    sizes = [line for line in lines if line[:6].strip().isdigit()]
    assert [line.split()[0] for line in sizes] == ["1", "2"] and sizes[1].endswith("of its weights)")
    assert [line.split()[0] for line in lines].count("quantize_weights") == 2
