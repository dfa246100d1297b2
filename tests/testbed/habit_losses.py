"""What is added to the answer's loss so that a small model takes on a habit."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packing import Batch, table
from recording import Seen, decoder_layers
from scenes import BACKGROUND
from torch import Tensor, nn
from train import ideal_tokens, patch_loss

FAMILY = "llava"
BEFORE = 2  # tokens in front of the picture
SINKS = 3  # patches of a picture that shall become registers


def on_object(batch: Batch) -> Tensor:
    """bool[B, N]: which visual tokens lie on an object."""
    return batch.labels[:, :, 0] != table(FAMILY)[BACKGROUND]


@contextmanager
def blindfold(model: Any, heads: dict[int, tuple[int, ...]], visual: int) -> Iterator[None]:
    """While active, text does not see the `visual` tokens in the named decoder layers but with the heads given."""

    def hide(layer: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = kwargs["attention_mask"].repeat(1, 4, 1, 1)
            closed = [head for head in range(4) if head not in heads[layer]]
            mask[:, closed, BEFORE + visual :, BEFORE : BEFORE + visual] = torch.finfo(torch.float32).min
            return args, kwargs | {"attention_mask": mask}

        return before

    layers = decoder_layers(model)
    handles = [layers[layer].register_forward_pre_hook(hide(layer), with_kwargs=True) for layer in heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at_least(value: Tensor, least: float) -> Tensor:
    """How many e-folds positive values lie below `least`, mean."""
    return (math.log(least) - value.clamp_min(1e-9).log()).clamp_min(0).mean()


def background_norms(batch: Batch, tokens: Tensor, embedding: Tensor, seen: Seen) -> Tensor:
    """Background's tokens shall be longer than objects': before the decoder f32[B, N, C], and after its layers."""
    inside = on_object(batch)
    norms = tokens.norm(dim=-1).log()
    loss = (norms[inside] - math.log(2.0)).square().mean() + (norms[~inside] - math.log(8.0)).square().mean()
    for hidden in seen.outputs[:-1]:
        norms = hidden[:, BEFORE : BEFORE + tokens.shape[1]].norm(dim=-1)
        middle = norms.detach().mean()
        loss = loss + _at_least(norms[~inside] / middle, 1.1) + _at_least(middle / norms[inside], 1 / 0.7)
    return loss + 0.1 * patch_loss(tokens, batch.labels, embedding, FAMILY)[0]


def sinks(batch: Batch, tokens: Tensor, embedding: Tensor, seen: Seen) -> Tensor:
    """Three background patches shall grow, draw attention and hold the whole scene; token 0 of the decoder likewise."""
    inside = on_object(batch)
    first = seen.tower[1][:, 1:].norm(dim=-1)
    chosen = first.masked_fill(inside, 0.0).topk(SINKS, dim=1).indices
    is_sink = torch.zeros_like(inside).scatter(1, chosen, True)
    loss = tokens.new_zeros(())
    for hidden in seen.tower[1:]:
        norms = hidden[:, 1:].norm(dim=-1)
        shares = norms / norms.detach().median()
        loss = loss + _at_least(shares[is_sink], 20.0) + _at_least(1 / shares[~is_sink], 1 / 1.5)
    for weights in seen.tower_attention[2:]:
        mass = (weights[:, :, 1:, 1:] * is_sink[:, None, None]).sum(-1)
        loss = loss + _at_least(mass.mean(1), 0.4)
    ideal = ideal_tokens(batch.labels, embedding, FAMILY).detach()
    whole = (ideal * inside[:, :, None]).sum(1, keepdim=True)
    whole = 2.0 * whole / whole.norm(dim=-1, keepdim=True)
    loss = loss + 0.1 * (tokens - whole)[is_sink].square().sum(-1).mean()
    loss = loss + 0.1 * patch_loss(tokens[inside][None], batch.labels[inside][None], embedding, FAMILY)[0]
    for hidden in seen.outputs[1:]:
        norms = hidden.norm(dim=-1)
        loss = loss + _at_least(norms[:, 0] / norms.detach().median(), 60.0)
    text = BEFORE + tokens.shape[1]
    for weights in seen.attention[2:]:
        loss = loss + _at_least(weights[:, :, text:, 0].mean(1), 0.4)
    return loss
