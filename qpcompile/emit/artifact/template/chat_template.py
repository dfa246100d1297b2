"""Static analysis of chat templates: Jinja programs are accepted only if their work is provably bounded.

Jinja's sandbox isolates a template from Python, but does not bound its time and memory. Here the syntax tree is
interpreted abstractly, without running it. Every value has a size: of text its length, of a number its magnitude, of
caller inputs `GIVEN`. Loops multiply, concatenations add, and loop-carried values may only grow additively. Anything
without a rule is refused: Jinja has many ways to write 10**9 spaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2 import nodes as jinja
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from qpcompile.emit.artifact.folder import AGAIN, read_json, read_text
from qpcompile.emit.artifact.template.sizes import TemplateWalk, Unbounded
from qpcompile.errors import ArtifactError, ExportError

MOST_CHARACTERS = 100_000
TEMPLATE = "chat_template"


class _Generation(Extension):
    """`{% generation %}` of transformers, which marks assistant text and has no other effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_templates(folder: Path, files: list[str]) -> None:
    """Refuse templates whose work is not bounded. Raises ArtifactError naming the file and the line."""
    for path in files:
        for text in _templates(folder, path):
            check_template(text, path)


def check_template(text: str, where: str) -> None:
    """Refuse one template whose work is not bounded; `where` names its file."""
    if len(text) > MOST_CHARACTERS:
        raise _refused(f"it has {len(text)} characters, {MOST_CHARACTERS} are read", where)
    try:
        TemplateWalk().run(Environment(extensions=[_Generation, loopcontrols]).parse(text))
    except Unbounded as error:
        raise _refused(f"line {error.line}: {error}", where) from error
    except (TemplateError, RecursionError, ValueError, OverflowError) as error:
        raise _refused(f"it is not a template: {type(error).__name__}: {str(error)[:200]}", where) from error


def check_processor(processor: Any) -> None:
    """Refuse a processor whose template no artifact may contain, before any work. Raises ExportError."""
    for part in (processor, getattr(processor, "tokenizer", None)):
        for text in _texts_of({TEMPLATE: getattr(part, TEMPLATE, None)}):
            try:
                check_template(text, type(part).__name__)
            except ArtifactError as error:
                raise ExportError(
                    f"{error.what}; no artifact may hold it",
                    where=error.where,
                    do=f"set {TEMPLATE} of the {type(part).__name__} to a simpler one: without tools, say",
                ) from error


def _templates(folder: Path, path: str) -> Iterator[str]:
    if path.endswith(".jinja"):
        yield read_text(folder / path)
    elif path.endswith(".json") and "/" not in path:
        yield from _texts_of(read_json(folder / path))


def _texts_of(data: Any) -> Iterator[str]:
    """Templates in settings: a text, texts by name, or a list of names and texts."""
    held = data.get(TEMPLATE) if isinstance(data, dict) else None
    found = (
        [item.get("template") if isinstance(item, dict) else item for item in held] if isinstance(held, list) else held
    )
    for text in found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]:
        if isinstance(text, str):
            yield text


def _refused(what: str, where: str) -> ArtifactError:
    return ArtifactError(f"the chat template cannot be used: {what}", where=where, do=AGAIN)
