"""Time calls on a GPU: many calls in one CUDA graph, replayed in turns with the calls they are compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Times:
    """Seconds per call: the median over rounds, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def summary(seconds: Sequence[float]) -> Times:
    """The median and the 10th and 90th percentile of measured times."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return Times(median(ordered), ordered[tenth], ordered[-1 - tenth])


def copies_beyond(cache: int, size: int) -> int:
    """The number of tensors of `size` bytes that fill the cache twice: used in turns, none is still cached."""
    return max(2, -(-2 * cache // size))


def interleaved(groups: Sequence[Sequence[Call]], rounds: int = 25, least: float = 2e-3) -> list[Times]:
    """The time of one call of each group; a group is the same work on different weights, in turns.

    Each group is one graph of at least `least` seconds. A round replays every graph once, so that a change of clock
    rates affects all of them.
    """
    graphs = [_graph(calls, least) for calls in groups]
    seconds: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for (graph, count), found in zip(graphs, seconds, strict=True):
            found.append(_replay(graph) / count)
    return [summary(each) for each in seconds]


def _graph(calls: Sequence[Call], least: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """A captured graph of full cycles through `calls`, and its number of calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
    torch.cuda.synchronize()
    once = _capture(calls)
    _replay(once)
    turns = max(1, round(least / max(_replay(once), 1e-6)))
    return (once, len(calls)) if turns == 1 else (_capture(list(calls) * turns), len(calls) * turns)


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
