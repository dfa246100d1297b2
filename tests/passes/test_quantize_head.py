"""The head in 8 bits, and embedding tables that share its matrix."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from families import llava
from programs import captured, changed_recipe, fresh, program_of, relative, run, traced
from torch import Tensor, nn

from qpcompile.capture.capture import capture
from qpcompile.emit.artifact.weights import stored_tensors, total_bytes
from qpcompile.ir.edit import get_tensor
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import EMBED, HEAD, Program
from qpcompile.ir.text import graph_text
from qpcompile.kernels.linear_w8a16.reference import quantize_rows
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.quantize_head import QuantizeHead
from qpcompile.recipe.plan import LeftOut, Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine

Apply = Callable[[Program, QuantizeHead], bool]
EIGHT, SIXTEEN = (changed_recipe("w4a4kv4", "quantize.ignore=[]", f"quantize.head_bits={bits}") for bits in (8, 16))
TOKENS = {"input": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))}


class Host(nn.Module):
    """An embedding table in a model, `tied` to a head or separate."""

    def __init__(self, weight: Tensor, kind: type[nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = kind(*weight.shape)
        self.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)


def head_program(recipe: Recipe, bias: bool = False, dtype: torch.dtype = torch.float32) -> Program:
    """A head of 8 inputs and 6 outputs, and a host without an embedding table."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=bias).to(dtype)
    graph = traced(layer, {"input": TOKENS["input"].to(dtype)}, name=HEAD, owner="lm_head")
    program = program_of(graph, recipe=recipe, stage="canonical")
    InsertQuantStubs().run(program)
    return program


def tied(kind: type[nn.Module] = nn.Embedding, dtype: torch.dtype = torch.float32) -> Program:
    program = head_program(EIGHT, dtype=dtype)
    program.host = Host(get_tensor(program.graphs[HEAD].module, "weight").detach(), kind)
    return program


def test_golden(apply: Apply) -> None:
    program = head_program(EIGHT, bias=True)
    assert apply(program, QuantizeHead())
    expecttest.assert_expected_inline(
        graph_text(program.graphs[HEAD]),
        """\
graph head of lm_head
%0 = input input : f32[B, S0, 8]
# top
@weight_codes : i8[6, 8]
@weight_scale : f32[6, 1]
@bias : f32[6]
%1 = qpcompile::linear_w8a16(%0, @weight_codes, @weight_scale, @bias) : f32[B, S0, 6]
return y = %1
""",
    )
    assert EMBED not in program.graphs


def test_golden_of_a_table(apply: Apply) -> None:
    program = tied(dtype=torch.bfloat16)
    assert apply(program, QuantizeHead())
    expecttest.assert_expected_inline(
        graph_text(program.graphs[EMBED]),
        """\
graph embed of embed_tokens
%0 = input input : i64[B, S0]
@weight_codes : i8[6, 8]
%1 = aten::embedding(@weight_codes, %0) : i8[B, S0, 8]
@weight_scale : f32[6, 1]
%2 = aten::embedding(@weight_scale, %0) : f32[B, S0, 1]
%3 = aten::to.dtype(%1, f32) : f32[B, S0, 8]
%4 = aten::mul.Tensor(%3, %2) : f32[B, S0, 8]
%5 = aten::to.dtype(%4, bf16) : bf16[B, S0, 8]
return output = %5
""",
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers(apply: Apply, dtype: torch.dtype, bias: bool) -> None:
    program = head_program(EIGHT, bias, dtype)
    graph = program.graphs[HEAD]
    weight, x = get_tensor(graph.module, "weight").detach(), TOKENS["input"].to(dtype)
    (before,) = run(graph, input=x).values()
    codes, scale = quantize_rows(weight)
    assert apply(program, QuantizeHead())
    (found,) = run(graph, input=x).values()
    assert found.dtype == dtype and relative(found, before) < 0.01
    term = get_tensor(graph.module, "bias").detach().double() if bias else 0
    assert relative(found, x.double() @ (codes * scale.double()).T + term) < (1e-6 if dtype == torch.float32 else 0.003)
    assert get_tensor(graph.module, "weight_codes").dtype == torch.int8 and not hasattr(graph.module, "weight")


def test_the_plan_says_so(apply: Apply) -> None:
    program = head_program(EIGHT)
    assert [(each.name, each.reason) for each in program.plan.left_out] == [
        ("lm_head", "the output head never has 4 bits")
    ]
    apply(program, QuantizeHead())
    (site,) = program.plan.sites
    assert (site.graph, site.name, site.weight_bits, site.activation_bits) == (HEAD, "lm_head", 8, 16)
    assert site.kernel == "qpcompile::linear_w8a16" and not program.plan.left_out
    assert Plan.from_yaml(program.plan.to_yaml()) == program.plan


@pytest.mark.parametrize("recipe", [SIXTEEN, Recipe.load("none"), Recipe.load("w4a16")], ids=["16", "none", "w4a16"])
def test_sixteen_bits_stay(apply: Apply, recipe: Recipe) -> None:
    program = head_program(SIXTEEN)
    program.recipe = recipe
    left_out = program.plan.left_out
    assert not apply(program, QuantizeHead())
    assert program.plan.left_out == left_out and not program.plan.sites


def test_a_program_without_a_head(apply: Apply) -> None:
    assert not apply(program_of(recipe=EIGHT, stage="canonical"), QuantizeHead())


def test_a_table_of_its_own_stays(apply: Apply) -> None:
    program = head_program(EIGHT)
    program.host = Host(get_tensor(program.graphs[HEAD].module, "weight").detach().clone())
    assert apply(program, QuantizeHead())
    assert EMBED not in program.graphs and get_tensor(program.host, "embed_tokens.weight").shape == (6, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tied_table_reads_the_same_bytes(apply: Apply, dtype: torch.dtype) -> None:
    program = tied(dtype=dtype)
    weight = get_tensor(program.graphs[HEAD].module, "weight").detach()
    before = total_bytes(stored_tensors(program))
    assert apply(program, QuantizeHead())
    table = program.graphs[EMBED]
    assert table.owner == "embed_tokens" and get_tensor(program.host, "embed_tokens.weight").numel() == 0
    assert before - total_bytes(stored_tensors(program)) == weight.nbytes - 6 * 8 - 6 * 4
    for ids in (torch.tensor([[5, 0, 3]]), torch.tensor([[1], [2]]), torch.tensor(4)):
        found = run(table, input=ids)["output"]
        codes, scale = quantize_rows(weight)
        assert torch.equal(found, (codes[ids] * scale[ids]).to(dtype)) and found.dtype == dtype
        assert relative(found, weight[ids]) < 0.01


class Scaled(nn.Embedding):
    """An embedding that does more than a lookup."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_another_reader_of_the_matrix_keeps_it(apply: Apply) -> None:
    program = tied(Scaled)
    assert not apply(program, QuantizeHead())
    reason = "embed_tokens, which is not a single table of embeddings (Scaled), reads the same matrix"
    assert program.plan.left_out == (LeftOut(graph=HEAD, name="lm_head", reason=reason),)
    two = tied()
    two.host.add_module("other", Host(get_tensor(two.host, "embed_tokens.weight")))
    assert not apply(two, QuantizeHead()) and "not a single table" in two.plan.left_out[0].reason


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_answers_as_before(tie: bool) -> None:
    if tie:
        model, cases = llava(tie_word_embeddings=True)
        program = capture(model, cases["one"], EIGHT)
    else:
        model, cases, _ = captured()
        program = fresh(EIGHT)
    run_passes(program, [Canonicalize(), QuantizeHead()])
    assert (EMBED in program.graphs) is tie
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for case in cases.values():
        expected = model.generate(**case, **options)  # type: ignore[operator]
        found = Machine(program).generate(**case, **options)
        assert relative(found.logits[0], expected.logits[0]) < 0.02
