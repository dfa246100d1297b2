"""Generate `runner.py` of an exported folder: the runner's modules merged into one file without other imports."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

from qpcompile.emit.onnx.runner import choice as onnx_choice
from qpcompile.emit.onnx.runner import folder as onnx_folder
from qpcompile.emit.onnx.runner import inputs as onnx_inputs
from qpcompile.emit.onnx.runner import layout as onnx_layout
from qpcompile.emit.onnx.runner import runner as onnx_runner

# Each part imports from those before it.
PARTS: tuple[ModuleType, ...] = (onnx_folder, onnx_choice, onnx_inputs, onnx_layout, onnx_runner)


def runner_text() -> str:
    """The merged source: one docstring, the imports, then everything else in order."""
    imports: set[str] = set()
    bodies: list[str] = []
    for part in PARTS:
        source = inspect.getsource(part)
        heads = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in heads:
            home = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if home != "__future__" and not home.startswith("qpcompile"):
                imports.add(ast.unparse(node))
        bodies.append("\n".join(source.splitlines()[heads[-1].end_lineno :]).strip())
    text = f'"""{inspect.getdoc(onnx_runner)}\n"""\n\nfrom __future__ import annotations\n\n'
    return text + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
