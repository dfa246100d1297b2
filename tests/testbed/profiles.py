"""Habits of the testbed's models, measured: where they read the picture, what large norms mark, which tokens are sinks.

    python tests/testbed/profiles.py --count 200 --seed 7 --out docs/results/profiles.md  # all models
    python tests/testbed/profiles.py tests/testbed/llava --count 50  # prints one profile

Every prompt runs alone and in full precision. A cut after layer l removes all visual tokens from the sequence there;
text keeps its positions. The answers are one word, so a prediction of the answer and then of its end is right.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from recording import Seen, decoder_layers, first_output, recorded
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from qpcompile.capture.chat import about_picture, chat_inputs

HERE = Path(__file__).parent
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """Means over questions; lists have one entry per decoder layer L, or tower layer T that is read."""

    accuracy: float  # first token of the answer, no cut
    cut: Floats  # [1 + L]: accuracy when all visual tokens are removed before the decoder, then after each layer
    picture_attention: Floats  # [L]: share of the last token's attention that is on visual tokens
    first_attention: Floats  # [L]: share of attention of tokens after the picture that is on token 0
    residual: Floats  # [L]: largest norm after a layer over the median norm
    object_auc: Floats  # [1 + L]: P(norm of an object's token > norm of a background token), before and after layers
    tower_residual: Floats  # [T]: as `residual`, over patches
    tower_attention: Floats  # [T]: share of the patches' attention that is on the patch of the largest norm
    sink_on_object: float  # share of pictures where the tower's patch of the largest norm lies on an object


def _without(seen: Seen, layer: int, kept: Tensor, model: Any) -> Tensor:
    """Logits of the last token f32[V] when only tokens `kept` i64[K] go into decoder layers `layer` and later."""
    hidden = seen.inputs[layer][0][:, kept] if layer < len(seen.inputs) else seen.outputs[-1][:, kept]
    for block, (_, kwargs) in zip(decoder_layers(model)[layer:], seen.inputs[layer:], strict=True):
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mask = mask[..., kept, :][..., kept]
        cos, sin = kwargs["position_embeddings"]
        changed = {
            "attention_mask": mask,
            "position_embeddings": (cos[..., kept, :], sin[..., kept, :]),
            "position_ids": None,
            "past_key_values": None,
        }
        hidden = first_output(block(hidden, **{**kwargs, **changed}))
    return model.lm_head(model.model.language_model.norm(hidden[0, -1]))


def auc(norms: Tensor, is_object: Tensor) -> float:
    """P(a norm where `is_object` > a norm elsewhere); both are [N]."""
    inside, outside = norms[is_object], norms[~is_object]
    return (inside[:, None] > outside[None]).float().mean().item()


def _spread(hidden: Tensor) -> float:
    norms = hidden.flatten(0, -2).norm(dim=-1)
    return (norms.max() / norms.median()).item()


def _tower_sink(seen: Seen, is_object: Tensor) -> tuple[list[float], list[float], float]:
    """Residuals and attention of the tower's largest patch; CLS, where there is one, does not count."""
    patches = [hidden.flatten(0, -2)[-len(is_object) :] for hidden in seen.tower if seen.tower_attention]
    if not patches:
        return [_spread(hidden) for hidden in seen.tower], [float("nan")] * len(seen.tower), float("nan")
    sink = int(patches[-1].norm(dim=-1).argmax())
    begin = seen.tower[0].shape[-2] - len(is_object)
    attention = [weights[0, :, begin:, begin + sink].mean().item() for weights in seen.tower_attention]
    return [_spread(hidden) for hidden in patches], attention, float(is_object[sink])


@torch.no_grad()
def measure(model: Any, processor: Any, family: str, seed: int, count: int) -> Profile:
    """The profile of a model with `attn_implementation="eager"` on the first `count` samples of (family, seed)."""
    rows: list[dict[str, Any]] = []
    image = model.config.image_token_index if family == "llava" else model.config.image_token_id
    for index, (pixels, question) in enumerate(scenes.samples(family, seed, count)):
        is_object = torch.from_numpy(scenes.sample_objects(family, seed, index))
        asked = [about_picture(Image.fromarray(pixels), question.text)]
        inputs = chat_inputs(processor, asked, [question.text])
        with recorded(model) as seen:
            logits = model(**inputs, use_cache=False).logits[0, -1]
        visual = inputs["input_ids"][0] == image
        text = (~visual).nonzero().flatten()
        right = processor.tokenizer.convert_tokens_to_ids(question.answer)
        cuts = [int(_without(seen, layer, text, model).argmax()) for layer in range(len(seen.outputs) + 1)]
        states = [seen.inputs[0][0], *seen.outputs]
        after = int(visual.nonzero().max()) + 1
        tower_residual, tower_attention, on_object = _tower_sink(seen, is_object)
        rows.append(
            {
                "accuracy": int(logits.argmax()) == right,
                "cut": [answer == right for answer in cuts],
                "picture_attention": [weights[0, :, -1, visual].sum(-1).mean().item() for weights in seen.attention],
                "first_attention": [weights[0, :, after:, 0].mean().item() for weights in seen.attention],
                "residual": [_spread(hidden) for hidden in seen.outputs],
                "object_auc": [auc(hidden[0, visual].norm(dim=-1), is_object) for hidden in states],
                "tower_residual": tower_residual,
                "tower_attention": tower_attention,
                "sink_on_object": on_object,
            }
        )
    means = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    return Profile(**means)


def load(folder: Path) -> tuple[Any, Any]:
    """Model, with attention that returns its weights, and processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    return model, AutoProcessor.from_pretrained(folder)


PAGE = """# What the testbed's models do

Habits of the models in `tests/testbed`, measured in full precision on {count} unseen questions (seed {seed}).
Without the picture about 15 % are right. Written by

```sh
python tests/testbed/profiles.py --count {count} --seed {seed} --out docs/results/profiles.md
```

with torch {torch}, transformers {transformers}, on one core of {processor}.

## Where the picture is read

Accuracy in % (first token of the answer) when all visual tokens are removed before the decoder, or after a layer; text
keeps its positions. `full` removes none. Cutting costs nothing from the layer on where a row reaches `full`.

{cuts}

Share in % of the last prompt token's attention that is on visual tokens, by layer:

{reads}

## What large norms mark

The probability that a visual token on an object has a larger norm than one on background (AUC; mean over pictures), at
the decoder's input and after its layers. Near 1, large norms mark objects; near 0, background.

{norms}

## Sinks

Largest norm over the median norm, of all tokens after a decoder layer:

{residuals}

Share in % of the attention of tokens after the picture that is on token 0, by decoder layer:

{firsts}

The same in the tower, by layer that is read: largest norm over the median of patches, then the share in % of the
patches' attention that is on the one patch with the largest norm in the last layer (1 of 144 is 0.7 %), then the share
of pictures where this patch lies on an object. Qwen's tower attends in windows: not measured.

{towers}
"""


def _table(head: list[str], rows: Mapping[str, Sequence[str]]) -> str:
    width = max(len(head), *(len(row) for row in rows.values()))
    head = [*head, *(str(number) for number in range(width - len(head)))]
    lines = [["model", *head], ["---"] * (width + 1)]
    lines += [[f"`{name}`", *row, *[""] * (width - len(row))] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(values: Floats) -> list[str]:
    return ["-" if np.isnan(value) else f"{100 * value:.1f}" for value in values]


def _plain(values: Floats) -> list[str]:
    return [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in values]


def page(profiles: Mapping[str, Profile], count: int, seed: int) -> str:
    """The page of tables."""

    def table(head: list[str], cells: Callable[[Profile], list[str]]) -> str:
        return _table(head, {name: cells(profile) for name, profile in profiles.items()})

    return PAGE.format(
        count=count,
        seed=seed,
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        processor=processor_name(),
        cuts=table(["full", "before"], lambda p: [*_percent(np.array([p.accuracy])), *_percent(p.cut)]),
        reads=table([], lambda p: _percent(p.picture_attention)),
        norms=table(["before"], lambda p: _plain(p.object_auc)),
        residuals=table([], lambda p: _plain(p.residual)),
        firsts=table([], lambda p: _percent(p.first_attention)),
        towers=_table(
            ["largest over median", "attention on the largest", "largest on an object"],
            {
                name: [
                    ", ".join(_plain(p.tower_residual)),
                    ", ".join(_percent(p.tower_attention)),
                    *_percent(np.array([p.sink_on_object])),
                ]
                for name, p in profiles.items()
            },
        ),
    )


def processor_name() -> str:
    """The processor as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def beds() -> list[Path]:
    """The model folders of the testbed, the shipped two first."""
    folders = sorted(path.parent for path in HERE.glob("*/config.json"))
    return sorted(folders, key=lambda folder: (folder.name not in ("llava", "qwen2_5_vl"), folder.name))


def main() -> None:
    """Command line: prints profiles, and writes the page of tables."""
    parser = argparse.ArgumentParser(description="Measures the habits of small models.")
    parser.add_argument("folders", type=Path, nargs="*", help="default: every model of the testbed")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a page with the profiles of all models named")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    np.set_printoptions(precision=3, suppress=True, linewidth=150)
    profiles: dict[str, Profile] = {}
    for folder in options.folders or beds():
        model, processor = load(folder)
        profile = measure(model, processor, model.config.model_type, options.seed, options.count)
        profiles[folder.name] = profile
        print(folder.name, *(f"  {name:17s} {value}" for name, value in vars(profile).items()), sep="\n", flush=True)
    if options.out is not None:
        options.out.write_text(page(profiles, options.count, options.seed), encoding="utf-8")


if __name__ == "__main__":
    main()
