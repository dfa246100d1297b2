"""Every rule of the verifier, violated by hand."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from programs import program_of
from torch import fx
from toy_decoder import decode_graph, prefill_graph

from qpcompile.errors import InvariantError
from qpcompile.ir.edit import add_tensor, aten, call, fake_mode, set_tensor
from qpcompile.ir.names import names
from qpcompile.ir.operators import QUANT_STUB, RMSNORM, ROPE
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.verify import LEGAL, problems, verify
from qpcompile.stages import STAGES, Stage


def sound(stage: Stage = "captured") -> Program:
    return program_of(prefill_graph(), decode_graph(), layers=2, stage=stage)


def add_call(graph: Graph, target: Callable[..., object], known: bool = True) -> None:
    """A call on the first input, read by the output node."""
    with graph.module.graph.inserting_before(graph.output_node):
        node = graph.module.graph.call_function(target, (graph.nodes[0],))
    if known:
        node.meta["val"] = graph.nodes[0].meta["val"]
    (values,) = graph.output_node.args
    graph.output_node.args = ((*values, node),)  # type: ignore[misc]
    graph.outputs = names((*graph.outputs, "extra"))


def lose_decode(program: Program) -> None:
    del program.graphs["decode"]


def lose_input(program: Program) -> None:
    graph = program.graphs["prefill"]
    graph.inputs = graph.inputs[1:]


def lose_output(program: Program) -> None:
    graph = program.graphs["prefill"]
    graph.outputs = graph.outputs[:-1]


def lose_tensor(program: Program) -> None:
    module = program.graphs["decode"].module
    set_tensor(module, "layers.0.self_attn.q_proj.weight", torch.ones(1))
    delattr(module.get_submodule("layers.0.self_attn.q_proj"), "weight")


def call_python(program: Program) -> None:
    add_call(program.graphs["vision"], torch.relu)


def call_unknown(program: Program) -> None:
    add_call(program.graphs["vision"], aten.relu.default, known=False)


def call_method(program: Program) -> None:
    graph = program.graphs["vision"]
    with graph.module.graph.inserting_before(graph.output_node):
        graph.module.graph.call_method("relu", (graph.nodes[0],))


def rename_cache(program: Program) -> None:
    graph = program.graphs["decode"]
    graph.inputs = names(path.replace("past_key_values.1.value", "past_key_values.2.value") for path in graph.inputs)


def lose_cache(program: Program) -> None:
    graph = program.graphs["decode"]
    graph.outputs = names(path.replace("past_key_values.1", "other.1") for path in graph.outputs)


def add_norm(graph: Graph) -> fx.Node:
    """A norm of the first input, f32[2, 3] and more, on a weight of its own, read by the output node."""
    before = graph.output_node
    weight = add_tensor(graph, "norm.weight", torch.ones(3), before)
    node = call(graph, before, RMSNORM, graph.nodes[0], weight, 1e-6)
    (values,) = graph.output_node.args
    graph.output_node.args = ((*values, node),)  # type: ignore[misc]
    graph.outputs = names((*graph.outputs, "extra"))
    return node


def known(graph: Graph, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with fake_mode(graph):
        return torch.empty(shape, dtype=dtype)


def short_weight(program: Program) -> None:
    graph = program.graphs["vision"]
    weight = add_norm(graph).args[1]
    set_tensor(graph.module, "norm.weight", torch.ones(1))
    weight.meta["val"] = known(graph, 1)  # type: ignore[union-attr]


def stale_weight(program: Program) -> None:
    graph = program.graphs["vision"]
    add_norm(graph)
    set_tensor(graph.module, "norm.weight", torch.ones(3, dtype=torch.bfloat16))


def stale_result(program: Program) -> None:
    graph = program.graphs["vision"]
    add_norm(graph).meta["val"] = known(graph, 2, 4)


def wrong_constant(program: Program) -> None:
    node = add_norm(program.graphs["vision"])
    node.update_arg(2, float("nan"))


BROKEN: dict[str, tuple[Callable[[Program], None], Stage, str]] = {
    "a graph is missing": (lose_decode, "captured", "the program has no decode graph"),
    "an input is missing": (lose_input, "captured", "prefill: 2 placeholders for 1 inputs"),
    "an output is missing": (lose_output, "captured", "prefill: the output node does not return the 4 outputs"),
    "a tensor is missing": (lose_tensor, "captured", r"decode: .* reads the tensor layers.0.self_attn.q_proj.weight"),
    "a python function": (call_python, "captured", r"vision: relu.* calls .*, which is not an operator"),
    "a call without a shape": (call_unknown, "captured", r"vision: relu.* has no shape"),
    "a method": (call_method, "captured", "vision: relu.* is a call_method node"),
    "another cache tensor": (rename_cache, "captured", r"disagree on the cache: \['past_key_values.1.value'"),
    "a cache that is not returned": (lose_cache, "captured", r"disagree on the cache: \['past_key_values.1.key'"),
    "an operand of one element": (
        short_weight,
        "canonical",
        "vision: rmsnorm.* operand weight: weight is f32.1., but must",
    ),
    "a tensor of another type": (
        stale_weight,
        "canonical",
        r"norm_weight is known as f32\[3\], the tensor .* bf16\[3\]",
    ),
    "a result of another size": (
        stale_result,
        "canonical",
        r"rmsnorm.* is known as f32\[2, 4\], qpcompile::rmsnorm gives",
    ),
    "a number out of range": (wrong_constant, "canonical", "vision: rmsnorm.* operand eps: eps is nan"),
    "dropout": (
        lambda program: add_call(program.graphs["vision"], aten.dropout.default),
        "canonical",
        "vision: dropout.* calls aten.dropout.default at the stage canonical; it is legal at the stage captured",
    ),
    "an operator too early": (
        lambda program: add_call(program.graphs["vision"], ROPE),
        "quantized",
        "vision: rope.* calls qpcompile.rope.default at the stage quantized; it is legal at the stage fused",
    ),
    "a stub": (
        lambda program: add_call(program.graphs["vision"], QUANT_STUB),
        "fused",
        "vision: quant_stub.* calls .* at the stage fused; it is legal at the stages stubbed to packed",
    ),
}


@pytest.mark.parametrize(("break_it", "stage", "message"), BROKEN.values(), ids=list(BROKEN))
def test_broken_rule_is_named(break_it: Callable[[Program], None], stage: Stage, message: str) -> None:
    program = sound(stage)
    assert list(problems(program)) == []
    program.history += ["first", "second"]
    break_it(program)
    with pytest.raises(InvariantError, match=message) as error:
        verify(program)
    assert (error.value.ran, error.value.before) == ("second", ("first",))


@pytest.mark.parametrize(
    ("target", "stage"), [(aten.dropout.default, "captured"), (QUANT_STUB, "stubbed"), (QUANT_STUB, "packed")]
)
def test_what_goes_later_may_still_be_there(target: Callable[..., object], stage: Stage) -> None:
    program = sound(stage)
    add_call(program.graphs["vision"], target)
    verify(program)


def test_every_stage_has_operators_that_come_with_it() -> None:
    firsts = Counter(first for first, _ in LEGAL.values())
    assert set(firsts) == set(STAGES) - {"calibrated", "planned"}


def test_a_call_that_fits_is_let_through() -> None:
    program = sound("canonical")
    add_norm(program.graphs["vision"])
    verify(program)


def test_sizes_may_be_computed_in_python() -> None:
    program = sound()
    add_call(program.graphs["vision"], operator.neg)
    verify(program)


def test_before_any_pass_it_is_the_capture() -> None:
    program = sound()
    lose_input(program)
    with pytest.raises(InvariantError) as error:
        verify(program)
    assert error.value.ran == "capture"
