"""What the site needs beyond Markdown pages (mkdocs.yml): sources that pages link to, and notebooks.

Pages link to files of the repository with relative paths, as they must where the repository is browsed. The site has no
address to send readers to, so each such file becomes a page of the site below source/. A link to anything else outside
docs/, such as a folder, becomes its text.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SOURCE = "source/"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_HEAD = "---\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook, and for every file outside docs/ that a page links to."""
    docs = Path(config.docs_dir)
    for notebook in [each for each in files if each.src_uri.endswith(".ipynb")]:
        text = notebook_page((docs / notebook.src_uri).read_text(encoding="utf-8"))
        files.append(File.generated(config, posixpath.splitext(notebook.src_uri)[0] + ".md", content=text))
    pages = [(f"docs/{page.src_uri}", page.content_string) for page in files.documentation_pages()]
    while pages:
        place, text = pages.pop()
        for path in sorted(linked(place, text)):
            if (uri := source_uri(path)) is None or not (docs.parent / path).is_file() or uri in files.src_uris:
                continue
            content = (docs.parent / path).read_text(encoding="utf-8")
            # Sources that Markdown files outside docs/ link to are pages too.
            pages += [(path, content)] if path.endswith(".md") else []
            files.append(File.generated(config, uri, content=source_page(path, content)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to the pages made above, or nowhere."""
    uri = page.file.src_uri
    own = uri.removeprefix(SOURCE) if uri.startswith(SOURCE) else f"docs/{uri}"
    folder = posixpath.dirname(uri)

    def led(match: re.Match[str]) -> str:
        picture, text, target, heading = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
        there = site_uri(path)
        if there is None or (found := files.get_file_from_path(there)) is None:
            return text
        if text == target and found.is_documentation_page():
            # In the repository a page is named after its file, here after its heading.
            text = title(found.content_string) or text
        return f"{picture}[{text}]({posixpath.relpath(there, folder)}{heading})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(led, part) for part in parts)


def linked(place: str, text: str) -> set[str]:
    """Paths in the repository that a Markdown file links to; `place` is its own."""
    folder = posixpath.dirname(place)
    return {posixpath.normpath(posixpath.join(folder, match[3])) for match in _LINK.finditer(text)}


def site_uri(path: str) -> str | None:
    """Where the site has a file of the repository; None for what is not below it."""
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return inside.removesuffix(".ipynb") + ".md" if inside.endswith(".ipynb") else inside
    return source_uri(path)


def title(page: str) -> str:
    """The first heading of a page; empty without one."""
    heading = re.search(r"^# (.+)$", page, re.MULTILINE)
    return heading[1] if heading else ""


def source_uri(path: str) -> str | None:
    """The page of a file outside docs/; None for a file of docs/, and for what is outside the repository."""
    if path.startswith(("docs/", "../")):
        return None
    return f"{SOURCE}{path}" if path.endswith(".md") else f"{SOURCE}{path}.md"


def source_page(path: str, content: str) -> str:
    """A source file as a page; a Markdown file as it is."""
    if path.endswith(".md"):
        return content
    return f"{_HEAD.format(name=path)}```{Path(path).suffix.removeprefix('.')}\n{content.rstrip()}\n```\n"


def notebook_page(text: str) -> str:
    """A notebook as Markdown: its text, its code, and the outputs that it was committed with."""
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [shown for output in cell["outputs"] if (shown := output_text(output))]
    return "\n\n".join(parts) + "\n"


def output_text(output: dict[str, Any]) -> str:
    """One output of a cell: HTML or a drawing as it is, else text; progress on stderr is left out."""
    if output["output_type"] == "stream":
        return "" if output["name"] == "stderr" else _fenced("".join(output["text"]))
    data = output.get("data", {})
    for kind in ("image/svg+xml", "text/html"):
        if kind in data:
            # On one line: an empty line would end the element.
            return f'<div class="output">{" ".join("".join(data[kind]).split())}</div>'
    return _fenced("".join(data["text/plain"])) if "text/plain" in data else ""


def _fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"
