"""The page of an exported folder in headless Chromium: it answers, and dropped visual tokens are plainly seen.

Needs node's packages (`make tests/js/node_modules`) and a Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import base64
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qpcompile.emit.onnx.runner.answer import Runner
from tests.emit.test_onnx_js import JS, NODE, QUESTION, folder, node

__all__ = ["folder"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VENDORED = (
    "onnxruntime-web/dist/ort.wasm.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        NODE is None or CHROMIUM is None or not (JS / "node_modules").is_dir(),
        reason="run: apt-get install chromium; make tests/js/node_modules",
    ),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """`python -m http.server` without its log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def site(folder: Path, tmp_path: Path) -> Path:
    """The folder with the files that its README.md has copied."""
    shutil.copytree(folder, tmp_path / "site")
    (tmp_path / "site" / "vendor").mkdir()
    for name in VENDORED:
        shutil.copy(JS / "node_modules" / name, tmp_path / "site" / "vendor")
    return tmp_path / "site"


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def shown(url: str, picture: Path, size: tuple[int, int], shot: Path) -> dict[str, Any]:
    """What the page shows after a question."""
    words = [CHROMIUM, url, picture, QUESTION, *size, shot]
    (line,) = node("page.mjs", *words, given=None)
    return line


def flat(path: Path, grey: int) -> Path:
    """A picture of nearly one grey."""
    noise = np.random.default_rng(grey).integers(-6, 7, (240, 240, 3))
    Image.fromarray(np.clip(grey + noise, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("grey", [5, 250], ids=["dark", "bright"])
def test_the_page_answers_and_draws(
    folder: Path, served: str, tmp_path: Path, size: tuple[int, int], grey: int
) -> None:
    picture = flat(tmp_path / "photo.png", grey)
    seen = shown(served, picture, size, tmp_path / "shot.png")
    assert not seen["problems"] and not seen["foreign"] and not seen["failed"] and not seen["overflows"]
    assert seen["answer"].strip() == Runner(folder, threads=1).answer(picture, QUESTION)
    assert seen["layers"] == "layer 0layers 1 to 2"
    assert "of 144 visual tokens" in seen["legend"] and "Striped: dropped." in seen["legend"]
    assert (tmp_path / "shot.png").stat().st_size > 1000
    # Half of the cells and more are dropped: each is striped, with a contrast that the picture has nowhere.
    width, height = seen["size"]
    pixels = np.frombuffer(base64.b64decode(seen["pixels"]), np.uint8).reshape(height, width, 4)[..., 0].astype(int)
    cells = pixels[: height // 12 * 12, : width // 12 * 12].reshape(12, height // 12, 12, width // 12)
    contrast = (cells.max((1, 3)) - cells.min((1, 3))).ravel()
    inside = cells[:, height // 36 : -(height // 36) or None, :, width // 36 : -(width // 36) or None]
    striped = (inside.max((1, 3)) - inside.min((1, 3))).ravel() > 60
    kept = int(seen["legend"].split(" of ")[0])
    assert int((~striped).sum()) == kept and contrast.max() > 60


def test_a_missing_runtime_is_told(folder: Path, site: Path, served: str, tmp_path: Path) -> None:
    (site / "vendor" / "tokenizers.min.mjs").unlink()
    seen = shown(served, flat(tmp_path / "photo.png", 90), (800, 600), tmp_path / "shot.png")
    assert seen["failed"] and "vendor/tokenizers.min.mjs cannot be loaded" in seen["answer"]
    assert "README.md has the commands" in seen["answer"]
