"""Write what onnxruntime-genai needs beside the graphs of an ONNX folder: `export --for genai`.

    genai_config.json     the graphs as a pipeline (model type `decoder-pipeline`), stop tokens, how tokens are chosen
    genai_prompt.onnx     the prompt's masks; its positions, where they have several axes
    genai_step.onnx       what a decode step is told about the tokens before it; left out where nothing is
    genai_logits.onnx     f[1, V] -> f[1, 1, V], the shape genai takes
    genai_vision.onnx     vision.onnx with other input names, where they are those of another graph, and no int32 inputs
    genai_runner.py       prompts and pictures -> inputs of the graphs (runner/genai.py)

    prompt    vision -> prompt -> prefill -> logits          a token    step -> decode -> logits

genai hands every output on by name: a cache of any length and type goes from one step to the next under the name that
decode takes it by. Its own caches, which have one length and one type, are not used.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qpcompile.emit.onnx.runner import genai as runner_source
from qpcompile.emit.onnx.runner.choice import Choice
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.genai import (
    CONFIG,
    OF_TOWER,
    OWN,
    PROMPT_POSITIONS,
    PROMPT_STAGE,
    SESSION,
    VISION_STAGE,
)
from qpcompile.emit.onnx.runner.inputs import IDS, MASK
from qpcompile.emit.onnx.runner.runner import COUNT, LOGITS, POSITIONS, SEEN, VALID, VISUAL
from qpcompile.emit.onnx.translate.nodes import IR_VERSION, OPSET
from qpcompile.emit.onnx.wrap import present
from qpcompile.errors import ExportError
from qpcompile.ir.names import CACHE
from qpcompile.ir.program import DECODE, PREFILL, VISION, Program
from qpcompile.runtime.machine import ALIVE, KEPT

RUNNER = "genai_runner.py"
README = """
## onnxruntime-genai

```sh
pip install onnxruntime-genai numpy pillow tokenizers
python genai_runner.py --image photo.png --question "what is in the picture?"
```

`genai_config.json` lists the graphs as a pipeline, with small ones between them (`genai_*.onnx`). Prompts and pictures
are prepared in numpy: `from genai_runner import GenaiRunner`. One prompt for each generator, and no beams.
"""
NEXT_LOGITS, STEP_STAGE = f"next_{LOGITS}", "step"
FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
INT32, INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64
SETTINGS = "compiled.generation_config"
# A name that no graph has: genai then leaves positions and caches to the pipeline.
UNUSED = "unused"
_PACKAGE = re.compile(r"^from qpcompile\.emit\.onnx\.runner\.\w+ import", re.MULTILINE)


def write_genai(program: Program, folder: Path) -> None:
    """Add the files to a folder that has the graphs; README.md gets a section."""
    graphs = {name: onnx.load(folder / f"{name}.onnx", load_external_data=False) for name in (VISION, PREFILL, DECODE)}
    sizes = {value.name: len(value.type.tensor_type.shape.dim) for value in graphs[PREFILL].graph.input}
    axes = sizes.get(POSITIONS) == 3
    config = _config(program, graphs, axes)
    for model in _small_graphs(program, graphs, axes):
        onnx.save(model, folder / f"{OWN}{model.graph.name}.onnx")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    source = _PACKAGE.sub("from runner import", inspect.getsource(runner_source))
    (folder / RUNNER).write_text(source, encoding="utf-8")
    with (folder / "README.md").open("a", encoding="utf-8") as file:
        file.write(README)


def opened_by(folder: Path) -> str | None:
    """The version of the installed onnxruntime-genai, which opened the folder; None where none is installed."""
    try:
        genai = runner_source.package()
    except RunnerError:
        return None
    try:
        genai.Model(str(folder))
    except Exception as error:
        raise ExportError(
            f"onnxruntime-genai {genai.__version__} does not open the folder: {str(error).strip().splitlines()[0]}",
            where=CONFIG,
            do="install the version that docs/deploy-genai.md names, or export without --for genai",
        ) from error
    return genai.__version__


def _config(program: Program, graphs: Mapping[str, onnx.ModelProto], axes: bool) -> dict[str, Any]:
    host: Any = program.host
    text = host.config.get_text_config()
    logits = next(value for value in graphs[PREFILL].graph.output if value.name == LOGITS)
    vocabulary = logits.type.tensor_type.shape.dim[1].dim_value
    choice, longest = _settings(program)
    heads = text.num_attention_heads
    unused = f"{UNUSED}.%d.key", f"{UNUSED}.%d.value"
    return {
        "model": {
            "type": "decoder-pipeline",
            "vocab_size": vocabulary,
            "context_length": longest,
            "bos_token_id": text.bos_token_id if isinstance(getattr(text, "bos_token_id", None), int) else 0,
            "eos_token_id": list(choice.ends),
            "pad_token_id": choice.pad,
            "decoder": {
                "session_options": dict(SESSION),
                "hidden_size": text.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
                "head_size": getattr(text, "head_dim", None) or text.hidden_size // heads,
                "num_hidden_layers": len(program.layers),
                "inputs": {
                    "input_ids": IDS,
                    "attention_mask": MASK,
                    "position_ids": f"{UNUSED}.{POSITIONS}" if axes else POSITIONS,
                    "past_key_names": unused[0],
                    "past_value_names": unused[1],
                },
                "outputs": {
                    "logits": NEXT_LOGITS,
                    "present_key_names": unused[0],
                    "present_value_names": unused[1],
                },
                "pipeline": [dict(_stages(graphs, axes))],
            },
        },
        "search": _search(choice, longest),
    }


def check_settings(program: Program) -> None:
    """Refuse a model before its graphs are made: ExportError for settings that genai does not honour."""
    _settings(program)


def _settings(program: Program) -> tuple[Choice, int]:
    """How tokens are chosen, and the most tokens of prompt and answer."""
    host: Any = program.host
    text = host.config.get_text_config()
    settings = json.loads(host.generation_config.to_json_string(use_diff=False))
    choice = Choice.read(settings, text.vocab_size, SETTINGS)
    if not choice.ends:
        raise _refused("the model has no stop token, and onnxruntime-genai would stop at padding", SETTINGS)
    unknown = {
        "min_new_tokens": choice.least,
        "suppress_tokens": choice.suppressed,
        "begin_suppress_tokens": choice.suppressed_first,
    }
    if names := [name for name, value in unknown.items() if value]:
        raise _refused(f"onnxruntime-genai has no {', '.join(names)}", SETTINGS)
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise _refused("the model does not say how many tokens it takes", "config.max_position_embeddings")
    return choice, longest


def _search(choice: Choice, longest: int) -> dict[str, Any]:
    """genai's search options."""
    return {
        "do_sample": choice.sample,
        "temperature": choice.temperature,
        "top_k": choice.top_k,
        "top_p": choice.top_p,
        "repetition_penalty": choice.penalty,
        "min_length": choice.least_in_all,
        "max_length": longest,
        "num_beams": 1,
        "batch_size": 1,
        "past_present_share_buffer": False,
    }


def _refused(what: str, where: str) -> ExportError:
    return ExportError(what, where=where, do="export for onnxruntime, or change the setting before the export")


def _stages(graphs: Mapping[str, onnx.ModelProto], axes: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The graphs in the order in which they run."""
    inputs = {name: [value.name for value in model.graph.input] for name, model in graphs.items()}
    outputs = {name: [value.name for value in model.graph.output] for name, model in graphs.items()}
    # The names by which the next step takes what this one gives.
    handed = {present(path): path for path in inputs[DECODE] if path.startswith(f"{CACHE}.")}
    handed |= {present(path): _before(path) for path in _kept(graphs)}

    def stage(name: str, file: str, given: list[str], made: list[str], once: bool, later: bool) -> Any:
        renamed = {path: handed[path] for path in made if path in handed}
        entry: dict[str, Any] = {"filename": f"{file}.onnx", "inputs": given, "outputs": made}
        entry |= {"run_on_prompt": once, "run_on_token_gen": later}
        return name, entry | ({"output_names_forwarder": renamed} if renamed else {})

    unlike = _unlike(graphs)
    tower = [f"{OF_TOWER}{path}" if path in unlike else path for path in inputs[VISION]]
    yield stage(VISION_STAGE, f"{OWN}{VISION}" if unlike else VISION, tower, outputs[VISION], True, False)
    given = [IDS, MASK, *([PROMPT_POSITIONS] if axes else [])]
    made = [VISUAL, VALID, COUNT, *([POSITIONS, present(POSITIONS)] if axes else [])]
    handed |= {present(POSITIONS): _before(POSITIONS)} if axes else {}
    yield stage(PROMPT_STAGE, f"{OWN}{PROMPT_STAGE}", given, made, True, False)
    yield stage(PREFILL, PREFILL, inputs[PREFILL], outputs[PREFILL], True, False)
    told = [path for path in (*_kept(graphs), *([POSITIONS] if axes else [])) if path in inputs[DECODE]]
    seen = [SEEN] if SEEN in inputs[DECODE] else []
    if told or seen:
        given = [MASK, *(_before(path) for path in told)]
        made = [*seen, *told, *(present(path) for path in told)]
        yield stage(STEP_STAGE, f"{OWN}{STEP_STAGE}", given, made, False, True)
    yield stage(DECODE, DECODE, inputs[DECODE], outputs[DECODE], False, True)
    yield stage(LOGITS, f"{OWN}{LOGITS}", [LOGITS], [NEXT_LOGITS], True, True)


def _kept(graphs: Mapping[str, onnx.ModelProto]) -> list[str]:
    """The inputs of decode that say which tokens were kept."""
    return [value.name for value in graphs[DECODE].graph.input if value.name.split(".")[0] in (KEPT, ALIVE)]


def _unlike(graphs: Mapping[str, onnx.ModelProto]) -> dict[str, int]:
    """Inputs of the tower that go in under another name, with their type: the decoder has inputs of the same name, or
    they are int32, which no caller can know.
    """
    of_decoder = {value.name for name in (PREFILL, DECODE) for value in graphs[name].graph.input}
    types = {value.name: value.type.tensor_type.elem_type for value in graphs[VISION].graph.input}
    return {name: kind for name, kind in types.items() if name in of_decoder or kind == INT32}


def _small_graphs(program: Program, graphs: Mapping[str, onnx.ModelProto], axes: bool) -> Iterator[onnx.ModelProto]:
    """The graphs that genai alone runs; each has the name of its stage."""
    host: Any = program.host
    stages = dict(_stages(graphs, axes))
    yield _prompt(host.config.image_token_id, axes)
    if STEP_STAGE in stages:
        types = {value.name: value.type for value in graphs[DECODE].graph.input}
        yield _step(stages[STEP_STAGE]["outputs"], types)
    logits = next(value for value in graphs[PREFILL].graph.output if value.name == LOGITS)
    vocabulary = logits.type.tensor_type.shape.dim[1].dim_value
    small = _Small()
    small.input(LOGITS, FLOAT, [1, vocabulary])
    small.output(NEXT_LOGITS, FLOAT, [1, 1, vocabulary])
    small.node("Unsqueeze", [LOGITS, small.numbers([1])], NEXT_LOGITS)
    yield small.model(LOGITS)
    if unlike := _unlike(graphs):
        tower = graphs[VISION]
        tower.graph.name = VISION
        for value in tower.graph.input:
            if value.name in unlike:
                cast = helper.make_node("Cast", [f"{OF_TOWER}{value.name}"], [value.name], to=unlike[value.name])
                tower.graph.node.insert(0, cast)
                value.name, value.type.tensor_type.elem_type = cast.input[0], INT64
        yield tower


def _prompt(image_token: int, axes: bool) -> onnx.ModelProto:
    """Masks of one prompt. A second prompt of one generator fails: its mask is longer than its tokens."""
    small = _Small()
    for name in (IDS, MASK):
        small.input(name, INT64, [1, "tokens" if name == IDS else "tokens_so_far"])
    for name in (VISUAL, VALID):
        small.output(name, BOOL, [1, "tokens"])
    small.output(COUNT, INT64, ["visual_tokens"])
    small.node("Equal", [IDS, small.numbers(image_token)], VISUAL)
    small.node("Reshape", [MASK, small.node("Shape", [IDS])], "mask")
    small.node("Cast", ["mask"], VALID, to=BOOL)
    ones = small.node("Cast", [VISUAL], to=INT64)
    count = small.node("ReduceSum", [ones], keepdims=0)
    small.node("Range", [small.numbers(0), count, small.numbers(1)], COUNT)
    if axes:
        small.input(PROMPT_POSITIONS, INT64, ["axes", 1, "tokens"])
        small.output(POSITIONS, INT64, ["axes", 1, "tokens"])
        small.output(present(POSITIONS), INT64, ["axes", 1, 1])
        small.node("Identity", [PROMPT_POSITIONS], POSITIONS)
        last = [small.numbers([each]) for each in (-1, 2**63 - 1, 2)]
        small.node("Slice", [PROMPT_POSITIONS, *last], present(POSITIONS))
    return small.model(PROMPT_STAGE)


def _step(outputs: list[str], types: Mapping[str, onnx.TypeProto]) -> onnx.ModelProto:
    """What the runner's `Steps.decode` gives a decode step; types: of the inputs of decode."""
    small = _Small()
    small.input(MASK, INT64, [1, "tokens_so_far"])
    total = small.node("Gather", [small.node("Shape", [MASK]), small.numbers(1)])
    seen = small.node("Sub", [total, small.numbers(1)])
    one, rows = small.numbers([1]), small.numbers([1, 1])
    for name in outputs:
        if name not in types:
            continue
        kind = types[name].tensor_type.elem_type
        if name == SEEN:
            small.output(name, kind, ["tokens_seen"])
            small.node("Range", [small.numbers(0), seen, small.numbers(1)], name)
            continue
        before = _before(name)
        sizes: list[int | str] = ["axes", 1, 1] if name == POSITIONS else [1, f"{name}.tokens"]
        small.input(before, kind, sizes if name == POSITIONS else [1, f"{before}.tokens"])
        for made in (name, present(name)):
            small.output(made, kind, sizes)
        if name == POSITIONS:
            small.node("Add", [before, one], name)
        else:
            # The new token joins the kept ones of every cut, at its own position.
            new = small.node("Reshape", [one if kind == BOOL else seen, rows])
            new = small.node("Cast", [new], to=kind)
            small.node("Concat", [before, new], name, axis=1)
        small.node("Identity", [name], present(name))
    return small.model(STEP_STAGE)


def _before(path: str) -> str:
    """The name under which the state that becomes the input `path` of decode waits for the next step."""
    return f"{path}.before"


class _Small:
    """Builds a small graph, node by node."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Any]] = {"node": [], "input": [], "output": [], "initializer": []}

    def input(self, name: str, kind: int, sizes: list[Any]) -> None:
        """A new input; sizes that vary have a name."""
        self.parts["input"].append(helper.make_tensor_value_info(name, kind, sizes))

    def output(self, name: str, kind: int, sizes: list[Any]) -> None:
        """A new output, which a node gives."""
        self.parts["output"].append(helper.make_tensor_value_info(name, kind, sizes))

    def numbers(self, value: Any) -> str:
        """A constant of whole numbers; returns its name."""
        name = f"number.{len(self.parts['initializer'])}"
        self.parts["initializer"].append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def node(self, kind: str, given: list[str], made: str = "", **attributes: Any) -> str:
        """A new node; returns the name of its result."""
        name = made or f"value.{len(self.parts['node'])}"
        self.parts["node"].append(helper.make_node(kind, given, [name], **attributes))
        return name

    def model(self, name: str) -> onnx.ModelProto:
        """The finished graph."""
        parts = self.parts
        graph = helper.make_graph(parts["node"], name, parts["input"], parts["output"], parts["initializer"])
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qpcompile"
        )
        onnx.checker.check_model(model, full_check=True)
        return model
