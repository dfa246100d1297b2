"""Bind the graphs of a program to CPU kernels, called directly without torch's dispatcher.

If the C kernels are compiled (kernels/native/library.py), row operators are bound to their weights (row_plans.py) and
linears read theirs in 4 bits. If not, the weight is unpacked once, since torch would do it on every call:

    %y = qpcompile::linear_int(%q, %s, @w, @w_scale, @b, f32, 4)      @w: u8[N, ceil(K / 2)]
      -> %y = linear_unpacked(%q, %s, @w_codes, @w_scale, @b, f32, 4)  @w_codes: i8[N, K], unpacked here

Decode steps on caches of codes are replayed by one call of C (tape.py).

The program itself is unchanged: saved, exported and reported weights keep 4 bits. An unpacked weight takes one more
byte per parameter in memory, shared between prefill and decode. Results are bit-identical, except for the summation
order in torch_operators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qpcompile.errors import KernelError
from qpcompile.ir.edit import calls, get_tensor, set_tensor
from qpcompile.ir.operators import LINEAR_INT, SPECS
from qpcompile.ir.program import DECODE, Graph, Program
from qpcompile.kernels.linear_int.cpu import linear_unpacked
from qpcompile.kernels.linear_int.packing import unpack_int4
from qpcompile.kernels.native import library as native
from qpcompile.runtime.cpu.row_plans import bind_rows
from qpcompile.runtime.cpu.tape import TapedDecode
from qpcompile.runtime.cpu.torch_operators import FASTER
from qpcompile.runtime.growing_cache import GrowingCaches, grow_in_place

# CPU kernels of these operators; torch's dispatcher costs as much as a kernel on one token.
KERNELS: dict[Any, Callable[..., Any]] = {
    **FASTER,
    **{spec.overload: spec.cpu for spec in SPECS if spec.cpu is not None},
}
Codes = dict[int, torch.Tensor]
UNFIT = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError)
"""Exceptions that Python and torch raise for mismatched operands."""


class BoundGraphs:
    """Runs the graphs of one program: `bound(graph, feeds)` is a faster `graph(feeds)`."""

    def __init__(self, program: Program) -> None:
        codes: Codes = {}
        caches = GrowingCaches()
        self.modules: dict[str, fx.GraphModule | TapedDecode] = {}
        for name, graph in program.graphs.items():
            bound = _bound(graph, codes, caches)
            self.modules[name] = TapedDecode(bound, caches) if name == DECODE else bound.module

    @property
    def decode_problem(self) -> str:
        """Why decode steps run node by node; empty if they are replayed by one C call (tape.py)."""
        decode = self.modules.get(DECODE)
        return decode.problem if isinstance(decode, TapedDecode) else "there is no decode graph"

    def __call__(self, graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            with torch.no_grad():
                results = self.modules[graph.name](*[feeds[name] for name in graph.inputs])
        except torch.OutOfMemoryError:
            raise
        except UNFIT as error:
            # Kernels check their operands; errors of torch's operators surface here.
            raise KernelError(
                f"{type(error).__name__}: {error}",
                where=f"the graph {graph.name}",
                do="compile again, if it came from a folder: its graphs and tensors do not belong together",
            ) from error
        return dict(zip(graph.outputs, results, strict=True))


def _bound(graph: Graph, codes: Codes, caches: GrowingCaches) -> Graph:
    """A copy of the graph on the same tensors, bound to kernels; `codes` holds unpacked weights by address."""
    own = fx.Graph()
    own.output(own.graph_copy(graph.module.graph, {}))
    module = fx.GraphModule(graph.module, own)
    bound = Graph(graph.name, module, graph.inputs, graph.outputs, graph.owner)
    tensors = [get_tensor(module, str(node.target)) for node in own.nodes if node.op == "get_attr"]
    elsewhere = any(tensor.device.type != "cpu" for tensor in tensors)
    grow_in_place(bound, caches, packed_codes=elsewhere)
    if elsewhere:
        module.recompile()
        return bound
    if native.available():
        bind_rows(bound)
    else:
        for node in list(calls(bound, LINEAR_INT)):
            _unpack(module, node, codes)
    for node in calls(bound, *KERNELS):
        node.target = KERNELS[node.target]
    own.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return bound


def _unpack(module: fx.GraphModule, linear: fx.Node, codes: Codes) -> None:
    """Bind one linear to its unpacked weight, if it is packed."""
    source = linear.args[2]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return
    packed = get_tensor(module, str(source.target))
    if packed.dtype != torch.uint8:
        return
    if packed.data_ptr() not in codes:
        codes[packed.data_ptr()] = unpack_int4(packed, 2 * packed.shape[1])
    name = f"{source.target}_codes"
    set_tensor(module, name, codes[packed.data_ptr()])
    with module.graph.inserting_before(linear):
        linear.update_arg(2, module.graph.get_attr(name))
    linear.target = _linear


def _linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    bits: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear_int on codes: i8[N, 2 ceil(K / 2)], whose last column is padding where K is odd."""
    y = linear_unpacked(q, scale, codes[:, : q.shape[-1]], weight_scale, bias, dtype)
    return y if residual is None else y + residual
