"""A compiled model in a few lines, for a terminal and for a notebook."""

from __future__ import annotations

from xml.etree import ElementTree

from qpcompile.compiled import CompiledVLM
from qpcompile.inspect.summary import as_html, as_text


def test_text(compiled: CompiledVLM) -> None:
    lines = repr(compiled).splitlines()
    assert lines[0] == "CompiledVLM"
    told = {line[2:33].strip(): line[33:] for line in lines[1:]}
    assert told["model"] == "LlavaForConditionalGeneration, 3 decoder layers"
    assert told["type and device"] == "float32 on cpu"
    assert told["weights"] == "4 bits per channel, rtn"
    first, second = told["visual tokens kept"].split(", ")
    assert first.endswith("% after layer 0") and second == "30.0% after layer 1"
    assert told["agreement with full precision"].startswith(("good", "fair", "poor"))


def test_html_is_the_same_and_nothing_in_it_is_markup(compiled: CompiledVLM) -> None:
    table = ElementTree.fromstring(compiled._repr_html_())
    cells = [("".join(row[0].itertext()), "".join(row[1].itertext())) for row in table.iter("tr")]
    assert as_text(cells) == repr(compiled)
    assert "&lt;b&gt;" in as_html([("name", "<b>")])
