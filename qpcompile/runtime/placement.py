"""Compute on one device with the tensors of a program on another.

The graphs and the host of a program stay at `home`: in host memory, or mapped from a file. A node's weights are copied
to `device` when it is computed and freed after their last reader, or held there for the turn of a block; results that
outlive the turn come back. So at most one block is on the accelerator, and one sample. Where both are the same device,
nothing is copied. A tensor that a pass makes for the program is moved to a file if the compile was given a folder.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qpcompile.errors import KernelError
from qpcompile.ir.edit import get_tensor
from qpcompile.ir.mapped_tensors import Offload
from qpcompile.ir.program import Graph, Program
from qpcompile.runtime.devices import on_device
from qpcompile.runtime.machine import execute_graph


class Placement:
    """See the module's docstring."""

    def __init__(self, home: torch.device, device: torch.device, offload: Offload | None = None) -> None:
        self.home, self.device, self.offload = home, device, offload or Offload()
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    @classmethod
    def of(cls, program: Program) -> Placement:
        """Where a program's passes compute: `program.device`, or else where its tensors are."""
        modules = [graph.module for graph in program.graphs.values()]
        tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        home = next((tensor.device for tensor in tensors), torch.device("cpu"))
        return cls(home, program.device or home, program.offload)

    @property
    def apart(self) -> bool:
        """Whether anything is copied."""
        return self.device != self.home

    def there(self, value: Any) -> Any:
        """A tensor on the device; so are all in a nested structure, and other values unchanged."""
        return self._moved(value, self.device)

    def back(self, value: Any) -> Any:
        """The inverse of `there`."""
        return self._moved(value, self.home)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor of the program: at home, or in a file."""
        return self.offload.keep(self.back(tensor))

    def _moved(self, value: Any, device: torch.device) -> Any:
        if not self.apart:
            return value
        return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)

    def weight(self, module: torch.nn.Module, name: str) -> torch.Tensor:
        """The tensor called `name` (dotted) of a graph's module, on the device."""
        tensor = get_tensor(module, name)
        if not self.apart or self._held is None:
            return self.there(tensor)
        # The original is kept with its copy: its id is then not that of another tensor.
        if id(tensor) not in self._held:
            self._held[id(tensor)] = tensor, self.there(tensor)
        return self._held[id(tensor)][1]

    @contextmanager
    def holding(self) -> Generator[None]:
        """The turn of a block: until its end a weight is copied once."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call; devices among them, which tracing recorded, become this device."""
        return on_device(node, self.device) if self.apart else (node.args, node.kwargs)

    def run(self, graph: Graph, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a whole graph; feeds and results are at home."""
        if not self.apart:
            return execute_graph(graph, dict(feeds))
        return run_placed(PlacedInterpreter(graph, self), feeds)


class PlacedInterpreter(fx.Interpreter):
    """Runs a graph on a placement's device; values are freed after their last reader."""

    def __init__(self, graph: Graph, on: Placement) -> None:
        super().__init__(graph.module, garbage_collect_values=True)
        self.placed, self.on = graph, on

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, on the device."""
        args, kwargs = self.on.arguments(n)
        return fx.map_arg(args, self.value_of), fx.map_arg(kwargs, self.value_of)

    def value_of(self, node: fx.Node) -> Any:
        """A value on the device. Traces read all weights first: here each is copied when an operator needs it."""
        value = self.env[node]
        return self.on.there(value) if node.op == "get_attr" else value


def run_placed(interpreter: PlacedInterpreter, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run on tensors at home, named by input path; results are at home, named by output path."""
    graph, on = interpreter.placed, interpreter.on
    with torch.no_grad():
        results = interpreter.run(*[on.there(feeds[name]) for name in graph.inputs])
    return dict(zip(graph.outputs, on.back(results), strict=True))


def compute_device(device: torch.device | str | int) -> torch.device:
    """The device with its number, if torch can compute there. Raises KernelError saying what torch sees."""
    try:
        found = torch.device(device)
        if found.type != "meta":
            return torch.ones(2, device=found).add(1).device
        reason = "it has no memory and computes nothing"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise KernelError(
        f"passes cannot compute on {device}: {reason}",
        where="device",
        do=f"torch {torch.__version__} sees {', '.join(_seen())} here: name one of them, or leave the device out",
    )


def _seen() -> list[str]:
    """The devices that torch can compute on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    return ["cpu", *(f"{accelerator}:{number}" for number in range(count))]
