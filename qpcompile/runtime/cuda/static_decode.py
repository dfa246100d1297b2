"""Decode steps with static shapes and addresses, so that a CUDA graph can capture them.

Caches have a capacity of one bucket of tokens, chosen per group of layers: 256, 512, 1024, ... For every batch size and
choice of buckets there is one `Step`: its buffers, and the static graph (static_graph.py) on them. An answer's first
step copies its caches in; each further step copies the new token's embeddings, positions and mask, and replays. A full
cache moves to the next bucket. When the cache is accessed in between (beam search, a second answer that needs the same
step), it is copied out.

The same steps run without capture on every device. There results equal those of growing caches, except for the
summation order in `scaled_dot_product_attention`, which reads masked slots as zeros.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.ir.names import CACHE, Name
from qpcompile.ir.program import DECODE, Program
from qpcompile.runtime.cuda.static_graph import FILLED, FULL, GROWING, OPEN, SLOT, TOKENS, StaticGraph, static_graph
from qpcompile.runtime.growing_cache import ROOM
from qpcompile.runtime.kv_cache import CompiledCache
from qpcompile.runtime.machine import ALIVE, KEPT, SEEN

SMALLEST = 256
# Cached steps for later answers; the least recently used one is evicted.
STEPS = 4
WARM_UP = 3

Tensors = dict[str, Tensor]
Run = Callable[[], Tensors]
Capture = Callable[[Run], tuple[Callable[[], None], Tensors]]


def bucket(tokens: int) -> int:
    """The capacity of a cache that holds `tokens` and will grow: a power of two."""
    return max(SMALLEST, 1 << (tokens + ROOM - 1).bit_length())


class StaticDecode:
    """The decode steps of one program: `decode(cache, feeds)` processes one token and appends it to `cache`.

    capture: creates the replay function of a step, see `cuda_graph`; None runs it operator by operator.
    """

    def __init__(self, program: Program, capture: Capture | None = None) -> None:
        self._program, self._capture = program, capture
        self.captured: OrderedDict[tuple[int, ...], Step] = OrderedDict()

    @functools.cached_property
    def graph(self) -> StaticGraph:
        """The decode graph with static shapes. Raises KernelError if that is impossible."""
        return static_graph(self._program.graphs[DECODE])

    def __call__(self, cache: CompiledCache, feeds: Tensors) -> Tensors:
        """Results by output path, without caches. feeds: the graph's inputs that are not in `cache`."""
        with torch.no_grad():
            step = self._step(cache, feeds)
            return step(feeds)

    def _step(self, cache: CompiledCache, feeds: Tensors) -> Step:
        """The step whose buffers hold the cache, with room for one more token."""
        for step in self.captured.values():
            if step.holds(cache) and step.room:
                return step
        lengths = {FULL: cache.seen, **{str(layer): kept.shape[1] for layer, kept in cache.kept.items()}}
        sizes = {group: bucket(lengths[group]) for group in self.graph.groups}
        key = (feeds["inputs_embeds"].shape[0], *sizes.values())
        if key not in self.captured:
            while len(self.captured) >= STEPS:
                self.captured.popitem(last=False)[1].free()
            self.captured[key] = Step(self.graph, sizes, cache, feeds, self._capture)
        self.captured.move_to_end(key)
        self.captured[key].take(cache, lengths)
        return self.captured[key]


class Step:
    """The buffers for one batch size and one choice of buckets, and the step on them. It holds one cache at a time.

    sizes: group of layers -> slots C of its caches.
    """

    def __init__(
        self, graph: StaticGraph, sizes: dict[str, int], cache: CompiledCache, feeds: Tensors, capture: Capture | None
    ) -> None:
        self._graph, self._sizes, self.room = graph, sizes, 0
        self._cache: Callable[[], CompiledCache | None] = lambda: None
        embeds = feeds["inputs_embeds"]
        batch, device = embeds.shape[0], embeds.device
        self._slots = torch.zeros(len(sizes), dtype=torch.int64, device=device)
        self._numbers = {group: torch.arange(size, device=device) for group, size in sizes.items()}
        self._buffers: Tensors = {}
        for path in graph.inputs:
            kind, rest = Name(path).root, Name(path).rest
            if kind == CACHE:
                like, size = cache.tensors[path], sizes[graph.group_of[path]]
                self._buffers[path] = like.new_zeros(*like.shape[:2], size, *like.shape[3:])
            elif kind == KEPT:
                self._buffers[path] = self._slots.new_zeros(batch, sizes[rest])
            elif kind == ALIVE:
                self._buffers[path] = torch.ones(batch, sizes[rest], dtype=torch.bool, device=device)
            elif kind == SEEN:
                self._buffers[path] = self._numbers[FULL][:-1]
            elif path in graph.mask_axes:
                mask = feeds.get(path)
                mask = embeds.new_ones(batch, 1, dtype=torch.int64) if mask is None else mask
                shape = list(mask.shape)
                shape[graph.mask_axes[path]] = sizes[FULL]
                self._buffers[path] = mask.new_zeros(shape)
            elif path in feeds:
                self._buffers[path] = torch.zeros_like(feeds[path])
            elif kind not in (TOKENS, SLOT, OPEN, FILLED):
                raise KernelError(
                    f"the decode graph takes {path}, which this step does not have",
                    where="decode with fixed sizes",
                    do=f"compile with a calibration sample of the same kind as the inputs you run, or {GROWING}",
                )
        self._replay, self._results = _captured(capture, self._advance) if capture else (None, {})

    @property
    def replays(self) -> bool:
        """Whether the step is replayed, not run operator by operator."""
        return self._replay is not None

    def holds(self, cache: CompiledCache) -> bool:
        """Whether the cache's tokens are in these buffers."""
        # A cache that was cleared in between no longer refers to this step, or is in another one.
        return cache.bring == self._give

    def take(self, cache: CompiledCache, lengths: dict[str, int]) -> None:
        """Copy the cache in; the previous cache gets its tokens back. lengths: tokens per group."""
        tensors, kept, alive = cache.tensors, cache.kept, cache.alive
        self.free()
        for path, buffer in self._buffers.items():
            kind, rest = Name(path).root, Name(path).rest
            if kind == CACHE:
                buffer.zero_()
                buffer[:, :, : tensors[path].shape[2]] = tensors[path]
            elif kind == KEPT:
                count = lengths[rest]
                # Every new token is kept, at its own position; slots that are never filled have arbitrary positions.
                buffer[:] = (self._numbers[rest] + (lengths[FULL] - count)).clamp(0, self._sizes[FULL] - 1)
                buffer[:, :count] = kept[int(rest)]
            elif kind == ALIVE:
                buffer.fill_(True)
                buffer[:, : lengths[rest]] = alive[int(rest)]
            elif path in self._graph.mask_axes:
                buffer.zero_()
        self._slots.copy_(torch.tensor([lengths[group] for group in self._sizes]))
        self._start, self.room = dict(lengths), min(size - lengths[group] for group, size in self._sizes.items())
        self._taken = 0
        self._cache, cache.bring = weakref.ref(cache), self._give
        cache.clear()

    def free(self) -> None:
        """Copy the tokens back to the current cache before the buffers are released."""
        held = self._cache()
        if held is not None and self.holds(held):
            held.come_back()

    def _give(self, cache: CompiledCache) -> None:
        """Copy the tokens out into `cache`, the one currently held."""
        counts = {group: count + self._taken for group, count in self._start.items()}
        tensors, kept, alive = cache.parts
        for path, buffer in self._buffers.items():
            kind, rest = Name(path).root, Name(path).rest
            if kind == CACHE:
                tensors[path] = buffer[:, :, : counts[self._graph.group_of[path]]].clone()
            elif kind in (KEPT, ALIVE):
                (kept if kind == KEPT else alive)[int(rest)] = buffer[:, : counts[rest]].clone()
        self._cache, self.room = lambda: None, 0

    def __call__(self, feeds: Tensors) -> Tensors:
        """Process one token: changed inputs are copied in, results are copied out."""
        cache = self._cache()
        assert cache is not None and self.room > 0
        for path, axis in self._graph.mask_axes.items():
            mask, buffer = feeds.get(path), self._buffers[path]
            if mask is None:
                buffer.fill_(1)
            else:
                buffer.narrow(axis, 0, mask.shape[axis]).copy_(mask)
        for path in self._graph.inputs:
            if path in feeds and path not in self._graph.mask_axes:
                self._set(path, feeds[path])
        if self._replay is not None:
            self._replay()
            results = self._results
        else:
            results = self._advance()
        self._taken, self.room, cache.seen = self._taken + 1, self.room - 1, cache.seen + 1
        return {path: each.clone() for path, each in results.items()}

    def _set(self, path: str, value: Tensor) -> None:
        if value.shape != self._buffers[path].shape:
            raise KernelError(
                f"{path} was {tuple(self._buffers[path].shape)} in the step before and is {tuple(value.shape)} now",
                where="decode with fixed sizes",
                do=GROWING,
            )
        self._buffers[path].copy_(value)

    def _advance(self) -> Tensors:
        """The step itself: nothing in it depends on host values."""
        feeds = dict(self._buffers)
        feeds[TOKENS] = self._slots[0]
        for place, (group, numbers) in enumerate(self._numbers.items()):
            slot = self._slots[place : place + 1]
            is_open = numbers <= slot
            feeds |= {
                f"{SLOT}.{group}": slot,
                f"{FILLED}.{group}": slot + 1,
                f"{OPEN}.{group}": is_open[None, None, None],
            }
            if group != FULL:
                feeds[f"{ALIVE}.{group}"] = self._buffers[f"{ALIVE}.{group}"] & is_open
        outputs = self._graph.module(*[feeds[path] for path in self._graph.inputs])
        self._slots += 1
        return dict(zip(self._graph.outputs, outputs, strict=True))


def _captured(capture: Capture, run: Run) -> tuple[Callable[[], None], Tensors]:
    """Capture `run`; a failure becomes a KernelError with a workaround."""
    try:
        return capture(run)
    except RuntimeError as error:
        raise KernelError(
            f"the decode step cannot be captured: {str(error).strip().splitlines()[0]}", where="decode", do=GROWING
        ) from error


def cuda_graph(run: Run) -> tuple[Callable[[], None], Tensors]:
    """Capture `run` on the current CUDA device: returns the replay function, and the tensors of its results.

    Warm-up runs compile kernels and fill caches (tiles, factors of rotations), which must not happen during capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results
