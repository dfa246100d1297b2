"""The page: complete, and self-contained."""

from __future__ import annotations

import os
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from qpcompile.compiled import CompiledVLM
from qpcompile.errors import OutputError
from qpcompile.ir.measurements import Measurements
from qpcompile.ir.pass_manager import PASS_RUNS
from qpcompile.ir.program import Program
from qpcompile.quality.verdict import verdict

VOID = {"meta", "br", "img", "link", "hr", "image"}


class Page(HTMLParser):
    """Collects identifiers and links, and checks that elements are nested correctly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for key in ("href", "src", "xlink:href") if (value := values.get(key))]
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(compiled: CompiledVLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of the tiny model with one sample picture."""
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    compiled.report(path, samples=[(Image.new("RGB", (64, 64), "red"), "what is <it>?")])
    assert os.listdir(path.parent) == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    found = Page(page)
    assert not found.open
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in found.links)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", page) and "url(" not in page.replace("url(#", "")


def test_every_decision_is_on_the_page(page: str, compiled: CompiledVLM) -> None:
    plan = compiled.plan
    for site in plan.sites:
        assert f"<code>{site.name}</code>" in page and f"<code>{site.kernel}</code>" in page
    for place in plan.left_out:
        assert place.reason in page
    for step in compiled.program.measured[PASS_RUNS]:
        assert f"<code>{step.name}</code>" in page
    for cut in plan.cuts:
        assert f"{cut.numerator} / {cut.denominator}" in page
    assert "what is &lt;it&gt;?" in page and page.count("<figure>") == len(plan.cuts) + 1
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_verdict_comes_first_and_operator_counts_last(page: str, compiled: CompiledVLM) -> None:
    assert compiled.plan.quality is not None
    order = [page.index(f'id="{name}"') for name in ("answers", "costs", "tokens", "bits", "kernels", "compile")]
    assert (
        page.index(escape(verdict(compiled.plan.quality)[1:]).replace("&#x27;", "&#39;"))
        < page.index('class="tiles"')
        < order[0]
    )
    assert order == sorted(order)
    passes = page.partition('<details id="pipeline">')[2].partition("</details>")[0]
    assert passes.count("<tr>") == len(compiled.program.measured[PASS_RUNS]) + 1
    assert 'class="changes"' in passes and 'class="changes"' not in page.replace(passes, "")
    kernels = page.partition('id="kernels"')[2].partition("<h2")[0]
    assert all(f"<code>{site.kernel}</code>" in kernels for site in compiled.plan.sites)


def test_what_is_cut_away_has_a_border_that_needs_no_colour_of_the_picture(page: str) -> None:
    assert page.count('<path fill="url(#hatch1)"') == page.count('class="rim"') == page.count('class="edge"') > 0
    assert page.count('<pattern id="hatch1"') == 1


def test_without_samples_the_page_says_how_to_get_them(compiled: CompiledVLM, tmp_path: Path) -> None:
    compiled.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No sample pictures were given" in text and "<figure>" not in text


def test_loaded_model_says_what_is_not_known(
    compiled: CompiledVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program: Program = compiled.program
    monkeypatch.setattr(program, "measured", Measurements())
    compiled.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "loaded from an artifact" in text and "<code>fuse_kernels</code>" in text


def test_existing_file_is_refused_and_left_alone(compiled: CompiledVLM, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        compiled.report(path)
    assert path.read_text() == "mine"


def test_interrupted_write_leaves_nothing(
    compiled: CompiledVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qpcompile.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled.report(tmp_path / "new" / "report.html")
    assert os.listdir(tmp_path) == []
