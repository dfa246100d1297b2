"""Generate `runner.py` of an exported folder: the runner's modules merged into one file without other imports."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

from qpcompile import picture
from qpcompile.emit.onnx.runner import (
    answer,
    chat,
    choice,
    command,
    folder,
    inputs,
    layout,
    masks,
    pictures,
    runner,
    sizes,
    tokenizer_rules,
)

# Each part imports from those before it.
PARTS: tuple[ModuleType, ...] = (
    *(folder, choice, inputs, layout, masks, sizes, picture, pictures, tokenizer_rules, chat, runner, answer, command),
)
# In the merged file there is one kind of error: what the package's picture reader raises is the runner's own.
SAME = {"CalibrationError": "RunnerError"}


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
    first, *rest = bodies
    bodies = [first, "\n".join(f"{name} = {own}" for name, own in SAME.items()), *rest]
    text = f'"""{inspect.getdoc(command)}\n"""\n\nfrom __future__ import annotations\n\n'
    return text + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
