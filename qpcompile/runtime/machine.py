"""Execute a program: transformers' own code runs on the host, with graphs in place of its components."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils.generic import ModelOutput

from qpcompile.errors import CalibrationError, CaptureError, InputError, KernelError, PlanError
from qpcompile.ir.names import CACHE, STATE, Name
from qpcompile.ir.program import DECODE, EMBED, HEAD, PREFILL, PROJECTOR, VISION, Graph, Program, component_of
from qpcompile.ir.structure import CACHE_ARGUMENT, named_tensors, rebuild
from qpcompile.runtime.arguments import (
    Kinds,
    fitted,
    input_kinds,
    keyword_arguments,
    refuse_unknown,
    split_flags,
    without_unread,
)
from qpcompile.runtime.fixed_values import VALUES, of_call, of_values, said, varying
from qpcompile.runtime.generation_options import CACHES, first_line, plain_settings, settle
from qpcompile.runtime.kv_cache import CompiledCache
from qpcompile.runtime.model_inputs import check_inputs, is_encoder_decoder, vocabulary_size
from qpcompile.runtime.prepare import (
    MASK,
    PICTURES_AT,
    PROMPT,
    STATES_OF,
    TABLE,
    absent_inputs,
    embedded,
    moved,
    prepare,
)

_LOG = logging.getLogger("qpcompile")
Execute = Callable[[Graph, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Decode = Callable[[CompiledCache, dict[str, torch.Tensor]], dict[str, torch.Tensor]]

# Marks slots of a row without a token: padding, or a row that kept fewer tokens than another.
NO_TOKEN = -1
VISUAL, VALID, COUNT, SEEN = "visual_mask", "valid_mask", "visual_count", "tokens_seen"
KEPT, ALIVE = "kept", "alive"
# Exceptions of transformers and torch for inputs that do not fit.
REFUSALS = (ValueError, IndexError, TypeError, RuntimeError, KeyError, AttributeError)
# Per-token outputs of a vision graph besides features, for pruning methods.
VISUAL_SCORES, VISUAL_KEYS = "visual_scores", "visual_keys"


def execute_graph(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a graph as it is."""
    with torch.no_grad():
        return graph(feeds)


def visual_tokens(config: Any) -> torch.Tensor:
    """The ids of picture placeholder tokens: i64[n]."""
    tokens = [getattr(config, key, None) for key in ("image_token_id", "video_token_id")]
    return torch.tensor([token for token in tokens if token is not None], dtype=torch.int64)


class Machine:
    """A program bound to its host: `host.generate(...)` runs the graphs, until a `with` of the machine ends.

    `execute` runs one graph; passes that measure replace it. `decode` runs a decode step on its own kind of cache and
    appends to it; without it decode is a graph like the others. `last` is the cache of the latest prefill. One answer
    at a time: the prompt's token kinds are state between the host's calls, so other threads wait.
    """

    def __init__(self, program: Program, execute: Execute = execute_graph, decode: Decode | None = None) -> None:
        self.program = program
        self.execute = execute
        self.decode = decode
        self.host: Any = program.host
        self.last: CompiledCache | None = None
        self.visual: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.seen_by_tower: dict[str, list[torch.Tensor]] = {}
        self.kinds: dict[str, Kinds] = {}
        self.remembered: dict[str, list[Name]] = {}
        self.noted: set[str] = set()
        self._turn = threading.RLock()
        self._replaced: list[torch.nn.Module] = []
        self._bind()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the host its own code back; what `execute` holds is free then."""
        for module in self._replaced:
            vars(module).pop("forward", None)
        self._replaced = []

    def __getstate__(self) -> dict[str, Any]:
        # The host's forward refers to its machine, so that copies of programs copy it too.
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.RLock())

    def generate(self, **inputs: Any) -> Any:
        """`host.generate` with our own cache. Raises InputError for unsupported arguments, before anything runs."""
        return self._answer(inputs)

    def prefill(self, inputs: dict[str, Any]) -> CompiledCache:
        """Run the prompt once; returns its cache. Settings stored with the model are ignored."""
        cache = CompiledCache(len(self.program.layers))
        self._answer({**inputs, **plain_settings(self.host), CACHE_ARGUMENT: cache})
        return cache

    def kept_tokens(self, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
        """The prompt tokens kept after each cut: layer -> i64[B, N], NO_TOKEN in slots without one.

        Where the states of cross-attention are cut, -1 -> their numbers.
        """
        cache = self.prefill(inputs)
        if cache.states is not None:
            # One cut, before the decoder.
            kept, alive = cache.states
            return {-1: kept.masked_fill(~alive, NO_TOKEN)}
        return {layer: kept.masked_fill(~cache.alive[layer], NO_TOKEN) for layer, kept in sorted(cache.kept.items())}

    def _answer(self, inputs: dict[str, Any]) -> Any:
        """Check everything, then run; errors of transformers about the prompt become an InputError."""
        settled, keeps_cache = settle(self.host, inputs, vocabulary_size(self.host))
        settled = check_inputs(self.host, settled)
        caches = [settled.pop(name, None) for name in CACHES]
        cache = next((given for given in caches if given is not None), CompiledCache(len(self.program.layers)))
        with self._turn:
            self.seen_by_tower, before = {}, cache.seen
            # Families with a `generate` of their own call parts of the model, and not its forward.
            self.visual = self.valid = None
            self._see(settled.get("input_ids"), settled)
            try:
                # Models with an encoder ask for a cache of both kinds; ours holds both.
                both = EncoderDecoderCache(cache, DynamicCache()) if is_encoder_decoder(self.host) else cache
                answer = self.host.generate(**settled, **{CACHE_ARGUMENT: both})
            except torch.OutOfMemoryError:
                raise
            except (KernelError, *REFUSALS) as error:
                # After the decoder has processed the prompt, errors are no longer caused by the prompt.
                ours = isinstance(error, KernelError) and not isinstance(error.__cause__, REFUSALS)
                if ours or cache.seen > before:
                    raise
                raise InputError(
                    f"the model does not take these inputs: {first_line(error)}",
                    where=f"generate, given {', '.join(sorted(inputs))}",
                    do="build the inputs with the model's own processor, one picture for each picture in the text; if "
                    "those fail as well, compile the model again",
                ) from error
        if not keeps_cache and isinstance(answer, ModelOutput):
            return _without(answer, both)
        return answer

    def _bind(self) -> None:
        graphs = self.program.graphs
        for name in (VISION, PROJECTOR, HEAD, EMBED):
            if name in graphs:
                own = [graph for graph in graphs.values() if component_of(graph.name) == name]
                self._replace(graphs[name].owner, functools.partial(self._component, own))
        self._replace(graphs[PREFILL].owner, self._language)
        original = type(self.program.host).forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._see(kwargs.get("input_ids", args[0] if args else None), kwargs)
            return original(self.host, *args, **kwargs)

        self.host.forward = functools.partial(forward)
        functools.update_wrapper(self.host.forward, original.__get__(self.host))
        self._replaced.append(self.host)

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        module = self.host.get_submodule(name) if name else self.host
        module.forward = function
        self._replaced.append(module)

    def _see(self, input_ids: torch.Tensor | None, given: Mapping[str, Any]) -> None:
        """Store which tokens of the prompt are visual, by their ids or a mask of them, and which are padding."""
        if input_ids is None or input_ids.shape[-1] == 1:
            return
        marked, present = (
            mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == input_ids.shape else None
            for mask in (given.get(PICTURES_AT), given.get(MASK))
        )
        by_id = torch.isin(input_ids, visual_tokens(self.host.config).to(input_ids.device))
        self.visual = by_id if marked is None else marked
        self.valid = torch.ones_like(by_id) if present is None else present

    def _component(self, graphs: list[Graph], *args: Any, **kwargs: Any) -> Any:
        """Run a component: its graph, or that of its graphs which is of the values of this call."""
        graph = graphs[0]
        module = self.host.get_submodule(graph.owner)
        arguments = keyword_arguments(module, args, kwargs)
        if VALUES in graph.constants:
            arguments = of_call(arguments)
            if (found := of_values(graphs, arguments)) is None:
                return self._eagerly(graph, arguments, args, kwargs)
            graph = found
            feeds = self._fitted(graph, moved(module, varying(arguments)))
        else:
            feeds = self._known(graph, arguments)
        results = self.execute(graph, _pick(graph, feeds))
        for name in (VISUAL_SCORES, VISUAL_KEYS):
            if name in results:
                self.seen_by_tower.setdefault(name, []).append(results.pop(name))
        return rebuild(graph.returns, results)

    def _eagerly(self, graph: Graph, arguments: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run transformers' own code of a component, which has its weights, on values that no graph was traced for."""
        if graph.owner not in self.noted:
            self.noted.add(graph.owner)
            _LOG.warning(
                "%s has no graph of %s: transformers' code computes it in full precision, here and where else that is "
                "so; compile with a sample of this kind to have one",
                graph.name,
                said(arguments),
            )
        module = self.host.get_submodule(graph.owner)
        own: Any = cast(Any, type(module))
        with torch.no_grad():
            return own.forward(module, *args, **kwargs)

    def _language(self, *args: Any, **kwargs: Any) -> Any:
        module = self.host.get_submodule(self.program.graphs[PREFILL].owner)
        kwargs = embedded(module, keyword_arguments(module, args, kwargs))
        cache = kwargs.pop(CACHE_ARGUMENT, None)
        given, cache = cache, cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if cache is None:
            given = cache = CompiledCache(len(self.program.layers))
        if not isinstance(cache, CompiledCache):
            raise CaptureError(
                f"a compiled model cannot use a {type(cache).__name__}",
                where=CACHE_ARGUMENT,
                do=f"leave {CACHE_ARGUMENT} out: generate makes the cache this model was compiled for",
            )
        new = kwargs["inputs_embeds"].shape[1]
        graph = self.program.graphs[DECODE if cache.seen else PREFILL]
        if cache.seen and new != 1:
            raise CaptureError(
                f"{new} tokens were given on top of a cache of {cache.seen}",
                where="decode",
                do="give the whole prompt at once: decoding goes token by token",
            )
        feeds = self._known(graph, kwargs)
        feeds |= absent_inputs(graph, feeds, cache.seen)
        if cache.seen and self.decode is not None:
            results = self.decode(cache, feeds)
        else:
            feeds |= self._token_feeds(cache, new, feeds)
            results = self.execute(graph, _pick(graph, feeds))
            self._store(graph, cache, results, new)
        self.last = cache
        answer = rebuild(graph.returns, results)
        answer.pop(CACHE, None)
        answer[CACHE_ARGUMENT] = given if kwargs.get("use_cache", True) else None
        return answer

    def _known(self, graph: Graph, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a call by input path.

        Raises CaptureError for what the graph was not traced with, InputError for tensors of another kind.
        """
        flags, data = split_flags(arguments)
        module = self.host.get_submodule(graph.owner)
        data = prepare(module, without_unread(module, graph, data), graph.constants.get(TABLE))
        refuse_unknown(graph, flags, data)
        return self._fitted(graph, data)

    def _fitted(self, graph: Graph, data: dict[str, Any]) -> dict[str, torch.Tensor]:
        if graph.name not in self.kinds:
            self.kinds[graph.name] = input_kinds(graph)
        return fitted(graph, self.kinds[graph.name], dict(named_tensors(data)))

    def marks(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens of the prompt are visual, and which are not padding: bool[B, S] each."""
        if self.visual is None or self.valid is None or self.visual.shape != (batch, length):
            nothing = torch.zeros(batch, length, dtype=torch.bool, device=self.host.device)
            return nothing, ~nothing
        return self.visual, self.valid

    def _token_feeds(self, cache: CompiledCache, new: int, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch, device = feeds["inputs_embeds"].shape[0], feeds["inputs_embeds"].device
        extra = dict(cache.tensors)
        if feeds.get("attention_mask") is None:
            extra["attention_mask"] = torch.ones(batch, cache.seen + new, dtype=torch.long, device=device)
        if not cache.seen:
            visual, extra[VALID] = self.marks(batch, new)
            extra[VISUAL] = visual = self._marks_of_states(feeds, visual)
            extra[COUNT] = torch.arange(int(visual.sum(dim=1).min()), device=device)
            if VISUAL_SCORES in self.program.graphs[PREFILL].inputs:
                extra |= self._tower_feeds(visual)
        extra[SEEN] = torch.arange(cache.seen, device=device)
        for layer in cache.kept:
            cache.append(layer, new)
            extra[f"{KEPT}.{layer}"], extra[f"{ALIVE}.{layer}"] = cache.kept[layer], cache.alive[layer]
        return extra

    def _marks_of_states(self, feeds: dict[str, torch.Tensor], visual: torch.Tensor) -> torch.Tensor:
        """Which states of cross-attention are of pictures, bool[B, V], where a cut asks for that; else `visual`."""
        prefill, cuts = self.program.graphs[PREFILL], self.program.plan.cuts
        if prefill.constants.get(STATES_OF) != PROMPT or VISUAL not in prefill.inputs or not cuts or not cuts[0].states:
            return visual
        rows, count = feeds[cuts[0].states].shape[:2]
        known = self.visual
        if known is None or known.shape[1] != count or rows % len(known):
            given = "unknown" if known is None else f"{list(known.shape)}"
            raise InputError(
                f"which states of the encoder are of pictures is not known: each of {rows} rows has {count}, and the "
                f"prompt is {given}",
                where=cuts[0].states,
                do="give the prompt's input_ids, with the picture tokens of the processor",
            )
        return known.repeat_interleave(rows // len(known), dim=0)

    def _tower_feeds(self, visual: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tower's outputs for this prompt, scattered to the visual tokens; zeros elsewhere."""
        dense: dict[str, torch.Tensor] = {}
        empty = torch.zeros(0, device=visual.device)
        # A prompt without pictures gets keys of width 1, which are never read.
        for name, nothing in ((VISUAL_SCORES, empty), (VISUAL_KEYS, empty[:, None])):
            rows = torch.cat(self.seen_by_tower.get(name, [nothing]))
            if len(rows) != int(visual.sum()):
                raise PlanError(
                    f"the vision tower scored {len(rows)} tokens, the prompt has {int(visual.sum())} visual ones",
                    where=name,
                    do="choose a tokens.method that does not read the vision tower, or report this family",
                )
            dense[name] = rows.new_zeros(*visual.shape, *rows.shape[1:])
            dense[name][visual] = rows
        self.seen_by_tower = {}
        return dense

    def _store(self, graph: Graph, cache: CompiledCache, results: dict[str, torch.Tensor], new: int) -> None:
        """Store the cache outputs of a graph in the cache."""
        if graph.name not in self.remembered:
            self.remembered[graph.name] = [name for name in graph.outputs if name.root in (CACHE, STATE, KEPT, ALIVE)]
        tensors, kept, alive = cache.tensors, cache.kept, cache.alive
        for name in self.remembered[graph.name]:
            if name.root in (CACHE, STATE):
                tensors[name] = results.pop(name)
            else:
                (kept if name.root == KEPT else alive)[name.layer] = results.pop(name)
        cache.seen += new


def _without(answer: Any, cache: Any) -> Any:
    """A model output without its cache."""
    return answer.__class__(**{name: value for name, value in answer.items() if value is not cache})


def _pick(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    missing = [name for name in graph.inputs if name not in feeds]
    if missing:
        raise CalibrationError(
            f"the {graph.name} graph was traced with inputs that this call does not have: {', '.join(missing)}",
            where=f"{graph.name}, given {', '.join(sorted(feeds)) or 'nothing'}",
            do="compile with a calibration sample of the same kind as the inputs you run",
        )
    return {name: feeds[name] for name in graph.inputs}
