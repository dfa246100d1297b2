"""Graphs as JSON: they round-trip, and only operators and arguments on the allow-list are accepted."""

from __future__ import annotations

import json
import math
import operator
from typing import Any

import pytest
import torch
from torch import fx

from qpcompile.emit.artifact.graph_json import FUNCTIONS, read_graph, write_graph
from qpcompile.errors import ArtifactError, ExportError
from qpcompile.ir.edit import layer_of, set_tensor
from qpcompile.ir.names import names
from qpcompile.ir.node_facts import QuantizedFact, quantized_fact, set_fact
from qpcompile.ir.program import Graph
from qpcompile.ir.text import graph_text

aten = torch.ops.aten
WEIGHT = torch.arange(6.0).reshape(2, 3)
KEYS = {"layers.0.weight": "model.layers.0.weight"}


def small_graph() -> Graph:
    """x -> two results, with a weight, sizes, a pair of results, lists and constants of many kinds."""
    root, made = torch.nn.Module(), fx.Graph()
    set_tensor(root, "layers.0.weight", WEIGHT)
    x = made.placeholder("x")
    rows = made.call_function(aten.sym_size.int, (x, 0))
    double = made.call_function(operator.mul, (rows, 2))
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    ones = made.call_function(aten.ones.default, ([double, 2],), where)
    weight = made.call_function(aten.t.default, (made.get_attr("layers.0.weight"),))
    linear = made.call_function(aten.linear.default, (ones, weight))
    linear.meta["nn_module_stack"] = {"a": ("", ""), "b": ("layers.0", ""), "c": ("layers.0.mlp", "")}
    set_fact(linear, QuantizedFact(("layers.0.mlp",), "reference"))
    low = made.call_function(aten.lt.Scalar, (linear, 2.5))
    filled = made.call_function(aten.masked_fill.Scalar, (linear, low, -math.inf))
    pair = made.call_function(aten.topk.default, (filled, 1), {"dim": 0, "largest": True})
    first, index = (made.call_function(operator.getitem, (pair, place)) for place in (0, 1))
    copy = made.call_function(aten.clone.default, (first,), {"memory_format": torch.contiguous_format})
    made.output((copy, index))
    returns: Any = {"a": ["a.0", None], "b": "b"}
    return Graph(
        "part", fx.GraphModule(root, made), names(("x",)), names(("a.0", "b")), "model", returns, {"flag": True}
    )


def read(text: str) -> Graph:
    """Read with the one tensor stored."""
    return read_graph(text, {"model.layers.0.weight": WEIGHT}, "graph/part.json")


def test_graph_comes_back_whole() -> None:
    graph = small_graph()
    text = write_graph(graph, KEYS)
    again = read(text)
    feeds = {"x": torch.zeros(3, 1)}
    for name, value in graph(feeds).items():
        assert torch.equal(again(feeds)[name], value)
    for name in ("name", "inputs", "outputs", "owner", "returns", "constants"):
        assert getattr(again, name) == getattr(graph, name)
    linear = next(node for node in again.nodes if node.target is aten.linear.default)
    assert layer_of(linear) == 0
    assert quantized_fact(linear) == QuantizedFact(("layers.0.mlp",), "reference")
    assert write_graph(again, KEYS) == text and graph_text(again) == graph_text(graph)


def test_every_node_is_one_line() -> None:
    lines = write_graph(small_graph(), KEYS).splitlines()
    nodes = [json.loads(line.removesuffix(",")) for line in lines if line.startswith('  {"')]
    assert [node["op"] for node in nodes].count("call") == 11 and nodes[-1]["op"] == "output"
    assert {"label": "@layers.0.weight", "op": "weight", "key": "model.layers.0.weight", "type": ""} in nodes


def test_weight_read_twice_is_one_line() -> None:
    graph = small_graph()
    copy = next(node for node in graph.nodes if node.target is aten.clone.default)
    made = graph.module.graph
    with made.inserting_before(copy):
        copy.args = (made.call_function(aten.add.Tensor, (copy.args[0], made.get_attr("layers.0.weight"))),)
    assert write_graph(graph, KEYS).count('"op": "weight"') == 1
    assert sum(node.op == "get_attr" for node in read(write_graph(graph, KEYS)).nodes) == 1


def test_operator_outside_the_list_is_not_saved() -> None:
    graph = small_graph()
    graph.nodes[1].target = torch.ops.prims.abs.default
    with pytest.raises(ExportError, match="prims::abs"):
        write_graph(graph, KEYS)


def test_a_call_that_reading_refuses_is_not_saved() -> None:
    graph = small_graph()
    x, linear = graph.nodes[0], next(node for node in graph.nodes if node.target is aten.linear.default)
    with graph.module.graph.inserting_after(linear):
        graph.module.graph.call_function(aten.copy_.default, (x, linear))
    with pytest.raises(ExportError, match="not the graph's own"):
        write_graph(graph, KEYS)


def node(target: str = "aten::relu.default", args: Any = ({"ref": "%0"},), **more: Any) -> dict[str, Any]:
    return {"label": "%1", "op": "call", "target": target, "args": list(args), "type": "", **more}


def weight(label: str, key: str) -> dict[str, Any]:
    return {"label": label, "op": "weight", "key": key, "type": ""}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "python": (node("os.system", ["true"]), "operator 'os.system'"),
    "builtin": (node("builtins.eval", ["1"]), "operator 'builtins.eval'"),
    "attribute getter": (node("operator.attrgetter", ["x"]), "operator 'operator.attrgetter'"),
    "other namespace": (node("prims::abs.default"), "operator 'prims::abs.default'"),
    "other operator of transformers": (node("transformers::x.default"), "operator 'transformers::x.default'"),
    "reads a file": (node("aten::from_file.default", ["/etc/passwd"]), "operator 'aten::from_file.default'"),
    "no such operator": (node("aten::relu.nothing"), "operator 'aten::relu.nothing' is not one"),
    "class of the namespace": (node("aten::__class__.default"), "operator 'aten::__class__.default' is not one"),
    "unknown of ours": (node("qpcompile::nothing.default"), "operator 'qpcompile::nothing.default' is not one"),
    "reference to nothing": (node(args=[{"ref": "%7"}]), "'%7' is used before it is defined"),
    "reference to itself": (node(args=[{"ref": "%1"}]), "'%1' is used before it is defined"),
    "label twice": (node() | {"label": "%0"}, "%0 is defined twice"),
    "keyword that is code": (node(kwargs={"x=open('f')": 1}), "it has no argument"),
    "unknown kind": (node() | {"op": "call_module"}, "there is no node"),
    "constant of torch": (node(args=[{"dtype": "load"}]), "is not an argument"),
    "device that is code": (node(args=[{"device": "cpu'); f("}]), "is not an argument"),
    "unknown constant": (node(args=[{"slice": "x"}]), "is not an argument"),
    "object with two keys": (node(args=[{"ref": "%0", "x": 1}]), "not a graph"),
    "no arguments": ({"label": "%1", "op": "call", "target": "aten::relu.default"}, "not a graph"),
    "weight that is code": (weight("@x')+f('", "model.layers.0.weight"), "not the name of a weight"),
    "weight below a number": (weight("@x..y", "model.layers.0.weight"), "not the name of a weight"),
    "tensor that is not stored": (weight("@x", "y"), "the tensor 'y' is not stored"),
    "unknown fact": (node(fact={"kind": "magic"}), "not a graph"),
    "fact of another type": (node(fact={"kind": "quantized", "sites": [1], "kernel": "x"}), "not a fact about a node"),
    "type that is code": (node(type="f32[__import__('os')]"), "is not a size"),
    "type that never ends": (node(type="int 9**9**9**9"), "is not a size"),
    "type that is a number": (node(type=3), "is not a type"),
    "changes its argument": (
        node("aten::resize_.default", [{"ref": "%0"}, [9]]),
        "not one that a saved graph may hold",
    ),
    "memory nobody wrote": (node("aten::empty.memory_format", [[9]]), "not one that a saved graph may hold"),
    "text times a number": (node("operator.mul", ["x", 10**9]), "it takes numbers"),
    "list times a number": (node("operator.mul", [[1], 10**9]), "it takes numbers"),
    "text filled up": (node("operator.mod", ["%99999999d", 1]), "it takes numbers"),
    "number of 80 bits": (node("aten::add.Scalar", [{"ref": "%0"}, 2**80]), "more than 64 bits"),
    "argument missing": (node(args=[]), "self is not given"),
    "argument too many": (node(args=[{"ref": "%0"}] * 3), "3 arguments for 1 places"),
    "weight that is a keyword": (weight("@class", "model.layers.0.weight"), "not the name of a weight"),
    "weight that is a method": (weight("@forward", "model.layers.0.weight"), "not the name of a weight"),
    "label that is code": (node() | {"label": "%1\nimport os"}, "not the name of a value"),
    "weight of other sizes": (weight("@x", "model.layers.0.weight") | {"type": "f32[9]"}, "the graph says"),
    "module that is code": (node(module="a b"), "not the name of a module"),
}


@pytest.mark.parametrize(("entry", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_text_is_refused(entry: dict[str, Any], message: str) -> None:
    data = json.loads(write_graph(small_graph(), KEYS))
    output = {"op": "output", "args": {"tuple": [{"ref": "%0"}] * 2}}
    data["nodes"] = [{"label": "%0", "op": "input", "type": ""}, entry, output]
    with pytest.raises(ArtifactError, match=message) as caught:
        read(json.dumps(data))
    assert caught.value.where == "graph/part.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9, this version reads 2"),
        ({"outputs": ["a"]}, "the graph's returns are not"),
        ({"inputs": []}, "do not match their names"),
        ({"nodes": []}, "the graph has 0 nodes"),
        ({"nodes": 3}, "the graph's nodes are not"),
        ({"name": "/etc/passwd"}, "the graph's name are not"),
        ({"owner": 7}, "the graph's owner are not"),
        ({"inputs": ["x", "x"]}, "the graph's inputs are not"),
        ({"returns": "y"}, "the graph's returns are not"),
        ({"constants": {"table": "x"}}, "the graph's constants are not"),
        ({"more": 1}, "it has not the keys"),
    ],
)
def test_wrong_frame_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(json.dumps(json.loads(write_graph(small_graph(), KEYS)) | change))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 2}', "[" * 100_000])
def test_text_that_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError):
        read(text)


def test_size_functions_have_stable_names() -> None:
    assert {"operator.mul", "operator.floordiv", "operator.getitem", "math.ceil", "torch.sym_max"} <= {*FUNCTIONS}
