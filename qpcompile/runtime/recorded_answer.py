"""An answer recorded step by step, and the prefill inputs of prompt and answer together.

    answer    prefill(prompt) -> y0     decode(t0, cache) -> y1     decode(t1, cache) -> y2   ...
    whole     prefill(prompt + t0 + t1 + ...) -> y0, y1, y2, ...

Values that the host derives from token ids are taken from the answer (embeddings, 4-D masks), values that it counts are
derived again on the longer prompt (positions, 2-D masks).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from qpcompile.ir.names import CACHE, STATE, Name
from qpcompile.ir.program import DECODE, HEAD, PREFILL, PROJECTOR, VISION, Graph, component_of
from qpcompile.runtime.machine import ALIVE, KEPT, Machine, execute_graph, visual_tokens
from qpcompile.runtime.model_inputs import DECODER_IDS, prompt_of
from qpcompile.runtime.prepare import MASK

Tensors = dict[str, Tensor]


class RecordedAnswer:
    """One answer of a machine.

    feeds, hidden: decoder inputs and outputs in the prefill and in each step, without caches. logits: of each step, if
    the program has a head that reads the decoder's output; a model may have layers of its own between them.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.feeds: list[Tensors] = []
        self.hidden: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.reads_hidden = True
        self._pictures: list[Tensors] = []

    @contextmanager
    def recording(self) -> Generator[None]:
        """The machine answers one prompt in this block."""
        with self._executing(self._note):
            yield

    def run_whole(self, sample: dict[str, Any], run: Callable[[Graph, Tensors], None]) -> None:
        """Call `run` with the prefill graph and its inputs for the prompt and all recorded tokens but the last."""
        pictures = list(self._pictures)

        def execute(graph: Graph, feeds: Tensors) -> Tensors:
            if component_of(graph.name) in (VISION, PROJECTOR):
                return dict(pictures.pop(0))
            if graph.name != PREFILL:
                return execute_graph(graph, feeds)
            run(graph, {path: self._whole_feed(path, feeds[path]) for path in graph.inputs})
            raise _Reached

        with self._executing(execute), suppress(_Reached):
            self.machine.prefill(self._longer(sample))

    @contextmanager
    def _executing(self, execute: Callable[[Graph, Tensors], Tensors]) -> Generator[None]:
        own = self.machine.execute
        self._own, self.machine.execute = own, execute
        try:
            yield
        finally:
            self.machine.execute, self.machine.last = own, None

    def _note(self, graph: Graph, feeds: Tensors) -> Tensors:
        results = self._own(graph, feeds)
        if graph.name in (PREFILL, DECODE):
            self.feeds.append({path: each.clone() for path, each in feeds.items() if not _state(path)})
            self.hidden.append(results[hidden_path(graph)].clone())
        elif graph.name == HEAD:
            self.logits.append(results[graph.outputs[0]].clone())
            read, given = feeds[graph.inputs[0]][:, -1], self.hidden[-1][:, -1]
            self.reads_hidden &= read.shape == given.shape and torch.equal(read, given)
        elif component_of(graph.name) in (VISION, PROJECTOR):
            self._pictures.append(dict(results))
        return results

    def _longer(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The prompt extended by as many text tokens as were decoded; their ids do not matter."""
        ids = prompt_of(sample)
        new = len(self.feeds) - 1
        text = ids[0][~torch.isin(ids[0], visual_tokens(self.machine.host.config).to(ids.device))]
        fill: dict[str, int] = {"input_ids": int(text[-1]), DECODER_IDS: int(text[-1]), MASK: 1}
        longer = dict(sample)
        # An encoder's prompt stays, though it may be as long as the decoder's.
        for key in [key for key in sample if DECODER_IDS not in sample or key.startswith("decoder_")]:
            tensor = sample[key]
            if isinstance(tensor, Tensor) and tensor.shape[:2] == ids.shape and not tensor.is_floating_point():
                # What a token sees of pictures, new tokens see as the last one does.
                last = tensor[:, -1:] if tensor.ndim > 2 else tensor.new_full((len(ids), 1), fill.get(key, 0))
                longer[key] = torch.cat([tensor, *[last] * new], dim=1)
        return longer

    def _whole_feed(self, path: str, derived: Tensor) -> Tensor:
        """A prefill input for all tokens: taken from the answer if it depends on the token ids."""
        parts = [step.get(path) for step in self.feeds]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            return derived
        if Name(path).root == MASK and derived.ndim == 4:
            return _joined_masks(derived, present)
        tokens = sum(part.shape[1] for part in present if part.ndim > 1)
        return torch.cat(present, dim=1) if of_tokens(derived) and derived.shape[1] == tokens else derived


class _Reached(Exception):
    """Raised when the longer prompt has reached the prefill graph."""


def hidden_path(graph: Graph) -> str:
    """The output that the head reads."""
    return next(path for path in graph.outputs if not _state(path))


def of_tokens(feed: Tensor) -> bool:
    """Whether a feed may have a vector per token, f[B, S, C], or one per token and layer, f[B, S, L, C]."""
    return feed.is_floating_point() and feed.ndim in (3, 4)


def _joined_masks(like: Tensor, parts: list[Tensor]) -> Tensor:
    """4-D masks of a prompt and of steps, [B, 1, 1, keys] each, as one [B, 1, S, S]; masked where no part applies."""
    closed = 0 if like.dtype == torch.bool else torch.finfo(like.dtype).min
    whole = torch.full_like(like, closed)
    row = 0
    for part in parts:
        whole[..., row : row + part.shape[2], : part.shape[3]] = part
        row += part.shape[2]
    return whole


def _state(path: str) -> bool:
    return Name(path).root in (CACHE, STATE, KEPT, ALIVE)
