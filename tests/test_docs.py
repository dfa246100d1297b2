"""The documentation: generated pages are up to date, links and paths exist, every error is explained."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qpcompile import errors
from qpcompile.inspect.tables import pass_purposes

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINKING = [
    *PAGES,
    *sorted(ROOT.glob("*.md")),
    *sorted((DOCS / "results").glob("*.md")),
    *sorted(ROOT.glob("tests/*/*.md")),
]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/generate.py as a module; docs is not a package."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipe_reference_is_what_the_schema_says(generator: ModuleType) -> None:
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == generator.recipe_page(), "run `make docs`"


def test_architecture_shows_the_stages_of_the_code(generator: ModuleType) -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert page == generator.architecture_page(page), "run `make docs`"
    assert "─► widen_sums" in page and "`rope`" in page


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-") for line in text.splitlines()
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        assert not path or "://" in target or (page.parent / path).exists(), target
        assert path or heading in headings, target


def test_index_lists_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES} - {"README.md"} == set(re.findall(r"^\| \[(\S+)\]", index, re.MULTILINE))


def test_the_contributors_table_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:qpcompile|passes|kernels|tests)/[^`]*)`", text.partition("## Where to look")[2])
    missing = [path for path in named if not list(ROOT.glob(re.sub(r"<\w+>", "*", path)))]
    assert len(named) > 20 and not missing


@pytest.mark.slow
def test_the_first_example_runs(tmp_path: Path) -> None:
    """README's Python block as it is, but for the output folder: the printed answer is the one in its comment."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace('"out"', repr(str(tmp_path / "out")))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [code.rpartition("# ")[2].strip()]


def test_every_error_is_explained() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    names = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == names - {"QPCompileError"}


def test_every_pass_and_operator_is_named() -> None:
    architecture, graphs = ((DOCS / name).read_text(encoding="utf-8") for name in ("architecture.md", "graphs.md"))
    for name in pass_purposes():
        assert name in architecture and re.search(rf"^### \d+\. {name}$", graphs, re.MULTILINE)
    numerics = (DOCS / "numerics.md").read_text(encoding="utf-8")
    operators = {path.name for path in (ROOT / "kernels").iterdir() if (path / "op.py").is_file()}
    assert {name for name in operators - {"quant_stub"} if f"`{name}`" not in numerics} == set()


def misplaced(docstring: str) -> list[str]:
    """Lines of an `Args:` block that neither begin an argument nor are indented below one."""
    _, found, block = docstring.partition("Args:\n")
    lines = block.split("\n\n")[0].splitlines() if found else []
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    inside = list(itertools.takewhile(lambda line: line[:indent].isspace(), lines))
    inside = [line for line in inside if not line[indent:].startswith(" ")]
    return [line.strip() for line in inside if not re.match(r"\s+[\w, *]+: ", line)]


def test_arguments_are_described_one_by_one() -> None:
    wrong = []
    for folder in ("qpcompile", "passes", "kernels", "demo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    wrong += [f"{path.name}, {node.name}: {line}" for line in misplaced(ast.get_docstring(node) or "")]
    assert not wrong, "\n".join(wrong)


def test_a_misplaced_line_is_seen() -> None:
    assert misplaced("Do.\n\nArgs:\n    a: one.\n        more\n    b: two.\nReturns:\n    three.") == []
    assert misplaced("Do.\n\nArgs:\n    a: one.\n    more. b: two.") == ["more. b: two."]
