"""Generate `qpcompile.js` of an exported folder: the modules of js/ merged into one ES module without imports."""

from __future__ import annotations

import re
from pathlib import Path

# Each part imports from those before it.
PARTS = ("folder", "chance", "choice", "layout", "resize", "pictures", "chat", "model", "answer")
EXPORTED = ("Answer", "Runner", "RunnerError")
_HEAD = re.compile(r"(?://[^\n]*\n)+")
_IMPORT = re.compile(r'^import [^\n]* from "\./[^\n]*\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


def js_text() -> str:
    """The merged source: the last part's comment, which is for users, then everything else in order."""
    *_, last = sources = [source(f"{part}.js") for part in PARTS]
    head = _HEAD.match(last)
    assert head is not None
    bodies = [_EXPORT.sub("", _IMPORT.sub("", each)).strip() for each in (*sources[:-1], last[head.end() :])]
    return "\n\n".join([head[0].strip(), *bodies, f"export {{ {', '.join(EXPORTED)} }};"]) + "\n"


def source(name: str) -> str:
    """A file of js/."""
    return (Path(__file__).parent / "js" / name).read_text("utf-8")
