"""The tree keeps its promises: imports point one way, files are short and say what they hold."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("qpcompile", "passes", "kernels")
MOST_LINES = 400
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "base"}

# From left to right in the architecture: a module imports from earlier rows and from its own cell, nothing else.
LEVELS: tuple[tuple[frozenset[str], ...], ...] = (
    (frozenset({"errors", "write_errors", "claims", "files", "progress", "versions"}),),
    (frozenset({"recipe", "recipe_schema", "token_scheme", "plan", "yaml_text", "schema_text"}),),
    (frozenset({"kernels"}),),
    (frozenset({"ir"}),),
    (frozenset({"passes"}), frozenset({"capture"}), frozenset({"emit"})),
    (frozenset({"pipeline"}),),
    (frozenset({"inspect"}), frozenset({"evaluate"}), frozenset({"doctor", "dry_run", "probes"})),
    (frozenset({"__init__", "__main__", "cli", "terminal"}),),
)
PLACE = {name: (level, cell) for level, row in enumerate(LEVELS) for cell in row for name in cell}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            module = dots + (node.module or "")
            if module == "qpcompile" or node.module is None:
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def unit(path: Path) -> str:
    """The name in the table of a source file, given relative to the root."""
    parts = path.with_suffix("").parts
    return parts[1] if parts[0] == "qpcompile" else parts[0]


def broken_arrows(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of one source file (path relative to the root)."""
    own = unit(path)
    if own not in PLACE:
        return [f"{path}: {own} is not in the table of levels; add it where it belongs"]
    level, cell = PLACE[own]
    wrong = []
    for line, module in imported(source):
        head, *rest = module.split(".")
        if head in ("", "passes", "kernels"):
            wrong.append(f"{path}:{line}: {module}: write it as qpcompile.<...>")
        if head != "qpcompile":
            continue
        # `from qpcompile import compile` and `import qpcompile` mean the package's own file.
        target = rest[0] if rest and rest[0] in PLACE else "__init__"
        if target not in cell and PLACE[target][0] >= level:
            wrong.append(f"{path}:{line}: {own} must not import {module}")
    return wrong


def files(*folders: str) -> list[Path]:
    """Python files below top-level folders, relative to the root; links are not followed."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_imports_point_one_way() -> None:
    wrong = [line for path in files(*SOURCE) for line in broken_arrows(path, (ROOT / path).read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


def test_links_lead_to_the_top_level_folders() -> None:
    for name in ("passes", "kernels"):
        link = ROOT / "qpcompile" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name


def test_no_package_files_where_links_need_none() -> None:
    assert not [path for path in files("passes", "kernels", "tests") if path.name == "__init__.py"]


def test_file_names_say_what_they_hold() -> None:
    assert not [path for path in files(*SOURCE, "tests", "docs") if path.stem in VAGUE]


def test_files_stay_short() -> None:
    long = [
        path
        for path in files(*SOURCE, "tests", "docs")
        if len((ROOT / path).read_text("utf-8").splitlines()) > MOST_LINES
    ]
    assert not long


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("qpcompile/errors.py", "from qpcompile.recipe import Recipe", "errors must not import qpcompile.recipe"),
        ("qpcompile/ir/edit.py", "def f():\n    import qpcompile.passes.calibrate", "ir must not import"),
        ("passes/calibrate.py", "from qpcompile.capture.trace import trace", "passes must not import"),
        ("passes/calibrate.py", "from kernels.hadamard import op", "write it as qpcompile."),
        ("passes/calibrate.py", "from . import other", "write it as qpcompile."),
        ("qpcompile/emit/onnx.py", "from qpcompile import compile", "emit must not import qpcompile.compile"),
        ("qpcompile/emit/onnx.py", "from qpcompile import pipeline", "emit must not import qpcompile.pipeline"),
        ("qpcompile/inspect/report.py", "import qpcompile.evaluate.table", "inspect must not import"),
        ("qpcompile/novel.py", "", "novel is not in the table"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, source: str, wrong: str) -> None:
    found = broken_arrows(Path(path), source)
    assert len(found) == 1 and wrong in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("qpcompile/cli.py", "from qpcompile import compile, pipeline\nimport qpcompile.evaluate.table"),
        ("passes/calibrate.py", "from qpcompile.passes.plan import x\nfrom qpcompile.ir.facts import y\nimport torch"),
        ("kernels/hadamard/op.py", "from qpcompile.kernels.hadamard.reference import f\nfrom qpcompile import errors"),
        ("qpcompile/recipe.py", "from qpcompile.recipe_schema import Section"),
    ],
)
def test_a_right_arrow_is_let_through(path: str, source: str) -> None:
    assert broken_arrows(Path(path), source) == []
