"""Derives small models with other habits from the shipped `llava`, by fine-tuning on the same scenes.

    python tests/testbed/habits.py late-reader --out tests/testbed/late-reader

A habit is a smaller decoder made of the shipped layers, and a loss that is added while training and fades before its
end. What the models then do is measured by `profiles.py`.
"""

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import build_processor, save_folder
from encoding import encode_pictures
from habit_losses import background_norms, blindfold, sinks
from packing import Batch, make_batch
from recording import recorded
from torch import Tensor, nn
from train import answer_logits, answer_loss, word_embeddings
from transformers import AutoModelForImageTextToText, GemmaConfig, LlavaForConditionalGeneration, PreTrainedConfig

HERE = Path(__file__).parent
SEED = 1  # of training, as in train.py


@dataclass(frozen=True)
class Habit:
    """How a model is made from `llava`: which decoder layers (None is a new one), how wide, and how it is trained."""

    layers: tuple[int | None, ...]
    steps: int
    rate: float
    width: int = 320
    kv_heads: int = 4
    gemma: bool = False
    tower: bool = False  # the tower and the projector are trained too
    eager: bool = False  # the loss reads attention weights


HABITS = {
    "late-reader": Habit((None, None, None, None, 0, 1, 2, 5), steps=700, rate=6e-4, width=144),
    "background-norms": Habit((0, 1, 2, 5, 6), steps=400, rate=6e-4, tower=True),
    "sinks": Habit((0, 1, 2, 5, 6), steps=500, rate=8e-4, tower=True, eager=True),
    "gemma": Habit((0, 1, 2, 5, 6), steps=450, rate=8e-4, kv_heads=2, gemma=True),
}


def decoder_config(source: PreTrainedConfig, habit: Habit) -> PreTrainedConfig:
    """The text config of a habit's model, from that of the model it is made of."""
    changes: dict[str, Any] = {
        "num_hidden_layers": len(habit.layers),
        "intermediate_size": habit.width,
        "num_key_value_heads": habit.kv_heads,
    }
    fields = source.to_dict() | changes
    if not habit.gemma:
        return type(source)(**fields)
    wanted = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return GemmaConfig(**{name: fields[name] for name in wanted})


def derive(source: Any, habit: Habit) -> Any:
    """The model before training: the tower's read layers and the chosen decoder layers of `source`, made narrower."""
    config = copy.deepcopy(source.config)
    config.text_config = decoder_config(source.config.text_config, habit)
    read = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer
    config.vision_config.num_hidden_layers, config.vision_feature_layer = read, -1
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    state = source.state_dict()
    layers = "model.language_model.layers."
    taken = {name: value for name, value in state.items() if not name.startswith(layers)}
    identity = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # zero in a new layer
    for new, old in enumerate(habit.layers):
        if old is not None:
            prefix = f"{layers}{old}."
            block = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            taken |= {f"{layers}{new}.{name}": value for name, value in _narrowed(block, habit).items()}
        else:
            begun = {f"{layers}{new}.{name}" for name in identity}
            taken |= {name: torch.zeros_like(value) for name, value in model.state_dict().items() if name in begun}
    if habit.gemma:
        taken = _as_gemma(taken)
    missing, _ = model.load_state_dict(taken, strict=False)
    assert all(name.startswith(layers) for name in missing), missing
    model.tie_weights()
    return model


def _narrowed(block: dict[str, Tensor], habit: Habit) -> dict[str, Tensor]:
    """One layer with the MLP's heaviest neurons only, and neighbouring key-value heads averaged."""
    gate, up, down = (block[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    kept = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(habit.width).indices.sort().values
    changed = {
        "mlp.gate_proj.weight": gate[kept],
        "mlp.up_proj.weight": up[kept],
        "mlp.down_proj.weight": down[:, kept],
    }
    for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        heads = block[name].unflatten(0, (habit.kv_heads, -1, 32))
        changed[name] = heads.mean(1).flatten(0, 1)
    return block | changed


def _as_gemma(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gemma multiplies embeddings by the root of the width, and norms by 1 + weight."""
    changed = dict(state)
    for name, value in state.items():
        root = math.sqrt(value.shape[-1])
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            changed[name] = value / root
        elif "language_model" in name and "norm" in name:
            changed[name] = (value * root if name.endswith("language_model.norm.weight") else value) - 1
    return changed


def step_loss(model: Any, name: str, batch: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
    """Loss of one training step."""
    habit = HABITS[name]
    hidden = {0: (), 1: (), 2: (), 3: (), 4: (0, 1)} if name == "late-reader" and progress < 0.7 else {}
    with recorded(model) as seen, blindfold(model, hidden, batch.labels.shape[1]):
        with torch.set_grad_enabled(habit.tower):
            tokens = encode_pictures(model, batch.pixels)
        logits = answer_logits(model, "llava", batch, tokens, None)
    loss, report = answer_loss(logits, batch)
    extra = torch.zeros(())
    if name == "background-norms":
        extra = background_norms(batch, tokens, word_embeddings(model), seen)
    elif name == "sinks":
        extra = sinks(batch, tokens, word_embeddings(model), seen)
    return loss + 0.2 * extra, {**report, "extra": extra.item()}


def right_answers(model: Any) -> float:
    """Share of right answers to 400 packed questions of a seed of its own."""
    batch = make_batch("llava", (SEED, 5, 0), 25, 16)
    with torch.no_grad():
        logits = answer_logits(model, "llava", batch, encode_pictures(model, batch.pixels), None)
    return (logits[::2].argmax(-1) == batch.target[::2]).float().mean().item()


def train(model: Any, name: str, steps: int, out: Path) -> None:
    """AdamW, warm-up, cosine; a batch is determined by the step alone."""
    habit = HABITS[name]
    model.requires_grad_(habit.tower)
    model.model.language_model.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=habit.rate, betas=(0.9, 0.97), weight_decay=0.01, fused=True)
    started, sums = time.time(), dict[str, float]()
    print(f"before training {right_answers(model):.3f}", flush=True)
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = habit.rate * min(1.0, (step + 1) / 30) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        loss, report = step_loss(model, name, make_batch("llava", (SEED, 4, step), 4, 16), progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        sums = {key: sums.get(key, 0.0) + value / 25 for key, value in report.items()}
        if (step + 1) % 25 == 0:
            means = "  ".join(f"{key} {value:.3f}" for key, value in sums.items())
            print(f"{step + 1}/{steps}  {time.time() - started:.0f} s  {means}", flush=True)
            sums = {}
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"unseen {right_answers(model):.3f}", flush=True)
            save_folder(model, build_processor("llava"), out)


def main() -> None:
    """Command line: trains one model."""
    parser = argparse.ArgumentParser(description="Derives a small model with another habit from `llava`.")
    parser.add_argument("habit", choices=sorted(HABITS))
    parser.add_argument("--out", type=Path, required=True, help="the model folder")
    parser.add_argument("--steps", type=int, help="default: the habit's own number")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    habit = HABITS[options.habit]
    source = AutoModelForImageTextToText.from_pretrained(HERE / "llava")
    model = derive(source, habit).train()
    if habit.eager:
        model.set_attn_implementation("eager")
    train(model, options.habit, options.steps or habit.steps, options.out)


if __name__ == "__main__":
    main()
