"""Trains what connects the two parts of the real model: the projector, and low-rank changes of the decoder's linears.

    python tests/testbed/real/train_real.py --work build/real --out tests/testbed/real/factors.safetensors --minutes 45

1. projector: no decoder; a visual token learns to be the sum of the word embeddings that describe its patch.
2. decoder:   answers to questions; the decoder sees all tokens of objects and some of the background at their true
   places, in the last eighth all tokens. Questions about one picture share its prefix.

The tower and the decoder's own weights are never changed; the latter are bfloat16 in stage 2, which is twice as fast.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from assembly import FEATURE_LAYER, LORA_SCALE, VISUAL_TOKENS, assemble
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from questions import askable_scene, easy_picture, easy_questions, scenes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

TRAIN_SEED = 1  # evaluation uses 7, calibration 3
RANKS = {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 16, "gate_proj": 8, "up_proj": 8, "down_proj": 8}
# Shares of the kinds in the order of scenes.TEMPLATES: kinds that are learned slowly are asked more often.
WEIGHTS = np.array([20, 20, 0, 0, 0, 0, 32, 10, 18, 0, 0]) / 100.0
CAPTION = "what is in the picture?"  # asked in training only: every word of a description teaches something
# Fewest and most objects of a scene until that share of stage 2: telling two apart is learned first.
Objects = tuple[float, tuple[int, int]]
CURRICULUM: tuple[Objects, ...] = ((0.3, (2, 3)), (0.55, (3, 4)), (1.0, (3, 5)))
STAGE_1_PICTURES, STAGE_1_STEPS = 480, 600


class Adapted(nn.Module):
    """A linear without bias whose weight stays as it is, in bfloat16, and a trained low-rank change of it."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """f32[..., in] -> f32[..., out]."""
        half = x.bfloat16()
        change = F.linear(F.linear(half, self.a.bfloat16()), self.b.bfloat16())
        return (F.linear(half, self.get_buffer("weight")) + LORA_SCALE * change).float()


@dataclass(frozen=True)
class Picture:
    """A training picture: its pixels, the words under each visual token, and questions with answers."""

    pixels: NDArray[np.uint8]
    words: Sequence[Sequence[str] | None] | None  # one entry per visual token, None for background; None: not known
    asked: list[tuple[str, str]]


@dataclass(frozen=True)
class Packed:
    """Questions of several pictures, padded to one length T: i64[B, T] each, and where answers are predicted."""

    ids: Tensor
    segment: Tensor  # one per question from 1, -1 padding
    offset: Tensor  # position after the picture
    row: Tensor
    column: Tensor
    target: Tensor
    weight: Tensor


def caption(scene: scenes.Scene, rng: Generator) -> str:
    """All objects in any order, their words in any order: each word but an object's first follows from the picture."""
    things = [scene.things[place] for place in rng.permutation(len(scene.things))]
    words = [[thing.color, thing.shape, thing.zone] for thing in things]
    return ", ".join(" ".join(each[place] for place in rng.permutation(3)) for each in words)


class Trainer:
    """The model, its optimizer, and the random numbers of one run."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, parts: Path) -> None:
        self.model, self.processor, self.parts = model.requires_grad_(False), processor, parts
        self.projector = model.model.multi_modal_projector
        self.embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        self.before = self.ids("<|im_start|>user\n")
        self.after = self.ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.ids("<|im_end|>")

    def ids(self, text: str) -> list[int]:
        """Token ids of a text that may hold special tokens."""
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def features(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """What the projector reads, f32[B, N, 384]."""
        images = [Image.fromarray(pixels) for pixels in pictures]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        tower = self.model.model.vision_tower
        hidden = tower.embeddings(pixels)
        for layer in tower.encoder.layer[: len(tower.encoder.layer) + 1 + FEATURE_LAYER]:
            hidden = layer(hidden)
        return hidden[:, 1:]

    def meaning(self, words: Sequence[str]) -> Tensor:
        """The sum of the embeddings of the words' tokens without spaces and hyphens, f32[C]."""
        marks = set(self.ids(" ") + self.ids("-"))
        tokens = [token for word in words for token in self.ids(" " + word) if token not in marks]
        return self.embedding[tokens].sum(0)

    def scene_picture(self, rng: Generator, questions: int, things: tuple[int, int] = (4, 6)) -> Picture:
        """A rendered scene and questions about it."""
        scene = askable_scene(rng, *things)
        pixels = scenes.render(scene, rng)
        asked = [scenes.ask(scene, rng, WEIGHTS) for _ in range(questions)]
        pairs = [(each.text, each.answer) for each in asked]
        return Picture(pixels, scenes.token_words(scene), [(CAPTION, caption(scene, rng)), *pairs])

    def easy_picture(self, rng: Generator, most: int) -> Picture:
        """A picture of easy-VQA and at most `most` of its "what" questions."""
        found = easy_questions(self.parts, "train")
        number = list(found)[rng.integers(len(found))]
        asked = [found[number][place] for place in rng.permutation(len(found[number]))[:most]]
        return Picture(easy_picture(self.parts, "train", number), None, [(each.text, each.answer) for each in asked])

    def pack(self, pictures: Sequence[Picture]) -> Packed:
        """Tokens after the picture: each question with its answer is a segment that starts at the same position."""
        rows, asks = [], []
        for row, picture in enumerate(pictures):
            tokens: list[tuple[int, int, int]] = []
            for segment, (question, answer) in enumerate(picture.asked, start=1):
                prompt, reply = self.ids(question) + self.after, self.ids(answer) + self.end
                for place, token in enumerate(reply):
                    weight = 0.3 if place == len(reply) - 1 else 0.6 if question == CAPTION else 1.0
                    asks.append((row, len(tokens) + len(prompt) + place - 1, token, weight))
                whole = [*prompt, *reply[:-1]]
                tokens += [(token, segment, place) for place, token in enumerate(whole)]
            rows.append(tokens)
        longest = max(map(len, rows))
        padded = torch.tensor([row + [(0, -1, 0)] * (longest - len(row)) for row in rows])
        row, column, target, weight = (torch.tensor(each) for each in zip(*asks, strict=True))
        ids, segment, offset = padded.unbind(2)
        return Packed(ids, segment, offset, row, column, target, weight)

    def loss(self, pictures: Sequence[Picture], keep: int, rng: Generator) -> tuple[Tensor, float]:
        """(cross-entropy of the answers, share of right answer tokens) from `keep` visual tokens of each picture."""
        tokens = self.projector(self.features([picture.pixels for picture in pictures]))
        kept = torch.stack([choose_tokens(picture, keep, rng) for picture in pictures])
        visual = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        packed, count = self.pack(pictures), len(pictures)
        before = torch.tensor(self.before)
        inputs = torch.cat([self.embedding[before].expand(count, -1, -1), visual, self.embedding[packed.ids]], dim=1)
        start = len(before)
        places = torch.arange(start).expand(count, -1)
        positions = torch.cat([places, start + kept, start + VISUAL_TOKENS + packed.offset], dim=1)
        hidden = self.model.model.language_model(
            inputs_embeds=inputs,
            position_ids=positions,
            attention_mask=attention_mask(packed.segment, start + keep),
            use_cache=False,
        ).last_hidden_state
        logits = F.linear(hidden[packed.row, start + keep + packed.column], self.embedding)
        losses = F.cross_entropy(logits, packed.target, reduction="none")
        right = (logits.argmax(-1) == packed.target).float()[packed.weight == 1].mean().item()
        return (losses * packed.weight).sum() / packed.weight.sum(), right


def choose_tokens(picture: Picture, keep: int, rng: Generator) -> Tensor:
    """Indices i64[keep] in raster order: those of objects where they are known, and random others."""
    score = rng.random(VISUAL_TOKENS)
    if picture.words is not None:
        score += np.array([word is not None for word in picture.words])
    return torch.from_numpy(np.sort(np.argsort(-score)[:keep]))


def attention_mask(segment: Tensor, prefix: int) -> Tensor:
    """bool[B, 1, L, L], L = prefix + T: causal; a question sees the prefix and itself."""
    whole = F.pad(segment, (prefix, 0))
    causal = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
    visible = (whole[:, None, :] == 0) | (whole[:, None, :] == whole[:, :, None])
    return (visible & causal)[:, None]


def train_projector(trainer: Trainer) -> None:
    """Stage 1; the standardisation of features is part of the first linear afterwards."""
    rng = np.random.default_rng([TRAIN_SEED, 1])
    pictures = [trainer.scene_picture(rng, 0, (4, 20)) for _ in range(STAGE_1_PICTURES)]
    batches = [pictures[first : first + 16] for first in range(0, len(pictures), 16)]
    features = torch.cat([trainer.features([each.pixels for each in batch]) for batch in batches]).flatten(0, 1)
    meanings = {words: trainer.meaning(words) for each in pictures for words in each.words or () if words}
    background = trainer.embedding.mean(0)
    objects = [meanings[words] if words else background for each in pictures for words in each.words or ()]
    targets, is_object = torch.stack(objects), torch.tensor([bool(w) for p in pictures for w in p.words or ()])
    mean, deviation = features.mean(0), features.std(0)
    first = trainer.projector.linear_1
    features, scale = (features - mean) / deviation, targets[is_object].std()
    parameters = list(trainer.projector.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    weight = torch.where(is_object, 1.0, 0.3)
    for step in range(STAGE_1_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / STAGE_1_STEPS)
        rows = torch.from_numpy(rng.integers(0, len(features), 512))
        error = ((trainer.projector(features[rows]) - targets[rows]) / scale).square().mean(1)
        loss = (error * weight[rows]).sum() / weight[rows].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"projector {step + 1}/{STAGE_1_STEPS}  error {loss.item():.3f}", flush=True)
    with torch.no_grad():
        first.weight /= deviation
        first.bias.sub_(first.weight @ mean)


def adapt(model: LlavaForConditionalGeneration) -> dict[str, Adapted]:
    """Replaces the decoder's linears; name -> replacement."""
    decoder = model.model.language_model
    adapted = {}
    for name, module in list(decoder.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in RANKS and isinstance(module, nn.Linear):
            adapted[name] = Adapted(module, RANKS[last])
            setattr(decoder.get_submodule(parent), last, adapted[name])
    return adapted


@torch.no_grad()
def restore(trainer: Trainer, adapted: dict[str, Adapted], saved: dict[str, Tensor]) -> None:
    """Sets projector and factors to those of a file."""
    for name, each in trainer.projector.state_dict().items():
        each.copy_(saved[f"projector.{name}"])
    for name, module in adapted.items():
        module.a.copy_(saved[f"{name}.a"])
        module.b.copy_(saved[f"{name}.b"])


def factors(trainer: Trainer, adapted: dict[str, Adapted]) -> dict[str, Tensor]:
    """What assembly.py applies, float16."""
    found = {f"projector.{name}": each for name, each in trainer.projector.state_dict().items()}
    for name, module in adapted.items():
        found |= {f"{name}.a": module.a, f"{name}.b": module.b}
    return {name: each.detach().half().contiguous() for name, each in found.items()}


def train_decoder(
    trainer: Trainer, adapted: dict[str, Adapted], out: Path, minutes: float, curriculum: Sequence[Objects]
) -> None:
    """Stage 2, by the clock: the learning rate falls as the time runs out."""
    groups = [
        {"params": list(trainer.projector.requires_grad_(True).parameters()), "peak": 5e-4},
        {"params": [each for module in adapted.values() for each in module.parameters()], "peak": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    everything = [each for group in groups for each in group["params"]]
    started, losses, rights, step, saved = time.time(), list[float](), list[float](), 0, time.time()
    while (progress := (time.time() - started) / (60 * minutes)) < 1:
        rng = np.random.default_rng([TRAIN_SEED, 2, step, 3])
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / 20) * max(0.05, min(1.0, 1.4 * (1 - progress)))
        things = next(things for until, things in curriculum if progress < until)
        if step % 8 == 7:
            pictures = [trainer.easy_picture(rng, 3) for _ in range(5)]
        else:
            pictures = [trainer.scene_picture(rng, 4, things) for _ in range(3)]
        loss, right = trainer.loss(pictures, VISUAL_TOKENS if progress > 0.8 else 4 * things[1] + 6, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        rights.append(right)
        if step % 12 == 0:
            means = f"loss {np.mean(losses):.3f}  right {np.mean(rights):.3f}"
            print(f"decoder {step}  {time.time() - started:.0f} s  {means}", flush=True)
            losses, rights = [], []
        if time.time() - saved > 240:
            save_file(factors(trainer, adapted), out)
            saved = time.time()
    save_file(factors(trainer, adapted), out)


def main() -> None:
    """Command line: trains and writes the factors."""
    parser = argparse.ArgumentParser(description="Trains projector and low-rank factors.")
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--out", type=Path, required=True, help="written every four minutes, and at the end")
    parser.add_argument("--minutes", type=float, default=45, help="of stage 2")
    parser.add_argument("--start", type=Path, help="factors to continue from, at the end of the curriculum")
    options = parser.parse_args()
    torch.manual_seed(TRAIN_SEED)
    torch.set_num_threads(1)
    model, processor = assemble(options.work)
    trainer = Trainer(model, processor, options.work / "parts")
    adapted = adapt(model)
    if options.start is None:
        train_projector(trainer)
    else:
        restore(trainer, adapted, load_file(options.start))
    curriculum = CURRICULUM if options.start is None else CURRICULUM[-1:]
    train_decoder(trainer, adapted, options.out, options.minutes, curriculum)


if __name__ == "__main__":
    main()
