"""The printed graph: equal for equal graphs, with short names for sizes and comments for layers."""

from __future__ import annotations

import math

import expecttest
import pytest
import torch
from torch import fx
from torch.export import Dim
from torch.fx.graph import CodeGen

from qpcompile.ir.names import names
from qpcompile.ir.operators import KV_WRITE
from qpcompile.ir.program import Graph
from qpcompile.ir.text import graph_text, module_path, target_text
from qpcompile.ir.types import TYPE, parse_type, value_types

aten = torch.ops.aten


class Block(torch.nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.proj(x))


class Decoder(torch.nn.Module):
    """Two layers and a norm, on tokens and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block()])

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        x = torch.cat([x, x], dim=1)[:, 1:]
        return x.reshape(x.shape[0], -1).to(torch.float16) * mask.shape[0]


@pytest.fixture(scope="module")
def decoder() -> Graph:
    """The decoder traced with every size symbolic."""
    example = (torch.ones(3, dtype=torch.bool), torch.ones(2, 5, 4))
    shapes = {"mask": {0: Dim.AUTO}, "x": {0: Dim.AUTO, 1: Dim.AUTO}}
    exported = torch.export.export(Decoder(), example, dynamic_shapes=shapes)
    module = exported.module(check_guards=False)
    module.graph.set_codegen(CodeGen())
    for node in module.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = module.get_parameter(str(node.target))
        if node.op == "output":
            node.args = (tuple(node.args[0]),)  # type: ignore[arg-type]
    return Graph("prefill", module, names(("mask", "x")), names(("hidden",)), "model.language_model")


def test_traced_graph(decoder: Graph) -> None:
    expecttest.assert_expected_inline(
        graph_text(decoder),
        """\
graph prefill of model.language_model
%0 = input mask : bool[S0]
%1 = input x : f32[B, S1, 4]
%2 = aten::sym_size.int(%0, 0) : int S0
%3 = aten::sym_size.int(%1, 0) : int B
# layers.0
@layers.0.proj.weight : f32[4, 4]
%4 = aten::linear(%1, @layers.0.proj.weight) : f32[B, S1, 4]
%5 = aten::relu(%4) : f32[B, S1, 4]
# layers.1
@layers.1.proj.weight : f32[4, 4]
%6 = aten::linear(%5, @layers.1.proj.weight) : f32[B, S1, 4]
%7 = aten::relu(%6) : f32[B, S1, 4]
# top
%8 = aten::cat([%7, %7], 1) : f32[B, 2*S1, 4]
%9 = aten::slice.Tensor(%8, 0, 0, end) : f32[B, 2*S1, 4]
%10 = aten::slice.Tensor(%9, 1, 1, end) : f32[B, 2*S1-1, 4]
%11 = aten::reshape(%10, [%3, -1]) : f32[B, 8*S1-4]
%12 = aten::_assert_tensor_metadata(%11, dtype=f32, device=cpu, layout=strided)
%13 = aten::to.dtype(%11, f16) : f16[B, 8*S1-4]
%14 = aten::mul.Tensor(%13, %2) : f16[B, 8*S1-4]
return hidden = %14
""",
    )


def test_text_is_the_same_every_time(decoder: Graph) -> None:
    assert graph_text(decoder) == graph_text(decoder)


def plain(*targets: tuple[object, tuple[object, ...], object]) -> Graph:
    """A graph of one input and these calls on it, each with its value; it returns the last one."""
    made = fx.Graph()
    node = x = made.placeholder("x")
    x.meta["val"] = torch.empty(2, 4)
    for target, args, value in targets:
        node = made.call_function(target, (x, *args))  # type: ignore[arg-type]
        if value is not None:
            node.meta["val"] = value
    made.output((node,))
    return Graph("part", fx.GraphModule(torch.nn.Module(), made), names(("masks.full",)), names(("out.0",)), "")


def test_names_of_inputs_and_outputs_are_paths() -> None:
    assert graph_text(plain((aten.relu.default, (), torch.empty(2, 4)))) == (
        "graph part\n%0 = input masks.full : f32[2, 4]\n%1 = aten::relu(%0) : f32[2, 4]\nreturn out.0 = %1\n"
    )


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (torch.bfloat16, "bf16"),
        (torch.complex64, "complex64"),
        (torch.device("cpu"), "cpu"),
        (torch.strided, "strided"),
        (torch.contiguous_format, "contiguous_format"),
        (0.1, "0.1"),
        (-math.inf, "-inf"),
        (None, "None"),
        (True, "True"),
        (2**63 - 1, "end"),
        ("floor", "'floor'"),
        ([1, [2, None]], "[1, [2, None]]"),
    ],
)
def test_arguments(argument: object, text: str) -> None:
    assert f"aten::relu(%0, {text})" in graph_text(plain((aten.relu.default, (argument,), None)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(2, 3, dtype=torch.uint8), "u8[2, 3]"),
        (torch.tensor(1.0, dtype=torch.bfloat16), "bf16[]"),
        ((torch.empty(2, dtype=torch.int8), torch.empty(1)), "(i8[2], f32[1])"),
        (7, "int 7"),
        (True, "bool True"),
    ],
)
def test_types(value: object, text: str) -> None:
    assert str(list(value_types(plain((aten.relu.default, (), value))).values())[1]) == text


def test_kept_type_stands_in_for_a_value() -> None:
    graph = plain((aten.relu.default, (), None))
    graph.nodes[1].meta[TYPE] = parse_type("f32[B, S0]")
    assert "%1 = aten::relu(%0) : f32[B, S0]\n" in graph_text(graph)


def test_parts_of_the_model() -> None:
    graph = plain(*[(aten.relu.default, (), None)] * 5)
    for node, path in zip(graph.nodes[1:], ("", "a.layers.3.mlp", "a.layers.3", "norm", None), strict=False):
        if path is not None:
            node.meta["nn_module_stack"] = {"k": ("", ""), "l": (path, "")}
    comments = [line for line in graph_text(graph).splitlines() if line.startswith("#")]
    assert comments == ["# top", "# a.layers.3", "# norm"]
    assert module_path(graph.nodes[2]) == "a.layers.3.mlp" and module_path(graph.nodes[5]) is None


@pytest.mark.parametrize(
    ("target", "text"),
    [(aten.add.Tensor, "aten::add.Tensor"), (KV_WRITE, "qpcompile::kv_write"), (torch.sym_max, "torch.sym_max")],
)
def test_targets(target: object, text: str) -> None:
    assert target_text(target) == text
