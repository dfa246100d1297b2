"""A compile whose weights stay in files gives the same bytes as one in memory, also when it is stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from artifacts import read
from programs import changed_recipe
from tiny_checkpoint import write_checkpoint
from transformers import AutoModelForImageTextToText

import qpcompile
from qpcompile.calibration import statistics
from qpcompile.capture.load import load_processor
from qpcompile.ir import checkpoint as checkpoints
from qpcompile.ir import mapped_tensors

DATA = Path(__file__).resolve().parent / "testbed" / "calibration" / "llava"
FEW = ("calibration.samples=2", "quality.samples=1", "quantize.training.epochs=1")
RTN = (
    *FEW,
    "quantize.transform=hadamard",
    "quantize.weights.solver=rtn",
    "quantize.weights.clip_search=false",
    "quantize.activations.clip_search=false",
)
MBQ = (*FEW, "quantize.scaling=mbq", "quantize.smooth=null", "quantize.transform=rotation")
QVLM = (*FEW, "quantize.simulation=qvlm", "quantize.transform=none", "quantize.head_bits=16")


def bytes_of(compiled: Any, folder: Path) -> dict[str, str]:
    """The hash of each file of the artifact."""
    compiled.save_pretrained(folder)
    return {name: entry["sha256"] for name, entry in read(folder, "manifest.json")["files"].items()}


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("quota-30", (*FEW, "quantize.transform=hadamard")),
        pytest.param("quota-30", FEW, marks=pytest.mark.slow),
        pytest.param("w4a4kv4", RTN, marks=pytest.mark.slow),
        pytest.param("joint-30", FEW, marks=pytest.mark.slow),
        pytest.param("w4a4kv4", MBQ, marks=pytest.mark.slow),
        pytest.param("w4a4kv4", QVLM, marks=pytest.mark.slow),
        pytest.param("w4a4kv4-mixed", FEW, marks=pytest.mark.slow),
        pytest.param("w8a8", FEW, marks=pytest.mark.slow),
        pytest.param("w4a16", FEW, marks=pytest.mark.slow),
    ],
)
def test_the_same_bytes_as_in_memory(
    preset: str, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = write_checkpoint(tmp_path / "model"), changed_recipe(preset, *settings)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), load_processor(folder)
    expected = bytes_of(qpcompile.compile(model, recipe, processor=processor, calibration=DATA), tmp_path / "memory")
    # From here on every tensor that a pass makes is in a file.
    monkeypatch.setattr(mapped_tensors, "LARGE", 0)
    monkeypatch.setattr(statistics, "LARGE", 0)
    monkeypatch.setattr(checkpoints, "SECONDS", -1.0)
    options: dict[str, Any] = {"calibration": DATA, "offload": tmp_path / "new", "resume": tmp_path / "progress"}

    def stop(step: Any, program: Any) -> None:
        if step.name == "quantize_weights":
            assert f"{tmp_path}/new/" in Path("/proc/self/maps").read_text()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qpcompile.compile(folder, recipe, after=stop, **options)
    assert list((tmp_path / "progress").glob("*.safetensors"))
    assert bytes_of(qpcompile.compile(folder, recipe, **options), tmp_path / "disk") == expected
    assert not list((tmp_path / "new").iterdir())
