"""The structure of the tree: imports go in one direction, files are short and have telling names."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("qpcompile", "passes", "kernels")
MOST_LINES = 400
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "base"}

# In the order data flows: a module imports from earlier rows and from its own cell only.
LEVELS: tuple[tuple[frozenset[str], ...], ...] = (
    (
        frozenset(
            (
                "errors",
                "write_errors",
                "claims",
                "files",
                "nested",
                "picture",
                "progress",
                "ranks",
                "special_tokens",
                "stages",
                "torchrun",
                "versions",
            )
        ),
    ),
    (frozenset({"recipe"}),),
    (frozenset({"kernels"}),),
    (frozenset({"ir"}),),
    (frozenset({"runtime"}),),
    (frozenset({"calibration"}),),
    (frozenset({"quantization"}), frozenset({"pruning"}), frozenset({"quality"})),
    (frozenset({"passes"}), frozenset({"capture"}), frozenset({"emit"})),
    (frozenset({"pass_list"}),),
    (frozenset({"inspect"}),),
    (frozenset({"hub"}),),
    (frozenset({"compiled"}),),
    (frozenset({"pipeline"}),),
    (frozenset({"evaluate"}), frozenset({"serve"})),
    (frozenset({"cli", "__init__", "__main__"}),),
)
PLACE = {name: (level, cell) for level, row in enumerate(LEVELS) for cell in row for name in cell}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import: also in functions, for type checkers and by `import_module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            yield from ((node.lineno, str(each.value)) for each in node.args if _is_text(each))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_text(node: ast.expr) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def dotted(path: Path) -> str:
    """The module that a source file is, given relative to the root."""
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return ".".join(parts if parts[0] == "qpcompile" else ["qpcompile", *parts])


def circle(sources: Mapping[Path, str]) -> list[str]:
    """The modules of an import cycle; empty if there is none."""
    modules = {dotted(path): source for path, source in sources.items()}
    graph = {name: _known(modules, imported(source)) - {name} for name, source in modules.items()}
    # The package's own file re-exports names and is imported by all; it defines nothing.
    graph.pop("qpcompile", None)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def _known(modules: Iterable[str], found: Iterable[tuple[int, str]]) -> set[str]:
    """The modules that are imported: `a.b` for `a.b` and for `a.b.name`."""
    names = {part for _, name in found for part in (name, name.rpartition(".")[0])}
    return names & set(modules) - {"qpcompile"}


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


def test_no_module_imports_itself_through_others() -> None:
    assert circle({path: (ROOT / path).read_text("utf-8") for path in files(*SOURCE)}) == []


@pytest.mark.parametrize(
    "back",
    [
        "from qpcompile.ir.a import x",
        "from qpcompile.ir import a",
        "def f():\n    import qpcompile.ir.a",
        "import importlib\nimportlib.import_module('qpcompile.ir.a')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from qpcompile.ir.a import x",
    ],
)
def test_a_circle_is_seen(back: str) -> None:
    forth = "from qpcompile.ir.b import y"
    found = circle({Path("qpcompile/ir/a.py"): forth, Path("qpcompile/ir/b.py"): back})
    assert set(found) == {"qpcompile.ir.a", "qpcompile.ir.b"}
    assert circle({Path("qpcompile/ir/a.py"): forth, Path("qpcompile/ir/b.py"): "import torch"}) == []


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
        (
            "qpcompile/errors.py",
            "from qpcompile.recipe.recipe import Recipe",
            "errors must not import qpcompile.recipe.recipe",
        ),
        ("qpcompile/emit/pickled.py", "importlib.import_module('qpcompile.compiled')", "emit must not import"),
        ("qpcompile/ir/edit.py", "def f():\n    import qpcompile.passes.calibrate", "ir must not import"),
        ("passes/calibrate.py", "from qpcompile.capture.trace import trace", "passes must not import"),
        ("passes/calibrate.py", "from kernels.hadamard import op", "write it as qpcompile."),
        ("passes/calibrate.py", "from . import other", "write it as qpcompile."),
        ("qpcompile/emit/onnx/export.py", "from qpcompile import compile", "emit must not import qpcompile.compile"),
        ("qpcompile/emit/onnx/export.py", "from qpcompile import pipeline", "emit must not import qpcompile.pipeline"),
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
        ("qpcompile/cli/main.py", "from qpcompile import compile, pipeline\nimport qpcompile.evaluate.table"),
        (
            "passes/calibrate.py",
            "from qpcompile.passes.plan import x\nfrom qpcompile.ir.node_facts import y\nimport torch",
        ),
        ("kernels/hadamard/op.py", "from qpcompile.kernels.hadamard.reference import f\nfrom qpcompile import errors"),
        ("qpcompile/recipe/recipe.py", "from qpcompile.recipe.quantize import Section"),
    ],
)
def test_a_right_arrow_is_let_through(path: str, source: str) -> None:
    assert broken_arrows(Path(path), source) == []
