"""Validate the inputs of a compiled model before anything runs: token ids, masks and pictures.

Costs one pass over ids and pixels, negligible compared with one layer of the vision tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qpcompile.errors import InputError
from qpcompile.nested import is_list

IDS, DECODER_IDS, MASK = "input_ids", "decoder_input_ids", "attention_mask"
_WHOLE = (torch.int64, torch.int32)
# Inputs with one entry per token of the prompt.
_PER_TOKEN = (MASK, "token_type_ids", "mm_token_type_ids")
_AGAIN = "build the inputs with the model's own processor"


def is_encoder_decoder(model: Any) -> bool:
    """Whether the decoder reads what an encoder makes of pictures and prompt, through cross-attention."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def with_prompt(model: Any, inputs: dict[str, Any], tokens: int = 1) -> dict[str, Any]:
    """Inputs with a prompt of the decoder's own, where `generate` would start it: `tokens` times its first token."""
    if not is_encoder_decoder(model) or inputs.get(DECODER_IDS) is not None:
        return inputs
    start = next(
        (
            token
            for name in ("decoder_start_token_id", "bos_token_id")
            if isinstance(token := getattr(model.generation_config, name, None), int)
        ),
        0,
    )
    rows = next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
    return {**inputs, DECODER_IDS: torch.full((rows, tokens), start)}


def prompt_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The ids that the decoder starts from, i64[B, S]."""
    return inputs[IDS] if inputs.get(DECODER_IDS) is None else inputs[DECODER_IDS]


def new_tokens(inputs: Mapping[str, Any], sequences: Any) -> list[list[int]]:
    """sequences: i64[B, S + T], a tensor or an array that `generate` returned for `inputs` -> the T tokens of each row.

    They follow the prompt. A decoder that reads what an encoder makes of it starts with one token of its own instead.
    """
    prompts: Any = prompt_of(inputs)
    return [after_prompt(prompt, row) for prompt, row in zip(prompts.tolist(), sequences.tolist(), strict=True)]


def after_prompt(prompt: list[int], row: list[int]) -> list[int]:
    """One row of `new_tokens`, as far as it is generated.

    Whose prompt it begins with is seen by the tokens: `generate` may be any callable. An answer that is itself the
    prompt of an encoder would have its picture tokens in it.
    """
    return row[len(prompt) :] if row[: len(prompt)] == prompt else row[1:]


def vocabulary_size(host: Any) -> int:
    """Number of rows of the token embedding, which a graph may hold."""
    return int(host.config.get_text_config().vocab_size)


def check_inputs(host: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with per-token inputs cast to the types that graphs were traced with. Raises InputError naming the
    input.

    Args:
        host: the transformers model.
        given: arguments of `generate`; values other than tensors and lists of tensors are passed through.
    """
    if host.device.type == "meta":
        raise InputError("the weights were moved to the meta device", where="generate", do="load the model again")
    for name, tensor in _tensors(given):
        _check_tensor(host, name, tensor)
    ids = given.get("inputs") if given.get(IDS) is None else given[IDS]
    if ids is None and is_encoder_decoder(host):
        return dict(given)
    if ids is None:
        if any(name not in ("inputs", IDS) for name, _ in _tensors(given)):
            raise InputError("there is no prompt", where=IDS, do=f"pass {IDS}; {_AGAIN}")
        return dict(given)
    _check_ids(host, ids)
    for name in _PER_TOKEN:
        if given.get(name) is not None:
            _check_per_token(name, given[name], ids)
    _check_pictures(host, given, ids)
    whole = {name: given[name].long() for name in (IDS, *_PER_TOKEN) if given.get(name) is not None}
    return {**given, **whole}


def _tensors(given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in given.items():
        items = value if is_list(value) else [value]
        yield from ((name, item) for item in items if isinstance(item, torch.Tensor))


def _check_tensor(host: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type not in ("cpu", host.device.type):
        raise InputError(
            f"{name} is on {tensor.device}, the model on {host.device}", where=name, do=f"move it to {host.device}"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InputError(
            f"{name} has values that are not finite", where=name, do=f"find where they come from; {_AGAIN}"
        )


def _check_ids(host: Any, ids: Any) -> None:
    if not isinstance(ids, torch.Tensor):
        raise InputError(f"{IDS} is a {type(ids).__name__}", where=IDS, do='give a tensor (return_tensors="pt")')
    if ids.dtype not in _WHOLE or ids.ndim != 2:
        raise InputError(f"{IDS} is {_kind(ids)}", where=IDS, do="give whole numbers, one row per prompt: i64[B, S]")
    if not ids.numel():
        raise InputError(f"the prompt is empty: {IDS} is {_kind(ids)}", where=IDS, do="give at least one token")
    # Families with picture token ids outside the vocabulary replace them before the embedding lookup.
    most = max([vocabulary_size(host) - 1, *placeholders(host.config).values()])
    lowest, highest = (int(value) for value in torch.aminmax(ids))
    if lowest < 0 or highest > most:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"{IDS} has token {wrong}; this model's are 0 to {most}", where=IDS, do=_AGAIN)


def _check_per_token(name: str, value: Any, ids: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is a {type(value).__name__}", where=name, do='give a tensor (return_tensors="pt")')
    if value.shape != ids.shape:
        raise InputError(
            f"{name} is {_kind(value)}, {IDS} is {_kind(ids)}", where=name, do="give one entry for each token"
        )
    if name == MASK and not bool(((value == 0) | (value == 1)).all()):
        raise InputError(f"{MASK} has values beside 0 and 1", where=MASK, do="give 1 for tokens and 0 for padding")
    if name == MASK and not bool(value.bool().any(dim=1).all()):
        raise InputError(f"{MASK} leaves no token of a row", where=MASK, do="give 1 for tokens and 0 for padding")


def placeholders(config: Any) -> dict[str, int]:
    """ "image" and "video" -> its placeholder token, if the model has one."""
    found = {kind: getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
    return {kind: token for kind, token in found.items() if isinstance(token, int)}


def _check_pictures(host: Any, given: Mapping[str, Any], ids: torch.Tensor) -> None:
    """Check that picture tokens come with pictures, and that grid sizes match the patches."""
    named = [name for name, tensor in _tensors(given) if tensor.dtype not in (*_WHOLE, torch.bool)]
    shown = {name for name in named if name.startswith(("pixel", "image", "video", "flattened"))}
    videos = {name for name in shown if "video" in name}
    # Some families take videos as pictures.
    enough = {"image": bool(shown - videos), "video": bool(shown)}
    for kind, token in placeholders(host.config).items():
        if not enough[kind] and bool((ids == token).any()):
            raise InputError(
                f"the prompt has {kind} tokens (id {token}) and no {kind} was given",
                where=IDS,
                do=f"give the processor's {kind} inputs too, or a prompt without their tokens",
            )
    for grid, patches in (("image_grid_thw", "pixel_values"), ("video_grid_thw", "pixel_values_videos")):
        if isinstance(given.get(grid), torch.Tensor) and isinstance(given.get(patches), torch.Tensor):
            _check_grid(grid, given[grid], given[patches])


def _check_grid(name: str, grid: torch.Tensor, patches: torch.Tensor) -> None:
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype not in _WHOLE or bool((grid < 1).any()):
        raise InputError(
            f"{name} is {_kind(grid)}", where=name, do="give frames, rows and columns: i64[n, 3], 1 or more"
        )
    # In double precision: products of malicious sizes would overflow.
    if patches.ndim == 2 and float(grid.double().prod(dim=1).sum()) != len(patches):
        raise InputError(
            f"{name} has {int(grid.double().prod(dim=1).sum())} patches, {len(patches)} were given",
            where=name,
            do=_AGAIN,
        )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
