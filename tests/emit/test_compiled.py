"""CompiledVLM: generate is transformers' own, and the plan, the graphs and the kept tokens can be asked for."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from qpcompile.compiled import CompiledVLM
from qpcompile.errors import ExportError, InputError
from qpcompile.runtime.kv_cache import CompiledCache

Case = dict[str, torch.Tensor]
Tiny = tuple[Any, dict[str, Case]]

SETTINGS = {
    "greedy": {"do_sample": False, "max_new_tokens": 6},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "max_new_tokens": 6},
    "two answers": {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4},
    "beams": {"num_beams": 3, "do_sample": False, "max_new_tokens": 5},
    "scores": {"do_sample": False, "max_new_tokens": 2, "return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("case", ["longer", "padded"])
def test_generate_is_the_models_own(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, settings: dict[str, Any], case: str
) -> None:
    model, cases = tiny_llava
    torch.manual_seed(3)
    expected = model.generate(**cases[case], **settings)
    torch.manual_seed(3)
    answer = compiled_llava.generate(**cases[case], **settings)
    if "output_scores" in settings:
        torch.testing.assert_close(answer.scores, expected.scores, rtol=1e-4, atol=1e-5)
        expected, answer = expected.sequences, answer.sequences
    assert torch.equal(answer, expected)


def test_one_answer_at_a_time(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    cases = [tiny_llava[1][name] for name in ("one", "longer")]
    expected = [compiled_llava.generate(**case, **settings) for case in cases]

    class Asks(BaseStreamer):
        """Asks for another answer between two tokens of this one."""

        other: Future[torch.Tensor] | None = None

        def put(self, value: torch.Tensor) -> None:
            if self.other is None:
                self.other = threads.submit(compiled_llava.generate, **cases[1], **settings)
                waited = wait([self.other], timeout=2)
                assert not waited.done, "an answer was given in the middle of another"

        def end(self) -> None:
            """Nothing to flush."""

    streamer = Asks()
    with ThreadPoolExecutor(1) as threads:
        assert torch.equal(compiled_llava.generate(**cases[0], **settings, streamer=streamer), expected[0])
        assert streamer.other is not None and torch.equal(streamer.other.result(), expected[1])


def test_generate_stops_at_the_end_token(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    case = tiny_llava[1]["one"]
    tokens = compiled_llava.generate(**case, max_new_tokens=6, do_sample=False)[0, case["input_ids"].shape[1] :]
    end = int(tokens[2])
    stopped = compiled_llava.generate(**case, max_new_tokens=6, do_sample=False, eos_token_id=end)
    first = tokens.tolist().index(end)
    assert stopped[0, case["input_ids"].shape[1] :].tolist() == tokens[: first + 1].tolist()


def test_prompt_may_be_given_by_position(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    case = dict(tiny_llava[1]["one"])
    expected = compiled_llava.generate(**case, max_new_tokens=2, do_sample=False)
    ids = case.pop("input_ids")
    assert torch.equal(compiled_llava.generate(ids, **case, max_new_tokens=2, do_sample=False), expected)


class Collector(BaseStreamer):
    """Records what a streamer receives."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer_gets_every_token(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    streamer = Collector()
    answer = compiled_llava.generate(**tiny_llava[1]["one"], max_new_tokens=4, do_sample=False, streamer=streamer)
    assert streamer.tokens == answer[0].tolist() and streamer.ended


def test_pickled_models_answer_alike(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = {name: compiled_llava.generate(**case, **settings) for name, case in tiny_llava[1].items()}
    again = pickle.loads(pickle.dumps(compiled_llava))
    assert again.recipe == compiled_llava.recipe and again.processor is None
    for name, case in tiny_llava[1].items():
        assert torch.equal(again.generate(**case, **settings), expected[name]), name


@pytest.mark.slow
def test_another_process_answers_alike(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = compiled_llava.generate(**tiny_llava[1]["one"], **settings)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as workers:
        found = workers.submit(compiled_llava.generate, **tiny_llava[1]["one"], **settings).result()
    assert torch.equal(found, expected)


def test_copies_share_what_copies_share(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    expected = compiled_llava.generate(**tiny_llava[1]["one"], **settings)
    shallow, deep = copy.copy(compiled_llava), copy.deepcopy(compiled_llava)
    assert shallow.program is compiled_llava.program and deep.program is not compiled_llava.program
    deep.generation_config.repetition_penalty = 9.0
    assert not torch.equal(deep.generate(**tiny_llava[1]["one"], **settings), expected)
    deep.generation_config.repetition_penalty = None
    for one in (shallow, deep, compiled_llava):
        assert torch.equal(one.generate(**tiny_llava[1]["one"], **settings), expected)


def test_kept_tokens_without_a_cut(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    assert compiled_llava.kept_tokens(**tiny_llava[1]["padded"]) == {}


def test_kept_tokens_mark_empty_slots(compiled_llava: CompiledVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CompiledCache(3)
    cache.kept.update({2: torch.tensor([[3]]), 1: torch.tensor([[0, 3, 5]])})
    cache.alive.update({2: torch.tensor([[True]]), 1: torch.tensor([[False, True, True]])})
    monkeypatch.setattr(compiled_llava.machine, "prefill", lambda inputs: cache)
    kept = compiled_llava.kept_tokens(input_ids=torch.zeros(1, 1))
    assert [(layer, index.tolist()) for layer, index in kept.items()] == [(1, [[-1, 3, 5]]), (2, [[3]])]


def test_plan_recipe_and_model_settings(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    model, _ = tiny_llava
    assert compiled_llava.plan is compiled_llava.program.plan
    assert compiled_llava.recipe == compiled_llava.plan.recipe
    assert compiled_llava.config.text_config.hidden_size == model.config.text_config.hidden_size
    assert compiled_llava.generation_config.pad_token_id == model.generation_config.pad_token_id
    assert (compiled_llava.dtype, compiled_llava.device) == (torch.float32, torch.device("cpu"))


def test_graph_text_names_what_there_is(compiled_llava: CompiledVLM) -> None:
    text = compiled_llava.graph_text("prefill")
    assert text.startswith("graph prefill of model.language_model\n")
    assert "# layers.2\n" in text and "@layers.2.mlp.down_proj.weight : f32[48, 80]\n" in text
    assert "/" not in text
    with pytest.raises(ExportError, match=r"no graph called 'encode'[\s\S]*vision, projector, prefill, decode, head"):
        compiled_llava.graph_text("encode")


def test_weight_bytes_count_shared_tensors_once(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    model, _ = tiny_llava
    # LLaVA reads the second-to-last layer of the tower.
    last = f"encoder.layers.{model.config.vision_config.num_hidden_layers - 1}."
    read = [tensor for name, tensor in model.named_parameters() if last not in name and "post_layernorm" not in name]
    parameters = sum(tensor.nbytes for tensor in read)
    assert parameters <= compiled_llava.weight_bytes() < 1.02 * parameters
    assert compiled_llava.weight_bytes("prefill") == compiled_llava.weight_bytes("decode")
    assert compiled_llava.weight_bytes("head") == model.lm_head.weight.nbytes


def test_report_and_onnx_are_handed_on(compiled_llava: CompiledVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    for name, function in (("qpcompile.inspect.report", "write_report"), ("qpcompile.emit.onnx.export", "export_onnx")):
        module = ModuleType(name)
        setattr(module, function, lambda *given: calls.append(given))
        monkeypatch.setitem(sys.modules, name, module)
    compiled_llava.report("out.html")
    compiled_llava.export_onnx("out-onnx")
    machine, program = compiled_llava.machine, compiled_llava.program
    assert calls[0][:4] == (machine, compiled_llava.processor, "out.html", None)
    assert calls[1][:4] == (program, "out-onnx", (), False)


@pytest.mark.parametrize("case", ["one", "padded"])
def test_a_call_gives_the_logits_of_the_next_token(tiny_llava: Tiny, compiled_llava: CompiledVLM, case: str) -> None:
    model, cases = tiny_llava
    with torch.no_grad():
        expected = model(**cases[case]).logits[:, -1:]
    found = compiled_llava(**cases[case])
    assert found.past_key_values is None and found.logits is not None and found.logits.shape == expected.shape
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


def test_a_call_refuses_settings(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    case = tiny_llava[1]["one"]
    with pytest.raises(InputError, match="do_sample, output_attentions: a call returns the next token's logits"):
        compiled_llava(**case, do_sample=True, output_attentions=True)
    with pytest.raises(InputError, match="labels"):
        compiled_llava(**case, labels=case["input_ids"])


def test_it_looks_like_a_model_of_transformers(compiled_llava: CompiledVLM) -> None:
    assert compiled_llava.can_generate() and compiled_llava.eval() is compiled_llava
    assert {"image", "text"} <= set(compiled_llava.input_modalities) and "text" in compiled_llava.output_modalities
