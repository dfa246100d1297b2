"""Promise 1: with nothing quantized and nothing pruned, a captured model answers as the model does, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, Cases, Inputs
from torch import fx
from transformers import PreTrainedModel

from qpcompile.capture.capture import capture
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine

NEW_TOKENS = 9
# Different summation orders; the logits are of order 1. A wrong mask, position or window changes them by 0.01 and more.
TOLERANCE = 2e-5
ROOT = Path(__file__).resolve().parent.parent
# By default: a plain family, 3-axis positions, and windows. The others with -m slow.
KINDS = ("llava", "qwen2_5_vl", "gemma3")
ALL = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in FAMILIES]


def answer(model: PreTrainedModel | Machine, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy answer: ids i64[B, S] and logits f32[B, new, V] of the new tokens."""
    result = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return result.sequences, torch.stack(result.logits, dim=1)


def check_same_answers(name: str, model: PreTrainedModel, machine: Machine, cases: Cases) -> None:
    """The same tokens and logits for every case, and for a prompt with no picture."""
    ids = cases["longer"]["input_ids"][:, -20:]
    text_only = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for case, inputs in {**cases, "text only": text_only}.items():
        tokens, logits = answer(model, inputs)
        found_tokens, found_logits = answer(machine, inputs)
        assert torch.equal(found_tokens, tokens), f"{name}, {case}"
        assert (found_logits - logits).abs().max() < TOLERANCE, f"{name}, {case}"


def sizes(node: fx.Node) -> tuple[torch.SymInt | int, ...]:
    return tuple(node.meta["val"].shape)


def check_one_token_axis(program: Program) -> None:
    """All inputs of the prefill graph share one symbol for the token count, different from that of the batch."""
    prefill = program.graphs[PREFILL]
    batch, length, _ = sizes(prefill.placeholder("inputs_embeds"))
    assert isinstance(batch, torch.SymInt) and isinstance(length, torch.SymInt) and str(batch) != str(length)
    for path in prefill.inputs:
        symbols = {size for size in map(str, sizes(prefill.placeholder(path))) if not size.isdigit()}
        assert symbols == {str(batch), str(length)}, path
    for path in prefill.outputs:
        assert str(length) in map(str, sizes(prefill.result(path))), path
    named = [node for node in prefill.nodes if node.op == "call_function"]
    assert all("nn_module_stack" in node.meta for node in named if "linear" in str(node.target))


@pytest.mark.families
@pytest.mark.parametrize("name", ALL)
def test_captured_family_answers_as_the_model(name: str) -> None:
    model, cases = FAMILIES[name]()
    program = capture(model, cases["one"], Recipe.load("none"))
    check_one_token_axis(program)
    check_same_answers(name, model, Machine(program), cases)
    assert len(program.layers) == model.config.get_text_config().num_hidden_layers
    assert DECODE in program.graphs


@pytest.mark.families
def test_capture_leaves_the_model_as_it_was() -> None:
    model, cases = FAMILIES["llava"]()
    before = answer(model, cases["pictures"])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    capture(model, cases["padded"], Recipe.load("none"))
    after = answer(model, cases["pictures"])
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_pass_names_a_family() -> None:
    names = [*FAMILIES, *(name.replace("_", "") for name in FAMILIES), "qwen", "gemma", "idefics", "llama", "mistral"]
    rooms = ("ir", "runtime", "calibration", "quantization", "pruning")
    for folder in ("passes", *(f"qpcompile/{room}" for room in rooms)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            # The name of a paper is not a name of a family.
            text = path.read_text().lower().replace('"llava-prumerge"', "")
            assert not [name for name in names if name in text], path.name
