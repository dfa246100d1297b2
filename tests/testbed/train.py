"""Trains one of the two small models from scratch, on the CPU, in three stages.

    python tests/testbed/train.py --family llava --work runs/llava --out tests/testbed/llava

1. tower:   pictures full of objects; each visual token learns to be the sum of the embeddings of its object's words.
2. decoder: no pictures; visual tokens are such sums, first only of objects and a little background, then of all.
3. joint:   everything together, real pictures, all visual tokens.

Word embeddings are initialised orthonormal and fixed in the first two stages, so that these can run independently.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from architectures import DIALECTS, build_model, build_processor, save_folder
from encoding import encode_pictures, use_grouped_windows
from packing import Batch, attention_mask, category_ids, choose_tokens, make_batch, picture_positions, table
from torch import Tensor, nn
from transformers import PreTrainedModel

STAGES = ("tower", "decoder", "joint")
# Shares of the question kinds in stage 2 and the first part of stage 3. Lookups of colour, shape and digit are learned
# at once; slower kinds have larger shares: a zone as the answer, two keys at a time, counting, and absence.
DECODER_WEIGHTS = np.array([4, 4, 4, 6, 4, 4, 26, 20, 4, 12, 12]) / 100.0
TRAIN_SEED = 1  # evaluation uses 7, the calibration folders 3


def word_embeddings(model: PreTrainedModel) -> Tensor:
    """The embedding table, tied to the output head: f32[V, C]."""
    return cast(Tensor, model.get_input_embeddings().weight)


def patch_loss(tokens: Tensor, labels: Tensor, embedding: Tensor, family: str) -> tuple[Tensor, Tensor]:
    """Errors of tokens f32[B, N, C] in naming their patches: (cross-entropy, distance to the sum of embeddings)."""
    background = table(family)[scenes.BACKGROUND]
    is_object = labels[:, :, 0] != background
    weight = torch.where(is_object, 1.0, 0.3)
    weight = weight / weight.sum()
    entropy = tokens.new_zeros(())
    for column, ids in enumerate(category_ids(family)):
        logits = 8.0 * tokens @ embedding[ids].T
        classes = (labels[:, :, column, None] == ids).int().argmax(-1)
        losses = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none")
        entropy = entropy + (losses * weight.flatten()).sum()
    distance = (tokens - ideal_tokens(labels, embedding, family)).square().sum(-1)
    return entropy, (distance * weight).sum()


def ideal_tokens(labels: Tensor, embedding: Tensor, family: str) -> Tensor:
    """The target of the tower, f32[B, N, C]: the sum of four words' embeddings, or "background" once."""
    scale = torch.where(labels[:, :, 0] == table(family)[scenes.BACKGROUND], 0.25, 1.0)
    return embedding[labels].sum(2) * scale[:, :, None]


def answer_logits(model: PreTrainedModel, family: str, batch: Batch, tokens: Tensor, keep: Tensor | None) -> Tensor:
    """Logits f32[A, V] where answers are asked for, from visual tokens f32[B, K, C] at their true positions."""
    embed = model.get_input_embeddings()
    before = torch.tensor([table(family)[word] for word in DIALECTS[family].before_image])
    pictures, prefix = len(tokens), len(before) + tokens.shape[1]
    places, text_start = picture_positions(family, batch.pixels.shape[1], batch.pixels.shape[2])
    visual = places[:, None].expand(-1, pictures, -1)
    if keep is not None:
        visual = visual.gather(2, keep.expand(len(places), -1, -1))
    first = torch.arange(len(before)).expand(len(places), pictures, -1)
    text = (batch.offset + text_start).expand(len(places), -1, -1)
    positions = torch.cat([first, visual, text], dim=2)
    inputs = torch.cat([embed(before).expand(pictures, -1, -1), tokens, embed(batch.ids)], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        position_ids=positions[0] if len(places) == 1 else positions,
        attention_mask=attention_mask(batch.segment, prefix),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.ask_row, prefix + batch.ask_column])


def tower_step(model: PreTrainedModel, family: str, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
    """Loss of stage 1."""
    crowded = (10, 24) if progress < 0.8 else (4, 16)
    pictures = 16 if family == "llava" else 8
    batch = make_batch(family, (TRAIN_SEED, 1, step), pictures, 0, crowded, smallest=progress < 0.6)
    tokens = encode_pictures(model, batch.pixels)
    embedding = word_embeddings(model)
    entropy, distance = patch_loss(tokens, batch.labels, embedding, family)
    return entropy + 0.3 * distance, {"patch": entropy.item(), "distance": distance.item()}


def decoder_step(model: PreTrainedModel, family: str, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
    """Loss of stage 2."""
    batch = make_batch(family, (TRAIN_SEED, 2, step), 4, 10, weights=DECODER_WEIGHTS)
    generator = torch.Generator().manual_seed(step)
    embedding = word_embeddings(model)
    background = table(family)[scenes.BACKGROUND]
    keep = choose_tokens(batch.labels, background, 32 if progress < 0.6 else 64, generator)
    labels = batch.labels.gather(1, keep[:, :, None].expand(-1, -1, 4))
    tokens = ideal_tokens(labels, embedding, family)
    scale = 1 + 0.2 * torch.randn(tokens.shape[:2], generator=generator)[:, :, None]
    tokens = tokens * scale + 0.06 * torch.randn(tokens.shape, generator=generator)
    return answer_loss(answer_logits(model, family, batch, tokens, keep), batch)


def joint_step(model: PreTrainedModel, family: str, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
    """Loss of stage 3."""
    weights = DECODER_WEIGHTS if progress < 0.6 else scenes.WEIGHTS
    batch = make_batch(family, (TRAIN_SEED, 3, step), 4, 16, weights=weights)
    with torch.set_grad_enabled(progress > 0.8):  # until then only the decoder adapts to the tower's tokens
        tokens = encode_pictures(model, batch.pixels)
    loss, report = answer_loss(answer_logits(model, family, batch, tokens, None), batch)
    entropy, distance = patch_loss(tokens, batch.labels, word_embeddings(model), family)
    return loss + 0.1 * entropy + 0.02 * distance, {**report, "patch": entropy.item()}


def answer_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of answers and ends; answers sit at the even places."""
    losses = F.cross_entropy(logits, batch.target, reduction="none")
    right = (logits[::2].argmax(-1) == batch.target[::2]).float().mean()
    return losses[::2].mean() + 0.2 * losses[1::2].mean(), {"answer": losses[::2].mean().item(), "right": right.item()}


STEPS: dict[str, Callable[[PreTrainedModel, str, int, float], tuple[Tensor, dict[str, float]]]] = {
    "tower": tower_step,
    "decoder": decoder_step,
    "joint": joint_step,
}


def trainable(model: PreTrainedModel, stage: str) -> dict[str, nn.Parameter]:
    """The parameters that a stage trains; its checkpoint holds only these, so the first two can run in parallel."""
    chosen = {}
    for name, parameter in model.named_parameters():
        of_decoder = name.startswith(("model.language_model", "lm_head"))
        fixed = "embed_tokens" in name and stage != "joint"
        if stage == "joint" or (of_decoder == (stage == "decoder") and not fixed):
            chosen[name] = parameter
    return chosen


def run_stage(model: PreTrainedModel, family: str, stage: str, steps: int, rate: float, work: Path, out: Path) -> None:
    """Runs one stage from its checkpoint; AdamW, warm-up, cosine."""
    named = trainable(model, stage)
    parameters = list(named.values())
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.97), weight_decay=0.01, fused=True)
    checkpoint = work / f"{stage}.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.train()
    started, sums, count = time.time(), dict[str, float](), 0
    for step in range(first, steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        loss, report = STEPS[stage](model, family, step, progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        sums = {name: sums.get(name, 0.0) + value for name, value in report.items()}
        count += 1
        if count == 50 or step + 1 == steps:
            means = "  ".join(f"{name} {value / count:.3f}" for name, value in sums.items())
            print(f"{stage} {step + 1}/{steps}  {time.time() - started:.0f} s  {means}", flush=True)
            sums, count = {}, 0
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state = {"model": dict(named), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            if stage == "joint":
                save_folder(model, build_processor(family), out)


def start(family: str) -> PreTrainedModel:
    """The untrained model with orthonormal word embeddings."""
    torch.manual_seed(TRAIN_SEED)
    model = build_model(family)
    with torch.no_grad():
        nn.init.orthogonal_(word_embeddings(model))
    model.tie_weights()
    return model


def main() -> None:
    """Command line: runs stages in order; a stage completed in --work is only loaded."""
    parser = argparse.ArgumentParser(description="Trains one of the two small models.")
    parser.add_argument("--family", choices=sorted(DIALECTS), required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints with optimizer state, for resuming")
    parser.add_argument("--out", type=Path, required=True, help="the model folder")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="in the order given")
    parser.add_argument("--steps", type=int, nargs=3, default=[1200, 4000, 1200], metavar=STAGES)
    parser.add_argument("--rates", type=float, nargs=3, default=[2e-3, 2e-3, 1.2e-3], metavar=STAGES)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    model = start(options.family)
    use_grouped_windows(model)
    for stage in options.stages:
        place = STAGES.index(stage)
        steps, rate = options.steps[place], options.rates[place]
        run_stage(model, options.family, stage, steps, rate, options.work, options.out)


if __name__ == "__main__":
    main()
