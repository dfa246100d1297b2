"""Writes what is derived from the code in docs/.

    recipe.md                        from the schema
    the picture of architecture.md   from the passes' stages and the operators' records
    graphs.md                        from a real compile

python docs/generate.py            all
python docs/generate.py recipe     one of recipe, architecture, graphs
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qpcompile.capture.capture import capture
from qpcompile.capture.load import load_model
from qpcompile.capture.samples import Samples
from qpcompile.inspect.graph_svg import layer_svg
from qpcompile.inspect.layer_nodes import layer_text
from qpcompile.inspect.tables import pass_purposes
from qpcompile.ir.operators import SPECS
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.ir.text import graph_text
from qpcompile.pass_list import passes
from qpcompile.pruning.pruner import Configurable
from qpcompile.pruning.table import PRUNERS
from qpcompile.recipe.choices import METHODS, SOLVERS
from qpcompile.recipe.messages import numeral
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe, preset_names
from qpcompile.stages import STAGES, Stage

DOCS = Path(__file__).resolve().parent
TESTBED = DOCS.parent / "tests" / "testbed"
NOTE = "<!-- Written by docs/generate.py: change the code it comes from, then run `make docs`. -->"

# The gallery shows the layer after the one cut of this recipe.
GALLERY = ("tokens.candidate_layers=[2]", "calibration.samples=4")
LAYER = "layers.3"

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}

RECIPE_HEAD = f"""{NOTE}

# Recipe reference

A recipe is one YAML file. Every key is optional; unknown keys, wrong types and impossible values are refused before
anything is loaded, in one error that names each key. `--set tokens.keep=0.5` on the command line, or
`Recipe.load("quota-30").with_overrides(["tokens.keep=0.5"])` in Python, changes single keys of a preset.

Files are read with limits, since they may come from anyone: 65,536 bytes, 16 levels, values of 1,000 characters;
anchors, aliases, merge keys and tags are refused. Numbers are bounded where more asks for what no machine computes or
no number type holds.
"""

DECODE_HEAD = """The same layer in the decode graph after the last pass is eight operators: two norms with their
quantizers, four products, one gate, and one for the new token's attention. In prefill attention is three: the write of
the cache, attention, and the quantizer of its result. `tests/test_layer_operators.py` counts them for every family."""
GRAPHS_HEAD = f"""{NOTE}

# Graph inspection

Decoder layer 3 of the LLaVA testbed in the prefill graph, compiled by `quota-30` with one cut, after layer 2, so that
the cut is seen in this layer.

## Before and after

As `torch.export` traced it:

![{LAYER} as it was captured](graphs/00-captured.svg)

As it runs: projections are merged 4-bit products, tokens are selected once, norms and activations write the codes that
the next product reads.

![{LAYER} as it is compiled](graphs/LAST)

Orange boxes are `qpcompile::` operators, blue ones other products; dashed boxes are values computed outside the layer.
Names in italics are the modules whose weights are read; what other layers read, or the graph returns, *leaves*. The
drawings (`qpcompile/inspect/outline.py`) leave out what only moves values: views, casts, and the arithmetic of indices
and masks.

## Pass by pass

Every pass that changes the layer, with its drawing. The folded text is this layer's part of the printed graph
(`qpcompile/ir/text.py`) with nothing left out, which `CompiledVLM.graph_text("prefill")` and `qpcompile inspect` give
for any compiled model; `B` is the batch and `S0`, `S1`, ... are the other symbolic sizes.
"""


PICTURE_HEAD = """\
 transformers VLM      recipe (YAML)      calibration samples
        │                   │                      │
        ▼                   ▼                      ▼
 capture: one small generate() is recorded, each component is traced     qpcompile/capture/
        │
        ▼
 Program: vision │ projector │ prefill │ decode │ head │ embed, and the host: what transformers does between them
        │
        ▼
"""
PICTURE_TAIL = """\
        │           the program is verified after every pass
        ▼
 CompiledVLM ─► generate()          transformers' own generation loop around the graphs
        │ ────► save_pretrained()   artifact folder: safetensors and text, hashes checked on load
        │ ────► export_onnx()       graphs for onnxruntime and a runner without torch
        └ ────► report()            one HTML file
"""


def architecture_page(page: str) -> str:
    """docs/architecture.md, given as it is, with its generated parts replaced."""
    for name, text in (("picture", _picture()), ("operators", _operators_by_stage())):
        begin, end = f"<!-- {name}: written by docs/generate.py -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{text}{end}{rest.partition(end)[2]}"
    return page


def _picture() -> str:
    """From a model to its artifacts; in the middle each pass at the stage where it runs."""
    lines, stage = list[str](), ""
    now: Stage = STAGES[0]
    for item in passes((), 0):
        shown = now if now != stage else ""
        reads = "  ◄── samples" if hasattr(item, "samples") else ""
        lines.append(f" {shown:<12}─► {item.name:<20}{reads}".rstrip())
        stage, now = now, item.gives
    middle = "\n".join([*lines, f" {now if now != stage else ''}".rstrip()]).rstrip()
    return f"```text\n{PICTURE_HEAD}{middle}\n{PICTURE_TAIL}```\n"


def _operators_by_stage() -> str:
    """A table of the project's operators by the stage that they come with."""
    rows = ["| stage | operators that graphs may contain from it on |", "| --- | --- |"]
    for stage in STAGES:
        names = [spec.name if spec.until == STAGES[-1] else f"{spec.name} (until {spec.until})" for spec in SPECS]
        come = [f"`{name}`" for name, spec in zip(names, SPECS, strict=True) if spec.since == stage]
        rows += [f"| {stage} | {', '.join(come)} |"] if come else []
    return "\n".join(rows) + "\n"


def recipe_page() -> str:
    """docs/recipe.md: a table per section, the values that are files, and the presets."""
    parts = [RECIPE_HEAD, *_sections("", Recipe)]
    parts += _named_files("Pruning methods", "tokens.method", METHODS, "pruning.methods")
    for name, method in PRUNERS.items():
        if isinstance(method, Configurable):
            parts += _sections(f"tokens.options of {name}", method.options)
    parts += _named_files("Weight solvers", "quantize.weights.solver", SOLVERS, "quantization.solvers")
    parts.append("## Presets\n")
    for name in preset_names():
        text = (resources.files("qpcompile.recipe") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
        parts.append(f"### `{name}`\n\n```yaml\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _named_files(title: str, key: str, names: Sequence[str], folder: str) -> list[str]:
    """A table of the values of a key and the first sentence of their files."""
    modules = {name: import_module(f"qpcompile.{folder}.{name}") for name in names}
    rows = [f"| `{name}` | {_first_sentence(module)} |" for name, module in modules.items()]
    return [f"## {title}\n\nValues of `{key}`.\n\n| value | what it does |\n| --- | --- |", *rows, ""]


def _first_sentence(module: ModuleType) -> str:
    """Of the module's docstring: up to the first full stop, on one line."""
    first = (module.__doc__ or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(first.split()))[0]


def graph_pages() -> dict[str, str]:
    """docs/graphs.md and the drawings beside it, by file name."""
    stages, decode = _stages(Recipe.load("quota-30").with_overrides(GALLERY))
    purposes = pass_purposes() | {"captured": "As `torch.export` traced it, before the first pass."}
    files: dict[str, str] = {}
    parts, before, last = list[str](), "", ""
    for number, (name, now, svg) in enumerate(stages):
        parts.append(f"### {number}. {name}\n\n{purposes[name]}\n" if number else f"### {name}\n\n{purposes[name]}\n")
        if _renumbered(now) == before:
            parts.append("The layer's graph is as before.\n")
        else:
            last = f"{number:02d}-{name}.svg"
            files[f"graphs/{last}"] = svg
            parts.append(f"![{LAYER} after {name}](graphs/{last})\n")
            parts.append(f"<details><summary>Printed text</summary>\n\n```text\n{now}```\n\n</details>\n")
        before = _renumbered(now)
    parts.append(f"## In decode\n\n{DECODE_HEAD}\n")
    parts.append(f"![{LAYER} in decode](graphs/decode.svg)\n")
    parts.append(f"<details><summary>Printed text</summary>\n\n```text\n{decode[0]}```\n\n</details>\n")
    files["graphs/decode.svg"] = decode[1]
    return {"graphs.md": "\n".join([GRAPHS_HEAD.replace("LAST", last), *parts]), **files}


def _stages(recipe: Recipe) -> tuple[list[tuple[str, str, str]], tuple[str, str]]:
    """(pass, printed layer after it, drawing) of a compile of the LLaVA testbed, the captured graph first.

    Then the same of the layer in decode, as it is compiled.
    """
    model, processor = load_model(TESTBED / "llava")
    samples = Samples(TESTBED / "calibration" / "llava", processor, recipe.calibration.samples, recipe.calibration.seed)
    program = capture(model, next(iter(samples)), recipe)
    layers = program.layers
    program.plan = Plan(recipe=recipe, layers=layers)
    found: list[tuple[str, str, str]] = []

    def keep(name: str, program: Program) -> None:
        graph = program.graphs[PREFILL]
        found.append((name, layer_text(graph_text(graph), LAYER), layer_svg(graph, LAYER, outline=True)))

    keep("captured", program)
    run_passes(program, passes(samples, len(samples)), lambda step, program: keep(step.name, program))
    decode = program.graphs[DECODE]
    return found, (layer_text(graph_text(decode), LAYER), layer_svg(decode, LAYER, outline=True))


def _renumbered(text: str) -> str:
    """The text with its values numbered from 0: equal for a layer that did not change while others did."""
    names: dict[str, str] = {}
    return re.sub(r"%\d+", lambda match: names.setdefault(match[0], f"%{len(names)}"), text)


def _sections(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    """The table of one section, then those of the sections below it."""
    yield f"## {f'`{prefix}`' if prefix else 'Top level'}\n"
    if prefix:
        yield f"{(section.__doc__ or '').strip()}\n"
    yield "| key | value | default | meaning |\n| --- | --- | --- | --- |"
    below: list[tuple[str, type[BaseModel]]] = []
    for key, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        path = f"{prefix}.{key}" if prefix else key
        if inner is not None:
            below.append((path, inner))
            null = " or null" if NoneType in get_args(field.annotation) else ""
            yield f"| `{key}` | [section](#{path.replace('.', '')}){null} | {_default(field)} | {field.description} |"
        else:
            yield f"| `{key}` | {_values(field)} | {_default(field)} | {field.description} |"
    yield ""
    for path, inner in below:
        yield from _sections(path, inner)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) or (annotation,)
    return next((item for item in options if isinstance(item, type) and issubclass(item, BaseModel)), None)


def _values(field: FieldInfo) -> str:
    """Type and bounds of a key: `number, > 0, ≤ 1`."""
    bounds = [
        f"{sign} {numeral(getattr(item, name))}"
        for item in field.metadata
        for name, sign in SIGNS.items()
        if hasattr(item, name)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _type(inner[0])
    if kind is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if kind in (Union, UnionType):
        return " or ".join(_type(item) for item in inner)
    if kind is tuple:
        return (
            f"list of {_type(inner[0])}" if inner[-1] is Ellipsis else f"[{', '.join(_type(item) for item in inner)}]"
        )
    return NAMES[annotation]


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def main(which: list[str]) -> None:
    """Write the pages named in `which`, or all."""
    if not which or "recipe" in which:
        (DOCS / "recipe.md").write_text(recipe_page(), encoding="utf-8")
    if not which or "architecture" in which:
        page = (DOCS / "architecture.md").read_text(encoding="utf-8")
        (DOCS / "architecture.md").write_text(architecture_page(page), encoding="utf-8")
    if not which or "graphs" in which:
        shutil.rmtree(DOCS / "graphs", ignore_errors=True)
        (DOCS / "graphs").mkdir()
        for name, text in graph_pages().items():
            (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
