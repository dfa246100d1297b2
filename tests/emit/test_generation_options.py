"""Settings of generate: supported ones answer as eager does, others are refused by name before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.generation.stopping_criteria import MaxLengthCriteria

from qpcompile.compiled import CompiledVLM
from qpcompile.errors import InputError
from qpcompile.runtime.generation_options import IDLE, NOTHING, REFUSED, REFUSED_ARGUMENTS, SERVED

Case = dict[str, torch.Tensor]
Tiny = tuple[Any, dict[str, Case]]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 5}

SERVED_ALIKE: dict[str, dict[str, Any]] = {
    "repetition": GREEDY | {"repetition_penalty": 1.7},
    "no n-gram twice": GREEDY | {"no_repeat_ngram_size": 1},
    "at least": GREEDY | {"min_new_tokens": 4, "eos_token_id": [62, 16, 66]},
    "ends": GREEDY | {"eos_token_id": [62, 16]},
    "length with the prompt": {"do_sample": False, "max_length": 40},
    "suppressed": GREEDY | {"suppress_tokens": [62, 16], "begin_suppress_tokens": [9, 66]},
    "bad words": GREEDY | {"bad_words_ids": [[62], [16, 66]]},
    "bias": GREEDY | {"sequence_bias": [[[7], 50.0]]},
    "forced": GREEDY | {"forced_eos_token_id": 7},
    "decay": GREEDY | {"exponential_decay_length_penalty": (1, 3.0), "eos_token_id": 7},
    "without a cache": GREEDY | {"use_cache": False},
    "cache by its usual name": GREEDY | {"cache_implementation": "dynamic"},
    "hooks": GREEDY
    | {
        "logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([62, 16])]),
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(max_length=47)]),
    },
    "allowed": GREEDY | {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7 + row]},
    "nucleus": SAMPLED | {"top_p": 0.9, "top_k": 30, "temperature": 1.4},
    "least share": SAMPLED | {"min_p": 0.02, "typical_p": 0.95},
    "beams that sample": SAMPLED | {"num_beams": 2, "num_return_sequences": 2},
    "best of beams": GREEDY
    | {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "settings of nothing": GREEDY | {"guidance_scale": 1.0, "num_beam_groups": 1, "output_attentions": False},
}


@pytest.mark.parametrize("settings", SERVED_ALIKE.values(), ids=list(SERVED_ALIKE))
def test_served_settings_answer_as_eager(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, settings: dict[str, Any]
) -> None:
    model, cases = tiny_llava
    config: dict[str, Any] = {"generation_config": GenerationConfig(**_stored(settings))}
    for way in (settings, config | _hooks(settings)):
        torch.manual_seed(5)
        expected = model.generate(**cases["padded"], **way)
        torch.manual_seed(5)
        assert torch.equal(compiled_llava.generate(**cases["padded"], **way), expected)


def _stored(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in vars(GenerationConfig())}


def _hooks(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in vars(GenerationConfig())}


@pytest.mark.parametrize("beams", [1, 2])
def test_results_by_name_are_eagers(tiny_llava: Tiny, compiled_llava: CompiledVLM, beams: int) -> None:
    model, cases = tiny_llava
    asked = GREEDY | {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for cached in (True, False):
        expected = model.generate(**cases["padded"], **asked, use_cache=cached)
        answer = compiled_llava.generate(**cases["padded"], **asked, use_cache=cached)
        assert type(answer) is type(expected) and set(answer) == set(expected)
        assert torch.equal(answer.sequences, expected.sequences)
        torch.testing.assert_close(answer.scores, expected.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answer.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def stored(compiled_llava: CompiledVLM) -> Iterator[Any]:
    """The compiled model's own settings, restored afterwards."""
    kept = copy.deepcopy(compiled_llava.generation_config)
    yield compiled_llava.generation_config
    compiled_llava.machine.host.generation_config = kept


def test_a_stored_use_cache_false_answers_as_eager(tiny_llava: Tiny, compiled_llava: CompiledVLM, stored: Any) -> None:
    model, cases = tiny_llava
    expected = model.generate(**cases["one"], **GREEDY, use_cache=False)
    stored.use_cache = False
    assert torch.equal(compiled_llava.generate(**cases["one"], **GREEDY), expected)
    assert torch.equal(compiled_llava.generate(**cases["one"], **GREEDY, use_cache=True), expected)
    assert stored.use_cache is False


ASKED_FOR: dict[str, Any] = {
    "output_hidden_states": True,
    "output_attentions": True,
    "guidance_scale": 1.5,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "use_mtp": True,
    "speculation_type": "dflash",
    "prefill_chunk_size": 32,
    "token_healing": True,
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "compile_config": CompileConfig(),
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [1],
    "force_words_ids": [[5]],
    "continuous_batching_config": {},
}


def test_every_refused_setting_is_tried() -> None:
    assert set(ASKED_FOR) == set(REFUSED)


@pytest.mark.parametrize("name", sorted(ASKED_FOR))
def test_refused_settings_are_named_wherever_they_stand(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, stored: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(compiled_llava.machine, "execute", _nothing_runs)
    case, value = tiny_llava[1]["one"], ASKED_FOR[name]
    if name != "continuous_batching_config":
        config = GenerationConfig()
        setattr(config, name, value)
        _refused_by(compiled_llava, name, "generation_config=", **case, generation_config=config)
    _refused_by(compiled_llava, name, "an argument of generate", **case, **{name: value})
    setattr(stored, name, value)
    _refused_by(compiled_llava, name, "", **case, max_new_tokens=2)


def _nothing_runs(*args: Any) -> Any:
    pytest.fail("a graph ran")


def _refused_by(compiled: CompiledVLM, name: str, where: str, **given: Any) -> None:
    with pytest.raises(InputError, match=name) as error:
        compiled.generate(**given)
    assert where in (error.value.where or "") and error.value.do


def test_a_stored_setting_that_is_refused_can_be_left_out(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, stored: Any
) -> None:
    case = tiny_llava[1]["one"]
    expected = compiled_llava.generate(**case, **GREEDY)
    stored.guidance_scale, stored.stop_strings, stored.num_beams, stored.num_return_sequences = 1.5, ".", 3, 2
    assert compiled_llava.kept_tokens(**case) == {}
    given: dict[str, Any] = {"guidance_scale": None, "stop_strings": None, "num_beams": 1, "num_return_sequences": 1}
    assert torch.equal(compiled_llava.generate(**case, **GREEDY, **given), expected)


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_refused_arguments_are_named(tiny_llava: Tiny, compiled_llava: CompiledVLM, name: str) -> None:
    _refused_by(compiled_llava, name, "an argument of generate", **tiny_llava[1]["one"], **{name: torch.ones(1)})


def test_other_caches_and_unknown_names(tiny_llava: Tiny, compiled_llava: CompiledVLM) -> None:
    case = tiny_llava[1]["one"]
    _refused_by(compiled_llava, "past_key_values", "argument", **case, past_key_values=DynamicCache())
    with pytest.raises(InputError, match="max_tokens is neither") as error:
        compiled_llava.generate(**case, max_tokens=3)
    assert error.value.do == "did you mean max_new_tokens?"
    with pytest.raises(InputError, match="refuses these settings"):
        compiled_llava.generate(**case, num_return_sequences=2, do_sample=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 10**9}, "answers at once"),
        ({"max_new_tokens": 10**12}, "tokens of prompt and answer"),
        ({"num_beams": 4096, "max_new_tokens": 10**5}, "tokens in all answers"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": "many"}, "num_beams"),
        ({"max_length": 1.5}, "max_length is 1.5"),
        ({"max_length": 3}, "Input length"),
        ({"bad_words_ids": [[5, 99]]}, "names token 99"),
        ({"forced_eos_token_id": -1}, "names token -1"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"stop_strings": "."}, "tokenizer"),
        ({"num_beams": 2, "streamer": object()}, "stream"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"do_sample": True, "temperature": 1e-300}, "temperature is 1e-300"),
        ({"num_beams": 2, "length_penalty": 1e300}, "length_penalty is"),
        ({"repetition_penalty": "x"}, "repetition_penalty"),
        ({"suppress_tokens": list(range(99))}, "suppress_tokens names every token"),
        ({"eos_token_id": 10**9, "exponential_decay_length_penalty": (1, 1.5)}, "eos_token_id names token 1000000000"),
    ],
)
def test_impossible_values(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compiled_llava.generate(**tiny_llava[1]["one"], **settings)


def test_every_setting_of_this_transformers_is_classified() -> None:
    """A new field of GenerationConfig is refused when set; this test requires a decision about it."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - SERVED - IDLE - set(REFUSED) == set()
    assert not SERVED & IDLE and not (SERVED | IDLE) & set(REFUSED) and set(NOTHING) <= set(REFUSED)


def test_a_setting_of_a_later_transformers_is_refused(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpcompile.runtime.generation_options.SERVED", SERVED - {"top_h"})
    with pytest.raises(InputError, match=r"top_h=0\.5: this version of qpcompile does not know it"):
        compiled_llava.generate(**tiny_llava[1]["one"], **SAMPLED, top_h=0.5)
