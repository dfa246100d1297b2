"""Export a program as an ONNX folder that answers with onnxruntime, numpy, pillow and tokenizers only.

    vision.onnx     prefill.onnx    decode.onnx   weights.data    the graphs; shared weights are stored once
    tokenizer.json  pictures.json   chat.json                     from questions about pictures to token ids and back
    runner.py       config.json     generation_config.json        the runner and its settings
    qpcompile.js    index.html      worker.js                     the same for JavaScript, and a page
    recipe.yaml     plan.yaml       manifest.json   README.md     options, decisions, list of files, how to use it

The export is deterministic: the same program gives the same bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    InlinePass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import no_op_cast_rule

from qpcompile.emit.manifest_text import sealed
from qpcompile.emit.onnx.check import accepted, compare, float64_operators
from qpcompile.emit.onnx.demands import demands
from qpcompile.emit.onnx.example import SIZES, decode_example, prefill_example, vision_example
from qpcompile.emit.onnx.fast.graphs import AS_MODULE, CHANGES, fast_parts
from qpcompile.emit.onnx.fast.operators import TRANSLATIONS as FAST
from qpcompile.emit.onnx.functions import finish
from qpcompile.emit.onnx.genai import check_settings, opened_by, write_genai
from qpcompile.emit.onnx.js_file import PACKAGE, write_js
from qpcompile.emit.onnx.masks import mask_rules, tables_of
from qpcompile.emit.onnx.readme import readme
from qpcompile.emit.onnx.runner import runner as onnx_runner
from qpcompile.emit.onnx.runner.choice import Choice
from qpcompile.emit.onnx.runner.folder import FORMAT, MANIFEST, VERSION, RunnerError, check_graph
from qpcompile.emit.onnx.runner.masks import MASKS, MaskRule
from qpcompile.emit.onnx.runner_file import runner_text
from qpcompile.emit.onnx.runtimes import GENAI, fast_form, with_functions
from qpcompile.emit.onnx.sized import Sized, by_pictures, sized_pictures, token_tables, write_sizes
from qpcompile.emit.onnx.speech import write_speech
from qpcompile.emit.onnx.translate import aten as onnx_aten
from qpcompile.emit.onnx.translate import aten_picture as onnx_aten_picture
from qpcompile.emit.onnx.translate import aten_select as onnx_aten_select
from qpcompile.emit.onnx.translate import aten_shape as onnx_aten_shape
from qpcompile.emit.onnx.translate.nodes import OPSET, Feeds, results, to_onnx
from qpcompile.emit.onnx.weights import DATA, save_models
from qpcompile.emit.onnx.wrap import EMBEDS, ROWS, Part, language, vision
from qpcompile.errors import ExportError
from qpcompile.files import sha256, staged_folder
from qpcompile.ir.names import Name
from qpcompile.ir.operators import SPECS
from qpcompile.ir.program import DECODE, HEAD, PREFILL, VISION, Program
from qpcompile.kernels.expert_linear.placeholder import split_experts
from qpcompile.kernels.linear_w4a16 import onnx_contrib
from qpcompile.runtime.arguments import input_kinds
from qpcompile.runtime.model_inputs import is_encoder_decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from os import PathLike

    import torch

_log = logging.getLogger(__name__)

# All translations: torch's operators, then this project's own.
TORCH = onnx_aten.table() | onnx_aten_shape.table() | onnx_aten_picture.table() | onnx_aten_select.table()
FORMS = {spec.overload: spec.onnx() for spec in SPECS if spec.onnx is not None}
OWN = {overload: form.translation for overload, form in FORMS.items()}
# No graph holds placeholders of two operators (inputs of all linears have codes, or of none): any order will do.
LOWERINGS = tuple(form.lower for form in FORMS.values() if form.lower is not None)
# Translations convert to the type that they compute in, whatever type a value has: most of these casts do nothing.
CLEAN_UP = (
    RewritePass((no_op_cast_rule,)),
    IdentityEliminationPass(),
    RemoveUnusedNodesPass(),
)
PACKAGES = ("qpcompile", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def export_onnx(
    program: Program,
    folder: str | PathLike[str],
    check: Iterable[dict[str, Any]] = (),
    fast: bool = False,
    generate: Callable[..., Any] | None = None,
    processor: Any = None,
    target: str | None = None,
) -> None:
    """Write the ONNX folder atomically.

    With `processor` the folder takes pictures and questions; where it cannot, a warning and README.md say why, and it
    takes token ids.

    `check`: inputs on which `generate`, of the same program, and the folder are compared; `check.json` records the
    recipe's numerics, how many answers are alike, and the differences. With `fast` the graphs are those of
    emit/onnx/fast/graphs.py, whose numbers differ from the module's.

    `target`: a runtime of emit/onnx/runtimes.py, which chooses the form of the graphs; `check.json` and warnings say
    what the folder has that the runtime lacks.

    Raises OutputError if `folder` exists and ExportError if the model cannot be exported to ONNX, or the runner does
    not support its inputs.
    """
    _check_supported(program)
    _check_settings(program)
    if target == GENAI:
        check_settings(program)
    fast, functions = fast_form(fast, target), with_functions(target)
    batches = list(check)
    with staged_folder(folder) as aside:
        built = build_models(program, fast, batches)
        models = built.models
        for model in models.values():
            finish(model, functions)
        save_models(models, aside)
        for name in models:
            _check_graph(aside / f"{name}.onnx")
        numbers = CHANGES if fast else AS_MODULE[program.recipe.numerics]
        _write_texts(program, aside)
        host: Any = program.host
        if built.masks:
            rules = {name: asdict(rule) for name, rule in built.masks.items()}
            (aside / MASKS).write_text(json.dumps({"masks": rules}) + "\n", encoding="utf-8")
        if built.sizes:
            write_sizes(aside, built.sizes, several=False)
            mute = f"it has a vision graph for each of {len(built.sizes)} sizes of pictures: {built.why}"
        elif built.masks:
            mute = "its decoder takes masks as tables"
        else:
            mute = write_speech(aside, processor, host.config.image_token_id)
        if mute and processor is not None:
            _log.warning("the ONNX folder takes token ids, and no pictures and questions: %s", mute)
        if not mute:
            write_js(aside)
        double = {name: float64_operators(aside / f"{name}.onnx") for name in models}
        (aside / "README.md").write_text(readme(program, [*numbers, _float64(double)], mute, functions), "utf-8")
        if target == GENAI:
            write_genai(program, aside)
        _write_manifest(aside, numbers, double)
        found: dict[str, Any] = {}
        if batches and generate is not None:
            one, more = by_pictures(program, batches) if built.sizes else (batches, [])
            # Codes and kept tokens near a tie may be others in another order of sums; nothing else may.
            unchanged = program.recipe.quantize is None and program.recipe.tokens.method == "none"
            strict = unchanged or bool(built.sizes or built.masks)
            compared = (compare if fast else partial(accepted, strict=strict))(generate, aside, one)
            if more:
                _try_several(generate, aside, built.sizes, more, partial(_write_manifest, aside, numbers, double))
            found |= compared.to_dict(program.recipe.numerics, fast)
        if target is not None:
            found["runtime"] = demands(aside, target)
            if target == GENAI:
                found["runtime"]["opened_by"] = opened_by(aside)
            for problem in found["runtime"]["problems"]:
                _log.warning("%s: %s", target, problem)
        if found:
            (aside / "check.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            _write_manifest(aside, numbers, double)


@dataclass(frozen=True)
class Built:
    """The graphs of a folder by name, and the rules of the decoder's masks; where there is a graph for each size of
    picture, the sizes, and why it is so.
    """

    models: dict[str, ir.Model]
    masks: Mapping[str, MaskRule]
    sizes: Sequence[Sized] = ()
    why: str = ""


def build_models(program: Program, fast: bool = False, samples: Sequence[Mapping[str, Any]] = ()) -> Built:
    """The graphs of a program, all but finished (functions.py): a vision graph for pictures of any size, or one for
    each size among `samples`, inputs of `generate`, where the tower cannot be written otherwise.
    """
    try:
        tower = {VISION: vision(program)}
        _check_inputs(VISION, tower[VISION])
        pictures = [vision_example(program, sizes) for sizes in SIZES]
        models = {} if fast else {VISION: _model(VISION, tower[VISION], pictures, fast)}
    except ExportError as error:
        if not fast and not samples:
            error.do = (
                f"{error.do}; or give `check` inputs with one picture each, of every size that will be asked about"
            )
        if fast or not samples:
            raise
        return _build_sized(program, samples, error.what)
    parts = tower | {name: language(program, name) for name in (PREFILL, DECODE)}
    if fast and (masks := tables_of(program)):
        raise ExportError(
            f"onnxruntime's own attention does not take {', '.join(masks)}",
            where="export_onnx(fast=True)",
            do="export the exact graphs",
        )
    if fast:
        parts = fast_parts(program, parts)
        models = {VISION: _model(VISION, parts[VISION], pictures, fast)}
    masks = mask_rules(program, samples)
    return Built(models | _language_models(program, parts, results(parts[VISION], pictures[0]), fast), masks)


def _build_sized(program: Program, samples: Sequence[Mapping[str, Any]], why: str) -> Built:
    sizes = sized_pictures(program, samples, {*TORCH, *OWN})
    models: dict[str, ir.Model] = {}
    for index, size in enumerate(sizes):
        name = f"{VISION}.{index}" if index else VISION
        models[name] = _model(name, size.part, (size.example, size.example), fast=False)
    said = results(sizes[0].part, sizes[0].example)
    tables = token_tables(program, _per_token_inputs(program))
    parts = {name: language(program, name, list(said), tables) for name in (PREFILL, DECODE)}
    masks = mask_rules(program, samples)
    return Built(models | _language_models(program, parts, said, fast=False), masks, sizes, why)


def _per_token_inputs(program: Program) -> list[str]:
    """Inputs of the decode graph, beside embeddings, that the runner does not know: numbers for each token."""
    graph = program.graphs[DECODE]
    known = (*onnx_runner.LANGUAGE_INPUTS, *tables_of(program), EMBEDS)
    kinds = input_kinds(graph)
    return [
        path
        for path, (dtype, axes) in kinds.items()
        if path not in known and Name(path).root not in onnx_runner.STATE and dtype.is_floating_point and axes > 2
    ]


def _language_models(
    program: Program, parts: Mapping[str, Part], said: Mapping[str, torch.Tensor], fast: bool
) -> dict[str, ir.Model]:
    """Prefill and decode; said: what a vision graph gives."""
    for name in (PREFILL, DECODE):
        _check_inputs(name, parts[name], tables_of(program))
    prompts = [prefill_example(program, sizes, said) for sizes in SIZES]
    models = {PREFILL: _model(PREFILL, parts[PREFILL], prompts, fast)}
    tokens = [decode_example(program, prompt, results(parts[PREFILL], prompt)) for prompt in prompts]
    return models | {DECODE: _model(DECODE, parts[DECODE], tokens, fast)}


def _model(name: str, part: Part, examples: Sequence[Feeds], fast: bool) -> ir.Model:
    model = to_onnx(name, part, (examples[0], examples[1]), (TORCH, OWN | FAST if fast else OWN))
    if fast:
        model.metadata_props[onnx_runner.IN_PLACE] = "past_key_values" if name == DECODE else ""
        (onnx_contrib.lower_few_rows if name == DECODE else onnx_contrib.lower_many_rows)(model)
    split_experts(model)
    if fast:
        # An expert may get no rows, which the operator for many rows does not take.
        onnx_contrib.lower_few_rows(model)
    for lower in LOWERINGS:
        lower(model)
    shapes = [value.shape for value in model.graph.outputs]
    InlinePass()(model)
    # The pass would give a sequence the type of the tensors in it.
    if not any("Sequence" in node.op_type for graph in model.graphs() for node in graph):
        ShapeInferencePass()(model)
    for clean in CLEAN_UP:
        clean(model)
    for value, shape in zip(model.graph.outputs, shapes, strict=True):
        value.shape = shape
    return model


def _check_supported(program: Program) -> None:
    missing = [name for name in (PREFILL, DECODE, HEAD) if name not in program.graphs]
    if missing:
        raise ExportError(
            f"the program has no {', '.join(missing)} graph",
            where=type(program.host).__name__,
            do="use the compiled module: this family is not split in the way an ONNX folder is",
        )
    host: Any = program.host
    if is_encoder_decoder(host):
        raise ExportError(
            "an encoder reads the prompt and its pictures; the ONNX runner knows decoders only",
            where=f"{type(host).__name__}, config.is_encoder_decoder",
            do="use the compiled module: this family cannot be written as an ONNX folder yet",
        )
    if getattr(host.config, "image_token_id", None) is None:
        raise ExportError(
            "the model has no token id for picture placeholders",
            where=f"{type(host).__name__}, config.image_token_id",
            do="use the compiled module: this family cannot be written as an ONNX folder yet",
        )


def _check_settings(program: Program) -> None:
    """Settings stored with the model also apply in the runner: those that it does not support are refused here."""
    host: Any = program.host
    settings = json.loads(host.generation_config.to_json_string(use_diff=False))
    try:
        Choice.read(settings, host.config.get_text_config().vocab_size, "generation_config")
    except RunnerError as error:
        raise ExportError(
            error.what,
            where="compiled.generation_config",
            do="use the compiled module, or set what is named to None in compiled.generation_config before the export",
        ) from error


def _check_graph(path: Path) -> None:
    """Refuse to write a graph that is not ONNX, or has operators that the runner does not list."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        check_graph(path, (path.parent / DATA).stat().st_size)
    except (RunnerError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        what = error.what if isinstance(error, RunnerError) else f"it is not valid ONNX: {' '.join(str(error).split())}"
        raise ExportError(what, where=path.name, do="report it: emit/onnx/translate, or runner/folder.py") from error


def _check_inputs(name: str, part: Part, masks: Sequence[str] = ()) -> None:
    known = onnx_runner.VISION_INPUTS if name == VISION else (*onnx_runner.LANGUAGE_INPUTS, *masks)
    roots = (*onnx_runner.STATE, ROWS)
    unknown = [path for path in part.inputs if path not in known and path.split(".")[0] not in roots]
    if unknown:
        raise ExportError(
            f"the {name} graph takes inputs that the ONNX runner cannot compute: {', '.join(unknown)}",
            where=name,
            do="use the compiled module: the ONNX runner has no code for this family",
        )


def _write_texts(program: Program, folder: Path) -> None:
    """Write all text files except the manifest."""
    # Some families store the id of image tokens under another name; the runner expects this one.
    host: Any = program.host
    config = host.config.to_dict() | {"image_token_id": host.config.image_token_id}
    texts = {
        "runner.py": runner_text(),
        "config.json": json.dumps(config, indent=2, sort_keys=True, default=str) + "\n",
        "generation_config.json": host.generation_config.to_json_string(use_diff=False),
        "recipe.yaml": program.recipe.to_yaml(),
        "plan.yaml": program.plan.to_yaml(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _try_several(
    generate: Callable[..., Any],
    folder: Path,
    sizes: Sequence[Sized],
    calls: Sequence[Mapping[str, Any]],
    seal: Callable[[], None],
) -> None:
    """Let the folder take several pictures in a call if it gives the module's answers to such calls."""
    write_sizes(folder, sizes, several=True)
    seal()
    try:
        accepted(generate, folder, calls, strict=True)
    except ExportError as error:
        _log.warning("the ONNX folder refuses calls with several pictures: %s", error.what)
        write_sizes(folder, sizes, several=False)
        seal()


def _float64(operators: Mapping[str, Sequence[str]]) -> str:
    """In words: which graphs have float64."""
    found = [f"{', '.join(names)} in {name}.onnx" for name, names in operators.items() if names]
    return f"float64: {'; '.join(found) or 'nowhere'}"


def _write_manifest(folder: Path, numbers: Sequence[str], double: Mapping[str, Sequence[str]]) -> None:
    """Write the manifest, which lists all other files; rewritten when a file is added."""
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "opset": OPSET,
        "numbers": list(numbers),
        "float64": double,
        "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.iterdir())
            if path.name not in (MANIFEST, PACKAGE)
        },
    }
    (folder / MANIFEST).write_text(sealed(manifest), encoding="utf-8")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
