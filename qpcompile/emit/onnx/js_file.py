"""Write what an exported folder has for JavaScript.

qpcompile.js            the modules of js/ merged into one ES module without imports, for node and browsers
index.html, worker.js   a page that asks the folder in a browser, copied from page/
package.json            not in the manifest: npm rewrites it
"""

from __future__ import annotations

import re
from pathlib import Path

MODULE, PAGE, PACKAGE = "qpcompile.js", ("index.html", "worker.js"), "package.json"
# Each part imports from those before it.
PARTS = ("folder", "chance", "choice", "layout", "resize", "pictures", "chat", "model", "answer")
EXPORTED = ("Answer", "Runner", "RunnerError")
_HERE = Path(__file__).parent
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


def write_js(folder: Path) -> None:
    """Write the module, the page, and for node what says that .js files are ES modules, whatever lies above."""
    (folder / PACKAGE).write_text('{ "private": true, "type": "module" }\n', "utf-8")
    (folder / MODULE).write_text(js_text(), "utf-8")
    for name in PAGE:
        (folder / name).write_text((_HERE / "page" / name).read_text("utf-8"), "utf-8")


def source(name: str) -> str:
    """A module of js/."""
    return (_HERE / "js" / name).read_text("utf-8")
