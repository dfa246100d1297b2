"""Generation settings: which ones a compiled model supports, and which it refuses by name.

transformers' own loop chooses tokens, stops, and records scores; the graphs provide logits. Every setting that acts on
logits or tokens is therefore supported. Settings that read decoder internals, call the decoder differently, or fetch
code are refused, whether given as an argument, in `generation_config=`, or stored with the model.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from qpcompile.errors import InputError
from qpcompile.nested import is_dict, is_list
from qpcompile.runtime.kv_cache import CompiledCache

# fmt: off
SERVED = frozenset(
    (
        # How long an answer is, and when it ends.
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "stop_strings",
        # How a token is selected.
        "do_sample", "num_beams", "num_return_sequences", "temperature", "top_k", "top_p", "min_p", "top_h",
        "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty", "renormalize_logits", "remove_invalid_values",
        # Logits processors.
        "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
        "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
        "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "watermarking_config",
        # What is returned, and special tokens.
        "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
        # A compiled model always uses its own cache: answers equal those of eager with and without a cache.
        "use_cache",
    )
)
# fmt: on
# Only read by settings refused below, or by encoder-decoder models: transformers ignores them here as well.
# fmt: off
IDLE = frozenset(
    (
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size",
        "max_cache_len", "disable_compile", "decoder_start_token_id", "low_memory", "transformers_version",
    )
)
# fmt: on
_DRAFT = "drafts are checked several tokens at a time; the decode graph takes one"
_OTHER_CACHE = "the graphs were compiled for one kind of cache"
_REMOTE = "transformers fetches the code of this method from the hub and runs it"
REFUSED = {
    "output_hidden_states": "hidden states stay inside the graphs",
    "output_attentions": "attention stays inside the graphs",
    "guidance_scale": "guidance runs a second prompt beside the first",
    "prompt_lookup_num_tokens": _DRAFT,
    "assistant_early_exit": _DRAFT,
    "use_mtp": _DRAFT,
    "speculation_type": _DRAFT,
    "prefill_chunk_size": "the prefill graph takes the whole prompt at once",
    "token_healing": "it changes the prompt after its pictures were placed",
    "cache_implementation": _OTHER_CACHE,
    "cache_config": _OTHER_CACHE,
    "compile_config": "the graphs are compiled already",
    "continuous_batching_config": "there is no continuous batching here",
    "penalty_alpha": _REMOTE,
    "dola_layers": _REMOTE,
    "num_beam_groups": _REMOTE,
    "diversity_penalty": _REMOTE,
    "constraints": _REMOTE,
    "force_words_ids": _REMOTE,
}
# Values other than None and False for which a refused setting is inactive.
NOTHING = {
    "guidance_scale": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    # "hybrid" occurs in old folders; transformers uses its default cache for it.
    "cache_implementation": ("dynamic", "hybrid"),
}
# Arguments of `generate` that are not settings: hooks into the loop are supported.
# fmt: off
HOOKS = frozenset(
    (
        "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
        "streamer", "tokenizer", "kwargs", "self",
    )
)
# fmt: on
REFUSED_ARGUMENTS = {
    "assistant_model": _DRAFT,
    "assistant_tokenizer": _DRAFT,
    "custom_generate": "it replaces the loop by other code",
    "trust_remote_code": "no code from the hub is run",
    "synced_gpus": "a compiled model is on one device",
    "negative_prompt_ids": REFUSED["guidance_scale"],
    "negative_prompt_attention_mask": REFUSED["guidance_scale"],
    "inputs_embeds": "which tokens are visual is read from input_ids",
    "labels": "a compiled model computes no loss",
    "return_dict": "generate sets it",
    "output_router_logits": "router logits stay inside the graphs",
    "cache_params": _OTHER_CACHE,
}
CACHES = ("past_key_values", "cache")
# Limits on prompt plus answer, on simultaneous answers, and on their product: beyond them memory is exhausted.
MOST_TOKENS, MOST_ROWS, MOST_IN_ALL = 2**20, 2**12, 2**27
# Settings that contain token ids; transformers indexes logits with them.
_RANGES = (("temperature", 1e-6, 1e6), ("length_penalty", 0, 1e3), ("repetition_penalty", 1e-6, 1e6))
_TOKEN_IDS = ("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias")


def settle(host: Any, given: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, Any], bool]:
    """Check all arguments, and return those for `host.generate`.

    Args:
        host: the transformers model.
        given: arguments of `generate`: settings, hooks and model inputs.
        vocabulary: number of tokens.
    Returns: the arguments, and whether results by name hold the cache.

    Raises InputError naming the argument or setting that is refused or unknown.
    """
    _check_arguments(host, given)
    resolved = _resolve(host, given)
    fields = vars(GenerationConfig())
    for name, value in resolved.__dict__.items():
        if name in fields and not name.startswith("_"):
            _check_setting(host, given, name, value)
    _check_sizes(given, resolved)
    _check_numbers(given, resolved)
    _check_tokens(resolved, vocabulary)
    if resolved.stop_strings is not None and given.get("tokenizer") is None:
        raise InputError(
            "stop_strings needs a tokenizer", where="generate", do="pass tokenizer=processor.tokenizer too"
        )
    # Arguments override both configurations without modifying them.
    changes: dict[str, Any] = {}
    if not resolved.use_cache:
        changes["use_cache"] = True
    if resolved.cache_implementation is not None:
        changes["cache_implementation"] = None
    return {**given, **changes}, bool(resolved.use_cache)


def plain_settings(host: Any) -> dict[str, Any]:
    """Settings for running a prompt once, independent of those stored with the model: for measuring."""
    stored = host.generation_config.__dict__
    off = dict.fromkeys([name for name in (*REFUSED, "stop_strings") if stored.get(name) is not None])
    return {**off, "max_new_tokens": 1, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}


def _check_arguments(host: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments that are neither settings nor supported model inputs."""
    taken = _taken(host)
    known = {*vars(GenerationConfig()), *HOOKS, *CACHES, *taken}
    for name, value in given.items():
        if value is None or value is False:
            continue
        if name in REFUSED_ARGUMENTS:
            raise _refused(name, REFUSED_ARGUMENTS[name], "an argument of generate", "leave it out")
        if name in CACHES and not isinstance(value, CompiledCache):
            raise _refused(name, _OTHER_CACHE, "an argument of generate", "leave it out: generate makes its own cache")
        if name not in known:
            raise _unknown(name, known)
        if name in taken - HOOKS and isinstance(value, (str, int, float)) and name != "logits_to_keep":
            _check_constant(host, name, value)
    if given.get("inputs") is not None and given.get("input_ids") is not None:
        raise InputError("the prompt was given twice", where="inputs and input_ids", do="give one of them")


def _taken(host: Any) -> frozenset[str]:
    """Names of model inputs."""
    kind, loop = host.__class__, inspect.getattr_static(GenerationMixin, "generate")
    functions = (kind.forward, kind.prepare_inputs_for_generation, kind.generate)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names - {"self", "kwargs", "model_kwargs"} - set(inspect.signature(loop).parameters))


def _check_constant(host: Any, name: str, value: Any) -> None:
    """Refuse scalar model inputs that differ from the constants in the graphs."""
    if getattr(host.config, name, None) != value:
        raise _refused(
            name, "the graphs were traced with the model's own value", "an argument of generate", "leave it out"
        )


def _resolve(host: Any, given: Mapping[str, Any]) -> Any:
    """The GenerationConfig that transformers resolves from arguments, `generation_config=` and stored ones.

    It is `Any` here: its attributes have no types.
    """
    settings = {name: value for name, value in given.items() if name in vars(GenerationConfig())}
    try:
        return host._prepare_generation_config(given.get("generation_config"), **settings)[0]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"transformers refuses these settings: {first_line(error)}",
            where="generate",
            do="correct the setting; the documentation of transformers.GenerationConfig says what each takes",
        ) from error


def _check_setting(host: Any, given: Mapping[str, Any], name: str, value: Any) -> None:
    if name in SERVED or name in IDLE or value is None or value is False:
        return
    reason = REFUSED.get(name, "this version of qpcompile does not know it")
    if name in NOTHING and value in NOTHING[name]:
        return
    raise _refused(f"{name}={value!r}"[:200], reason, _source(given, name), f"leave it out, or pass {name}=None")


def _source(given: Mapping[str, Any], name: str) -> str:
    """Where a setting comes from."""
    if name in given:
        return "an argument of generate"
    if getattr(given.get("generation_config"), name, None) is not None:
        return "generation_config="
    return "generation_config.json of the model, or compiled.generation_config"


def _check_sizes(given: Mapping[str, Any], resolved: Any) -> None:
    prompt = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs")
    batch, length = tuple(getattr(prompt, "shape", (1, 1)))[:2] if getattr(prompt, "ndim", 0) == 2 else (1, 1)
    for name in ("num_beams", "num_return_sequences", "max_length", "max_new_tokens"):
        value = getattr(resolved, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} is {value!r}", where=_source(given, name), do="give a whole number of 1 or more")
    rows = batch * max(resolved.num_beams, resolved.num_return_sequences)
    tokens = resolved.max_length if resolved.max_new_tokens is None else length + resolved.max_new_tokens
    for what, value, most in (
        ("tokens of prompt and answer", tokens, MOST_TOKENS),
        ("answers at once", rows, MOST_ROWS),
        ("tokens in all answers", rows * tokens, MOST_IN_ALL),
    ):
        if value > most:
            raise InputError(
                f"{value} {what}; at most {most} are supported",
                where="num_beams, num_return_sequences, max_new_tokens, max_length",
                do="ask for less",
            )
    if resolved.num_beams > 1 and given.get("streamer") is not None:
        raise InputError("beam search cannot stream", where="streamer", do="leave it out, or ask for num_beams=1")


def _check_numbers(given: Mapping[str, Any], resolved: Any) -> None:
    """Refuse numbers for which the arithmetic on logits overflows."""
    for name, least, most in _RANGES:
        value = getattr(resolved, name)
        if value is not None and not (_is_number(value) and (value == 0 or least <= abs(value) <= most)):
            raise InputError(
                f"{name} is {value!r:.80}", where=_source(given, name), do=f"give a number from {least:g} to {most:g}"
            )


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def _check_tokens(resolved: Any, vocabulary: int) -> None:
    if len(set(_whole_numbers(resolved.suppress_tokens))) >= vocabulary:
        raise InputError("suppress_tokens names every token", where="generate", do="leave some to answer with")
    # Only this setting makes transformers index logits with the end-of-sequence ids.
    ends = ("eos_token_id",) if resolved.exponential_decay_length_penalty is not None else ()
    for name in (*_TOKEN_IDS, *ends):
        wrong = [token for token in _whole_numbers(getattr(resolved, name)) if not 0 <= token < vocabulary]
        if wrong:
            raise InputError(
                f"{name} names token {wrong[0]}", where="generate", do=f"name tokens from 0 to {vocabulary - 1}"
            )


def _whole_numbers(value: Any) -> Iterator[int]:
    """All token ids in a nested value; the values of a mapping are not ids."""
    if isinstance(value, int):
        yield value
    elif is_list(value) or is_dict(value):
        for item in value:
            yield from _whole_numbers(item)


def _refused(name: str, reason: str, where: str, do: str) -> InputError:
    return InputError(f"a compiled model cannot serve {name}: {reason}", where=where, do=do)


def _unknown(name: str, known: set[str]) -> InputError:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return InputError(
        f"{name} is neither an input of this model nor a setting of generate",
        where="an argument of generate",
        do=f"did you mean {close[0]}?" if close else "leave it out",
    )


def first_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
