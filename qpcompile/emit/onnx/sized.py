"""Trace the host's code from pictures to the decoder's inputs, for pictures of one size.

    pixel_values of one picture -> [towers, projectors and all host code around them] -> rows of the visual tokens

Families differ most in what they do around their tower: tiles, separators, interpolated position tables, scaled
features. None of that is known here: `host.generate` itself runs on a sample, and every operator that depends on the
pixels is recorded (torch.fx.experimental.proxy_tensor). What depends on sizes alone is computed once and becomes a
constant, so a graph holds for the sizes of its sample only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from qpcompile.emit.onnx.runner.inputs import IDS, MASK, TYPES
from qpcompile.emit.onnx.runner.runner import FEATURES, POSITIONS, ROWS
from qpcompile.emit.onnx.runner.sizes import SIZES
from qpcompile.emit.onnx.vision import answering, replaced
from qpcompile.emit.onnx.wrap import EMBEDS, Part
from qpcompile.errors import ExportError, QPCompileError
from qpcompile.ir.program import EMBED, PREFILL, PROJECTOR, VISION, Program, component_of
from qpcompile.ir.structure import named_tensors
from qpcompile.runtime.fixed_values import VALUES
from qpcompile.runtime.generation_options import first_line
from qpcompile.runtime.model_inputs import vocabulary_size
from qpcompile.runtime.prepare import TABLE, embedded, prepare

NOT_PICTURES = (IDS, MASK, *TYPES)
ONE_TOKEN: dict[str, Any] = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False, "num_beams": 1}
TOKENS_AT_ONCE = 1024
Feeds = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sized:
    """The graph of pictures of one size.

    part: takes inputs of `example` by name, gives `image_features` and, as `rows.<input>`, what other inputs of the
    decoder hold at visual tokens: f[N, ...] each. values: further inputs with the values that the graph was traced
    for. tokens: N. positions: i64[axes, N] of the visual tokens, counted from the first, or None where positions have
    one axis; the token after a picture has position `advance`, of each axis.
    """

    part: Part
    example: Feeds
    values: Feeds
    tokens: int
    positions: torch.Tensor | None = None
    advance: tuple[int, ...] = ()

    def to_dict(self, graph: str) -> dict[str, Any]:
        """What the runner reads of it, as plain values."""
        return {
            "graph": graph,
            "tokens": self.tokens,
            "values": {name: value.tolist() for name, value in self.values.items()},
            "positions": None if self.positions is None else self.positions.tolist(),
            "advance": list(self.advance),
        }


class _Reached(Exception):
    """Ends the host's code at the decoder's call."""


def sized_pictures(program: Program, samples: Iterable[Mapping[str, Any]], known: Collection[Any]) -> list[Sized]:
    """A graph for each size of picture among `samples`, inputs of `generate`; those with one prompt and one run of
    image tokens count. The largest pictures come first.

    known: the operators that can be translated; others are taken apart where torch can.

    Raises ExportError if there is none, or one cannot be traced.
    """
    found: list[Sized] = []
    for sample in samples:
        tensors = {name: torch.as_tensor(value) for name, value in sample.items() if value is not None}
        if _one_picture(program, tensors):
            made = _sized(program, tensors, known)
            if not any(_same_size(made, other) for other in found):
                found.append(made)
    if not found:
        raise ExportError(
            "a graph of one picture size needs a sample of it",
            where=VISION,
            do="give the export `check` inputs: prompts with one picture, of every size that will be asked about",
        )
    return sorted(found, key=lambda each: -each.tokens)


def image_token(program: Program) -> int:
    """The id of the tokens that visual tokens take the place of."""
    host: Any = program.host
    return int(host.config.image_token_id)


def decoder_inputs(program: Program, tensors: Mapping[str, torch.Tensor]) -> Feeds:
    """What the host gives the decoder for a prompt, by the names of the prefill graph's inputs."""
    host: Any = program.host
    graphs = program.graphs
    decoder = host.get_submodule(graphs[PREFILL].owner) if graphs[PREFILL].owner else host
    seen: Feeds = {}

    def stop(module: torch.nn.Module, arguments: dict[str, Any]) -> Any:
        with torch.no_grad():
            given = prepare(module, embedded(module, arguments), graphs[PREFILL].constants.get(TABLE))
        seen.update(named_tensors({name: value for name, value in given.items() if value is not None}))
        raise _Reached

    with ExitStack() as stack:
        # A machine that is bound to the host would notice the prompt.
        bound = vars(host).pop("forward", None)
        if bound is not None:
            stack.callback(setattr, host, "forward", bound)
        parts = (VISION, PROJECTOR, EMBED)
        stack.enter_context(answering(host, (one for one in graphs.values() if component_of(one.name) in parts)))
        stack.enter_context(replaced({decoder: stop}))
        with suppress(_Reached):
            host.generate(**tensors, **ONE_TOKEN)
    return {path: value for path, value in seen.items() if path in graphs[PREFILL].inputs}


def token_tables(program: Program, paths: Iterable[str]) -> dict[str, torch.Tensor]:
    """What inputs of the decoder other than its embeddings hold for every token of the vocabulary: f[V, ...].

    The host is asked for all tokens, and once more in another order: a value that depends on anything but its own token
    is refused. An input that the host leaves out for a prompt without pictures has no table.
    """
    host: Any = program.host
    count = vocabulary_size(host)
    special = {value for name, value in host.config.to_dict().items() if name.endswith(("token_id", "token_index"))}
    asked = torch.tensor([token for token in range(count) if token not in special])
    shuffled = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))]
    tables: dict[str, torch.Tensor] = {}
    if not (wanted := list(paths)):
        return tables
    for ids in (asked, shuffled):
        for part in ids.split(TOKENS_AT_ONCE):
            with torch.no_grad():
                feeds = decoder_inputs(program, {IDS: part[None], MASK: torch.ones_like(part)[None]})
            for path in (path for path in wanted if path in feeds):
                rows = feeds[path][0]
                if path not in tables:
                    tables[path] = rows.new_zeros(count, *rows.shape[1:])
                if ids is shuffled and not torch.allclose(tables[path][part], rows, 1e-4, 1e-5):
                    raise ExportError(
                        f"the decoder's {path} depends on more than one token",
                        where=PREFILL,
                        do="use the compiled module: this family cannot be written as an ONNX folder yet",
                    )
                tables[path][part] = rows
    return tables


def write_sizes(folder: Path, sizes: Sequence[Sized], several: bool) -> None:
    """Write which vision graph takes which pictures; several: whether a call may have several."""
    names = [f"{VISION}.{index}.onnx" if index else f"{VISION}.onnx" for index in range(len(sizes))]
    listed = [size.to_dict(name) for size, name in zip(sizes, names, strict=True)]
    (folder / SIZES).write_text(json.dumps({"several": several, "sizes": listed}) + "\n", encoding="utf-8")


def by_pictures(
    program: Program, samples: Iterable[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The calls with one picture at most, and those with several: with several runs of image tokens."""
    found: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] = ([], [])
    for sample in samples:
        found[_runs(program, torch.as_tensor(sample[IDS])) > 1].append(sample)
    return found


def _one_picture(program: Program, tensors: Mapping[str, torch.Tensor]) -> bool:
    ids = tensors.get(IDS)
    return ids is not None and len(ids) == 1 and _runs(program, ids) == 1


def _runs(program: Program, ids: torch.Tensor) -> int:
    """How many runs of image tokens the prompts i64[B, S] have."""
    visual = ids == image_token(program)
    return int((visual & ~torch.nn.functional.pad(visual[:, :-1], (1, 0))).sum())


def _same_size(left: Sized, right: Sized) -> bool:
    shapes = [{name: value.shape for name, value in each.example.items()} for each in (left, right)]
    return (
        shapes[0] == shapes[1]
        and left.tokens == right.tokens
        and left.values.keys() == right.values.keys()
        and all(torch.equal(value, right.values[name]) for name, value in left.values.items())
    )


def _sized(program: Program, tensors: Mapping[str, torch.Tensor], known: Collection[Any]) -> Sized:
    pictures = {name: value for name, value in tensors.items() if name not in NOT_PICTURES}
    fed = {name: value for name, value in pictures.items() if value.is_floating_point()}
    whole = {name: value for name, value in pictures.items() if not value.is_floating_point()}
    text = {name: value for name, value in tensors.items() if name in NOT_PICTURES}
    made = _trace(program, text, fed, whole, known)
    # Whole numbers that the host's code computes with, and never looks at, are inputs like the pixels. They select the
    # graph of a component that was traced for some values only.
    selecting = any(VALUES in graph.constants for graph in program.graphs.values())
    for name in () if selecting else list(whole):
        rest = {other: value for other, value in whole.items() if other != name}
        try:
            other = _trace(program, text, {**fed, name: whole[name]}, rest, known)
        except ExportError:
            continue
        if not _translatable(other, known):
            continue
        made = other
        fed[name], whole = whole[name], rest
    visual = tensors[IDS][0] == image_token(program)
    feeds = decoder_inputs(program, tensors)
    positions, advance = _positions(feeds.get(POSITIONS), visual)
    return Sized(made, fed, whole, int(visual.sum()), positions, advance)


def _translatable(part: Part, known: Collection[Any]) -> bool:
    targets = {node.target for node in part.module.graph.nodes if node.op == "call_function"}
    return all(target in known for target in targets if isinstance(target, torch._ops.OpOverload))


def _positions(given: torch.Tensor | None, visual: torch.Tensor) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """Positions of visual tokens on every axis, and of the token after them, counted from the first of them."""
    if given is None or given.ndim != 3:
        return None, ()
    if not torch.equal(given, given.round()):
        raise ExportError(
            "the positions of visual tokens are not whole numbers",
            where=PREFILL,
            do="use the compiled module: this family cannot be written as an ONNX folder yet",
        )
    given = given.long()
    first, count = int(visual.nonzero()[0, 0]), int(visual.sum())
    start = given[:, 0, first - 1] + 1 if first else torch.zeros_like(given[:, 0, 0])
    rows = given[:, 0, first : first + count] - start[:, None]
    after = first + count
    advance = given[:, 0, after] - start if after < len(visual) else rows.amax(dim=1) + 1
    return rows, tuple(advance.tolist())


def _trace(
    program: Program,
    text: Mapping[str, torch.Tensor],
    fed: Mapping[str, torch.Tensor],
    whole: Mapping[str, torch.Tensor],
    known: Collection[Any],
) -> Part:
    """The graph from `fed` to the rows of visual tokens; text and whole are constants in it."""
    visual = (text[IDS][0] == image_token(program)).nonzero()[:, 0]
    outputs: list[str] = []

    def rows(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feeds = decoder_inputs(program, {**text, **whole, **dict(zip(fed, values, strict=True))})
        carried = {path: value for path, value in feeds.items() if _per_token(value, len(text[IDS][0]))}
        outputs[:] = [FEATURES if path == EMBEDS else f"{ROWS}.{path}" for path in carried]
        return tuple(value[0].index_select(0, visual) for value in carried.values())

    host: Any = program.host
    values = tuple(value.to(host.dtype) if value.is_floating_point() else value for value in fed.values())
    try:
        with torch.no_grad():
            with _only_of_inputs(known):
                traced = make_fx(rows, tracing_mode="real", pre_dispatch=True)(*values)
            traced = _pure(traced, values)
            # Other pixels: a value of the sample's that became a constant would give itself away.
            others = [value.flip(-1) * 0.5 if value.is_floating_point() else value for value in values]
            expected, found = rows(*others), traced(*others)
    except QPCompileError:
        raise
    except Exception as error:
        raise _untraced(program, first_line(error)) from error
    if not all(torch.allclose(left, right, 1e-4, 1e-5) for left, right in zip(expected, found, strict=True)):
        raise _untraced(program, "the trace gives other features")
    if FEATURES not in outputs:
        raise _untraced(program, "its decoder takes no embeddings")
    return Part(traced, tuple(fed), tuple(outputs))


@contextmanager
def _only_of_inputs(known: Collection[Any]) -> Iterator[None]:
    """Within the block, make_fx records operators that depend on the traced inputs; others run as they are, so that
    code may look at their results.
    """
    record = proxy_tensor.proxy_call

    def call(mode: Any, func: Any, pre_dispatch: bool, args: Any, kwargs: Any) -> Any:
        # Which rows are taken, where pixels say it (of blank pictures, say), belongs to the size.
        if func is torch.ops.aten.index.Tensor:
            masks = [each.clone() if each is not None and each.dtype == torch.bool else each for each in args[1]]
            args = (args[0], masks)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        depends = any(proxy_tensor.get_proxy_slot(each, mode.tracer, None) is not None for each in tensors)
        if not depends or func is torch.ops.aten.nonzero.default:
            return func(*args, **kwargs)
        if func not in known:
            with mode:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        return record(mode, func, pre_dispatch, args, kwargs)

    def mask(function: Any) -> Any:
        def unrecorded(*args: Any) -> Any:
            with _disable_current_modes():
                return expanded(function)(*args)

        return unrecorded

    expanded = masking_utils._vmap_expansion_sdpa
    recording = mock.patch.object(proxy_tensor, "proxy_call", call)
    # No mask depends on pixels, and torch cannot record the vmap that makes some of them.
    with recording, mock.patch.object(masking_utils, "_vmap_expansion_sdpa", mask):
        yield


def _per_token(value: torch.Tensor, tokens: int) -> bool:
    return value.is_floating_point() and value.ndim > 2 and value.shape[:2] == (1, tokens)


def _untraced(program: Program, why: str) -> ExportError:
    return ExportError(
        f"the way {type(program.host).__name__} takes pictures into its decoder cannot be traced: {why}",
        where=VISION,
        do="use the compiled module: this family cannot be written as an ONNX folder yet",
    )


def _pure(module: fx.GraphModule, values: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The same graph without operators that write to their arguments, and with a tuple of nodes as output."""

    def writes(node: fx.Node) -> bool:
        return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

    if any(writes(node) for node in module.graph.nodes):
        exported = torch.export.export(module, tuple(values), strict=False).run_decompositions({})
        module = exported.module(check_guards=False)
        module.graph.set_codegen(CodeGen())
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    output.args = (tuple(tree_leaves(output.args[0])),)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
