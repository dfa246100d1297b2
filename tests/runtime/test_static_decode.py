"""Fixed-size steps answer as growing caches do: across buckets, cuts, padding, beams and several answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Cases
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import qpcompile
from qpcompile.capture.data_folder import question_inputs, read_questions
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import KernelError
from qpcompile.ir.edit import aten, call, calls, clone
from qpcompile.ir.program import DECODE
from qpcompile.ir.structure import CACHE_ARGUMENT
from qpcompile.runtime.cuda import static_decode
from qpcompile.runtime.cuda.static_decode import Capture, Run, StaticDecode
from qpcompile.runtime.cuda.static_graph import SDPA, static_graph
from qpcompile.runtime.kv_cache import CompiledCache
from qpcompile.runtime.machine import Machine

TESTBED = Path(__file__).parents[1] / "testbed"
FAST = ["quantize.weights.solver=rtn", "quantize.transform=hadamard"]
SETTINGS = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@functools.cache
def compiled(family: str, preset: str, *changes: str) -> tuple[CompiledVLM, Cases]:
    model, cases = FAMILIES[family]()
    fixed = [] if preset == "none" else FAST
    recipe = qpcompile.Recipe.load(preset).with_overrides([*fixed, *changes])
    return qpcompile.compile(model, recipe, calibration=[cases["one"]]), cases


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of 8, 16, 32, ... slots, filled completely: an answer crosses bucket limits."""
    monkeypatch.setattr(static_decode, "SMALLEST", 8)
    monkeypatch.setattr(static_decode, "ROOM", 1)


def growing(made: CompiledVLM) -> Machine:
    return Machine(made.program)


def fixed(made: CompiledVLM, capture: Capture | None = None) -> tuple[Machine, StaticDecode]:
    steps = StaticDecode(made.program, capture)
    return Machine(made.program, decode=steps), steps


def capture(run: Run) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Emulates a CUDA graph: results have fixed memory, which every replay overwrites."""
    for _ in range(3):
        run()
    results = {path: tensor.clone() for path, tensor in run().items()}

    def replay() -> None:
        for path, tensor in run().items():
            results[path].copy_(tensor)

    return replay, results


def same_answers(left: Any, right: Any, exact: bool) -> None:
    assert torch.equal(left.sequences, right.sequences)
    for one, other in zip(left.logits, right.logits, strict=True):
        if exact:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def same_caches(left: CompiledCache | None, right: CompiledCache | None) -> None:
    """Lengths, positions and bytes; values are compared through the answers."""
    assert left is not None and right is not None
    assert left.seen == right.seen and left.nbytes() == right.nbytes() > 0
    assert {name: each.shape for name, each in left.tensors.items()} == {
        name: each.shape for name, each in right.tensors.items()
    }
    for ours, theirs in ((left.kept, right.kept), (left.alive, right.alive)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[layer], theirs[layer]) for layer in ours)


QUOTA = "tokens.candidate_layers=[0,1]"
MODELS = [("llava", "quota-30", QUOTA, "quantize.kv_cache.bits=4")]
MORE_MODELS = [
    # Windows and masks that the host makes.
    ("gemma3", "none"),
    ("llava", "none"),
    ("qwen2_5_vl", "w4a4kv4"),
    ("qwen2_5_vl", "quota-30", QUOTA, "quantize.kv_cache.bits=16", "tokens.compact_scored_layer=false"),
    ("llava", "quota-30", QUOTA, "quantize.kv_cache.bits=8", "tokens.position_mode=reindex"),
    ("mistral3", "none"),
    ("paligemma", "none"),
]
SLOW = [pytest.param(model, marks=pytest.mark.slow) for model in MORE_MODELS]


@pytest.mark.parametrize("model", [*MODELS, *SLOW], ids="-".join)
def test_answers_are_the_same(model: tuple[str, ...]) -> None:
    made, cases = compiled(*model)
    exact = model[1] != "none" and "quantize.kv_cache.bits=16" not in model
    machine, steps = fixed(made)
    # One machine answers them all: stale values in the buffers must not affect the next answer.
    found = {name: (machine.generate(**case, **SETTINGS), machine.last) for name, case in cases.items()}
    assert len({key[0] for key in steps.captured}) < len(steps.captured), "no answer crossed the edge of a bucket"
    grown = growing(made)
    for name, case in cases.items():
        expected = grown.generate(**case, **SETTINGS)
        same_answers(expected, found[name][0], exact)
        same_caches(grown.last, found[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
def test_trained_models_answer_the_same(bed: str) -> None:
    """With token cuts and a 4-bit cache, alone and in padded batches of two."""
    model = AutoModelForImageTextToText.from_pretrained(TESTBED / bed).eval()
    processor = AutoProcessor.from_pretrained(TESTBED / bed)
    processor.tokenizer.padding_side = "left"
    questions = read_questions(TESTBED / "calibration" / bed)[:8]
    batches = [dict(question_inputs(processor, questions[start : start + 2])) for start in range(0, 8, 2)]
    batches += [dict(question_inputs(processor, questions[n : n + 1])) for n in range(2)]
    recipe = qpcompile.Recipe.load("quota-30").with_overrides([*FAST, "tokens.candidate_layers=[1,3]"])
    made = qpcompile.compile(model, recipe, processor=processor, calibration=batches[:2])
    machine, steps = fixed(made)
    settings = {**SETTINGS, "max_new_tokens": 6}
    found = [machine.generate(**batch, **settings) for batch in batches]
    assert {len(key) for key in steps.captured} == {4}  # rows, and slots of three layer groups
    grown = growing(made)
    for batch, answer in zip(batches, found, strict=True):
        same_answers(grown.generate(**batch, **settings), answer, exact=True)


def test_a_replay_is_the_step() -> None:
    made, cases = compiled(*MODELS[0])
    machine, _ = fixed(made, capture)
    found = [machine.generate(**case, **SETTINGS) for case in cases.values()]
    grown = growing(made)
    for case, answer in zip(cases.values(), found, strict=True):
        same_answers(grown.generate(**case, **SETTINGS), answer, exact=True)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_take_their_caches_back(settings: dict[str, Any]) -> None:
    made, cases = compiled(*MODELS[0])
    machine, _ = fixed(made)
    found = [machine.generate(**case, **SETTINGS | settings) for case in (cases["one"], cases["padded"])]
    grown = growing(made)
    for case, answer in zip((cases["one"], cases["padded"]), found, strict=True):
        same_answers(grown.generate(**case, **SETTINGS | settings), answer, exact=True)


def test_answers_that_take_turns_keep_their_own_tokens() -> None:
    """Two caches of the same size need the same buffers: each step of one moves the other out."""
    made, cases = compiled(*MODELS[0])
    prompts = [cases["one"], {**cases["one"], "pixel_values": -cases["one"]["pixel_values"]}]
    answers = []
    for machine in (growing(made), fixed(made)[0]):
        caches = [machine.prefill(prompt) for prompt in prompts]
        embeds, steps = torch.randn(2, 1, 1, 48, generator=torch.Generator().manual_seed(3)), []
        for turn in range(6):
            cache = caches[turn % 2]
            place = torch.tensor([[cache.seen]])
            given = {"inputs_embeds": embeds[turn % 2], "position_ids": place, CACHE_ARGUMENT: cache}
            steps.append(machine._language(**given, attention_mask=None).last_hidden_state)
        answers.append(steps)
    assert all(map(torch.equal, *answers))
    assert not torch.equal(answers[0][0], answers[0][1])


def test_a_cache_that_starts_anew_is_not_the_old_one() -> None:
    made, cases = compiled(*MODELS[0])
    machine, steps = fixed(made)
    machine.generate(**cases["one"], **{**SETTINGS, "max_new_tokens": 3})
    cache = machine.last
    assert cache is not None
    (step,) = steps.captured.values()
    assert step.holds(cache) and step.room
    cache.reset()
    assert not step.holds(cache)
    found = machine.generate(**cases["longer"], past_key_values=cache, **SETTINGS)
    same_answers(growing(made).generate(**cases["longer"], **SETTINGS), found, exact=True)


def test_only_so_many_steps_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_decode, "STEPS", 1)
    made, cases = compiled(*MODELS[0])
    machine, steps = fixed(made)
    found = machine.generate(**cases["longer"], **SETTINGS)
    assert len(steps.captured) == 1
    same_answers(growing(made).generate(**cases["longer"], **SETTINGS), found, exact=True)


@pytest.mark.slow
def test_a_loaded_model_has_the_same_static_graph(tmp_path: Path) -> None:
    """It has printed types instead of values."""
    made, _ = compiled(*MORE_MODELS[2])
    made.save_pretrained(tmp_path / "model")
    loaded = qpcompile.load(tmp_path / "model")
    left, right = (static_graph(each.program.graphs[DECODE]) for each in (made, loaded))
    assert left.inputs == right.inputs and left.group_of == right.group_of and left.mask_axes == right.mask_axes
    targets = [
        [str(node.target) for node in each.module.graph.nodes if node.op == "call_function"] for each in (left, right)
    ]
    assert targets[0] == targets[1]


def test_the_program_keeps_its_graph() -> None:
    made, _ = compiled(*MODELS[0])
    before = made.graph_text(DECODE)
    static_graph(made.program.graphs[DECODE])
    assert made.graph_text(DECODE) == before


def test_tokens_by_their_place_are_refused() -> None:
    made, _ = compiled(*MORE_MODELS[0])
    graph = clone(made.program.graphs[DECODE])
    attention = next(calls(graph, SDPA))
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs["attn_mask"]
    cut = call(graph, attention, aten.slice.Tensor, mask, 3, 1, 2**63 - 1)
    with pytest.raises(KernelError, match="number of tokens that is not all of them") as caught:
        static_graph(graph)
    assert cut.name in str(caught.value) and "cuda_graphs=False" in str(caught.value)


def test_other_attention_is_refused() -> None:
    made, _ = compiled(*MORE_MODELS[0])
    graph = clone(made.program.graphs[DECODE])
    attention = next(calls(graph, SDPA))
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs["attn_mask"]
    call(graph, attention, aten.cumsum.default, mask, 3)
    with pytest.raises(KernelError, match="no rule for slots that hold no token"):
        static_graph(graph)


def test_a_failed_capture_names_the_way_around() -> None:
    made, cases = compiled(*MORE_MODELS[0])

    def fails(run: Run) -> tuple[Callable[[], None], dict[str, Tensor]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(KernelError, match="stream is capturing") as caught:
        fixed(made, fails)[0].generate(**cases["one"], **SETTINGS)
    assert "cuda_graphs=False" in str(caught.value)


def test_buckets() -> None:
    assert [static_decode.bucket(tokens) for tokens in (1, 7, 8, 9, 15, 16, 100)] == [8, 8, 16, 16, 16, 32, 128]
