"""Profile the first token of a compiled model: python tests/bench/cpu_profile.py SHAPE FOLDER [ROUNDS]

FOLDER is a compiled model, as `cpu.py` makes one in build/bench/SHAPE/ours-bfloat16/quota-30. One thread. The bound
graphs of vision tower, prefill and head run node by node; milliseconds of CPU time by graph, operator and sizes of the
result, the minimum over rounds. The host's own code between them is not included.
"""

import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from cpu_models import model_inputs
from cpu_shapes import SHAPES
from torch import fx

import qpcompile
from qpcompile.ir.program import Graph
from qpcompile.runtime.cpu.bind import BoundGraphs
from qpcompile.runtime.machine import Machine

SHOWN = 25
Place = tuple[str, str, str]


class Timed(fx.Interpreter):
    """Adds the CPU time of every call to `spent` and counts it in `calls`."""

    def __init__(self, name: str, module: fx.GraphModule, spent: dict[Place, float], calls: Counter[Place]) -> None:
        super().__init__(module)
        self._name, self._spent, self._calls = name, spent, calls

    def run_node(self, n: fx.Node) -> Any:
        start = time.thread_time()
        result = super().run_node(n)
        if n.op == "call_function":
            place = self._name, getattr(n.target, "__qualname__", str(n.target)), sizes(result)
            self._spent[place] += time.thread_time() - start
            self._calls[place] += 1
        return result


def sizes(result: Any) -> str:
    """The sizes of the tensors that an operator returned."""
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return " ".join(str(list(each.shape)) for each in tensors if isinstance(each, torch.Tensor))


def main(shape: str, folder: str, rounds: str = "3") -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model = qpcompile.load(Path(folder))
    bound = BoundGraphs(model.program)
    spent: dict[Place, float] = defaultdict(float)
    calls: Counter[Place] = Counter()

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        module = bound.modules[graph.name]
        assert isinstance(module, fx.GraphModule)
        with torch.no_grad():
            results = Timed(graph.name, module, spent, calls).run(*[feeds[path] for path in graph.inputs])
        return dict(zip(graph.outputs, results, strict=True))

    machine, inputs = Machine(model.program, execute), model_inputs(SHAPES[shape], {"prompt": 0}, model.dtype)
    least: dict[Place, float] = defaultdict(lambda: float("inf"))
    for _ in range(int(rounds) + 1):
        spent.clear()
        calls.clear()
        machine.prefill(inputs)
        for place, seconds in spent.items():
            least[place] = min(least[place], seconds)
    print(f"{1e3 * sum(least.values()):.0f} ms in {sum(calls.values())} calls\n")
    print("| graph | operator | result | calls | ms |\n| --- | --- | --- | --- | --- |")
    for place in sorted(least, key=least.__getitem__, reverse=True)[:SHOWN]:
        print(f"| {' | '.join(place)} | {calls[place]} | {1e3 * least[place]:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
