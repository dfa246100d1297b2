"""The documentation site builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOADED = re.compile(
    r"<(?:script|img|iframe|source|link(?![^>]*rel=\"?canonical))[^>]*?(?:src|href)=\"?(?:https?:)?//", re.I
)


def test_what_is_loaded_from_elsewhere_is_seen() -> None:
    assert LOADED.search('<script src="https://a.b/c.js">') and LOADED.search(
        '<link rel="stylesheet" href="//a.b/c.css">'
    )
    assert not LOADED.search('<a href="https://a.b">') and not LOADED.search('<img src="graphs/a.svg">')


@pytest.mark.slow
def test_site_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra `site`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(path.relative_to(tmp_path / "site")): path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    for name in ("quickstart", "choosing", "deploying", "graphs", "api", "glossary", "results/index"):
        assert f"{name}.html" in pages
    assert [name for name, page in pages.items() if LOADED.search(page)] == []
    # Of the hook: a source that a page links to, a notebook, and text in a folded element.
    assert "source/qpcompile/recipe/plan.py.html" in pages["glossary.html"]
    assert "class Plan" in re.sub(r"<[^>]+>", "", pages["source/qpcompile/recipe/plan.py.html"])
    assert "Save, load, report" in pages["notebooks/from_checkpoint_to_answer.html"]
    assert "<summary>Printed text</summary>" in pages["graphs.html"] and "```" not in pages["graphs.html"]
    assert "Raises CalibrationError" in pages["api.html"]
