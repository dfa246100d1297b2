"""Trace the host's code between a fixed-size vision tower and its projector as a small graph.

    pixel_values -> [tower graph] -> choose a layer, drop the class token, ... -> [projector graph] -> image features

The middle is the host's own code, traced from the tower's results to the projector's inputs. After the projector the
host may only split the features by picture, not change them; this is checked on random pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_flatten

from qpcompile.errors import ExportError, QPCompileError
from qpcompile.ir.program import PROJECTOR, VISION, Graph, Program
from qpcompile.ir.structure import named_tensors, rebuild
from qpcompile.runtime.arguments import keyword_arguments
from qpcompile.runtime.fixed_values import VALUES, of_call, of_values, varying
from qpcompile.runtime.prepare import TABLE, moved, prepare

PICTURES = "pixel_values"
Answer = Callable[[torch.nn.Module, dict[str, Any]], Any]


@dataclass(frozen=True)
class Chain:
    """The graph from tower to projector (None without a projector) and which output holds the image features."""

    between: Graph | None
    features: str


def host_chain(program: Program) -> Chain | None:
    """The chain of a fixed-size tower, or None if the host does anything else."""
    shape = picture_shape(program)
    tower, projector = program.graphs[VISION], program.graphs.get(PROJECTOR)
    if shape is None or tower.inputs != (PICTURES,):
        return None
    host: Any = program.host
    try:
        return _chain(program, tower, projector, shape)
    except QPCompileError:
        raise
    except Exception as error:
        raise ExportError(
            f"the way {type(host).__name__} takes pictures into its tower cannot be traced: {error}",
            where=VISION,
            do="use the compiled module: this family cannot be written as an ONNX folder yet",
        ) from error


def _chain(program: Program, tower: Graph, projector: Graph | None, shape: tuple[int, int, int]) -> Chain | None:
    host: Any = program.host
    pictures = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(host.dtype)
    with torch.no_grad():
        returned = tower({PICTURES: pictures})
        between = None if projector is None else _trace(program, projector, returned)
        candidates = returned if projector is None or between is None else projector(between(returned))
        with answering(host, [tower, *([projector] if projector else [])]):
            found = host.get_image_features(pictures)
    wanted = _rows(getattr(found, "pooler_output", found))
    for name, value in candidates.items():
        if value.ndim > 1 and value.flatten(0, -2).shape == wanted.shape and torch.equal(value.flatten(0, -2), wanted):
            return Chain(between, name)
    return None


def picture_shape(program: Program) -> tuple[int, int, int] | None:
    """Channels, height and width of the pictures of a fixed-size tower."""
    host: Any = program.host
    config = host.config.vision_config
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _rows(features: Any) -> torch.Tensor:
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    return torch.cat([part.flatten(0, -2) for part in parts])


def _trace(program: Program, projector: Graph, returned: dict[str, torch.Tensor]) -> Graph:
    """From the tower's results to the projector's inputs."""
    tower = program.graphs[VISION]
    module = _Between(program.host, tower, projector, picture_shape(program) or (0, 0, 0))
    args = tuple(returned[path] for path in tower.outputs)
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in args)
    exported = torch.export.export(module, args, dynamic_shapes=(shapes,), strict=False).module(check_guards=False)
    exported.graph.set_codegen(CodeGen())
    output = next(node for node in reversed(exported.graph.nodes) if node.op == "output")
    values, _ = tree_flatten(output.args[0])
    output.args = (tuple(values),)
    return Graph("between", fx.GraphModule(exported, exported.graph), tower.outputs, projector.inputs, "")


class _Reached(Exception):
    """Carries the projector's arguments out of the host's code."""

    def __init__(self, feeds: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.feeds = feeds


class _Between(torch.nn.Module):
    """The host's code, given the tower's results, up to the call of the projector."""

    def __init__(self, host: torch.nn.Module, tower: Graph, projector: Graph, shape: tuple[int, int, int]) -> None:
        super().__init__()
        # In a tuple, so that the host is not registered as a submodule.
        self.held = (host, tower, projector)
        self.shape = shape

    def forward(self, *returned: torch.Tensor) -> tuple[torch.Tensor, ...]:
        host, tower, projector = self.held
        results: dict[str, torch.Tensor] = dict(zip(tower.outputs, returned, strict=True))
        pictures = returned[0].new_zeros(returned[0].shape[0], *self.shape)

        def stop(_: torch.nn.Module, arguments: dict[str, Any]) -> Any:
            raise _Reached(dict(named_tensors(arguments)))

        calls: dict[torch.nn.Module, Answer] = {
            host.get_submodule(tower.owner): lambda *_: rebuild(tower.returns, results),
            host.get_submodule(projector.owner): stop,
        }
        with replaced(calls):
            try:
                host.get_image_features(pictures)  # type: ignore[operator]
            except _Reached as reached:
                return tuple(reached.feeds[path] for path in projector.inputs)
        return ()


@contextmanager
def answering(host: torch.nn.Module, graphs: Iterable[Graph]) -> Iterator[None]:
    """Within the block, the host's components run their graphs: one each, or that of the values of a call, if any."""
    owned: dict[str, list[Graph]] = {}
    for graph in graphs:
        owned.setdefault(graph.owner, []).append(graph)

    def run(own: Sequence[Graph]) -> Answer:
        def answer(module: torch.nn.Module, arguments: dict[str, Any]) -> Any:
            graph = own[0]
            if VALUES in graph.constants:
                given = of_call(arguments)
                if (found := of_values(own, given)) is None:
                    return type(module).forward(module, **arguments)
                graph, data = found, moved(module, varying(given))
            else:
                data = prepare(module, arguments, graph.constants.get(TABLE))
            feeds = dict(named_tensors(data))
            return rebuild(graph.returns, graph({name: feeds[name] for name in graph.inputs}))

        return answer

    with replaced({host.get_submodule(owner): run(own) for owner, own in owned.items()}):
        yield


@contextmanager
def replaced(answers: Mapping[torch.nn.Module, Answer]) -> Iterator[None]:
    """Within the block, calls of modules are replaced by functions of the module and its arguments by name."""
    before = {module: module.__dict__.get("forward") for module in answers}
    for module, answer in answers.items():
        module.forward = _forward(module, answer)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _forward(module: torch.nn.Module, answer: Answer) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer(module, keyword_arguments(module, args, kwargs))
