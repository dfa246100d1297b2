"""The two small vision-language models: sizes, tokenizers, processors, and how a folder of theirs is written.

Both use the classes of transformers unchanged, so that real checkpoints are handled in the same way.
"""

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scenes
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaddleOCRVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

VOCAB_SIZE = 80  # words and special tokens, rounded up to a multiple of 16
HALF = [0.5, 0.5, 0.5]


@dataclass(frozen=True)
class Dialect:
    """How a family formats a conversation: the tokens around the picture and around the question."""

    special: tuple[str, ...]
    before_image: tuple[str, ...]
    image: str
    after_image: tuple[str, ...]
    after_question: tuple[str, ...]
    end: str
    pad: str
    chat_template: str


DIALECTS = {
    "llava": Dialect(
        special=("<pad>", "<unk>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"),
        before_image=("<s>", "<|user|>"),
        image="<image>",
        after_image=(),
        after_question=("<|assistant|>",),
        end="</s>",
        pad="<pad>",
        chat_template=(
            "<s>{% for message in messages %}<|{{ message['role'] }}|>"
            "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
            "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        ),
    ),
    "qwen2_5_vl": Dialect(
        special=(
            "<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>", "user", "assistant", "system",
        ),
        before_image=("<|im_start|>", "user", "<|vision_start|>"),
        image="<|image_pad|>",
        after_image=("<|vision_end|>",),
        after_question=("<|im_end|>", "<|im_start|>", "assistant"),
        end="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
            "{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    ),
}  # fmt: skip


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token per word; left padding, as batched generation requires."""
    dialect = DIALECTS[family]
    words = [*dialect.special, *scenes.vocabulary()]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,!]"), "isolated")]
    )
    core.add_special_tokens([token for token in dialect.special if token.startswith("<")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token=dialect.pad,
        eos_token=dialect.end,
        extra_special_tokens={"image_token": dialect.image},
        padding_side="left",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = dialect.chat_template
    return tokenizer


def build_processor(family: str) -> ProcessorMixin:
    """The processor, on the PIL image back-end so that torchvision is not needed."""
    tokenizer = build_tokenizer(family)
    template = DIALECTS[family].chat_template
    if family == "llava":
        images = CLIPImageProcessorPil(
            size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, image_mean=HALF, image_std=HALF
        )
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
            chat_template=template,
        )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=HALF,
        image_std=HALF,
    )
    # Qwen2_5_VLProcessor cannot be constructed without torchvision (its video processor needs it). This class of
    # transformers preprocesses pictures in the same way (image_grid_thw, mm_token_type_ids), without a video processor.
    return PaddleOCRVLProcessor(images, tokenizer, chat_template=template)


def build_model(family: str) -> PreTrainedModel:
    """The untrained model."""
    vocabulary = build_tokenizer(family).get_vocab()
    dialect = DIALECTS[family]
    ends: dict[str, Any] = {
        "bos_token_id": 2,
        "eos_token_id": vocabulary[dialect.end],
        "pad_token_id": vocabulary[dialect.pad],
    }
    if family == "llava":
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(
                    hidden_size=96, intermediate_size=320, num_hidden_layers=5, num_attention_heads=4,
                    image_size=96, patch_size=8, projection_dim=96,
                ),
                text_config=LlamaConfig(
                    vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=320, num_hidden_layers=8,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
                    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
                    initializer_range=0.05, tie_word_embeddings=True, **ends,
                ),
                image_token_index=vocabulary[dialect.image],
                image_seq_length=144,
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
                tie_word_embeddings=True,
            )
        )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                "depth": 4, "hidden_size": 72, "intermediate_size": 200, "num_heads": 3, "patch_size": 4,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32, "out_hidden_size": 144,
                "fullatt_block_indexes": [2], "initializer_range": 0.05,
            },
            text_config={
                "vocab_size": VOCAB_SIZE, "hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 8,
                "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 4, 4]},
                "initializer_range": 0.05, "tie_word_embeddings": True, **ends,
            },
            image_token_id=vocabulary["<|image_pad|>"],
            video_token_id=vocabulary["<|video_pad|>"],
            vision_start_token_id=vocabulary["<|vision_start|>"],
            vision_end_token_id=vocabulary["<|vision_end|>"],
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def save_folder(model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> None:
    """Writes a Hugging Face folder: weights in float16, and a config that has them loaded as float32."""
    aside = out.with_name(out.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    config = model.config
    half = copy.deepcopy(model).half()
    half.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        bos_token_id=config.text_config.bos_token_id,
    )
    half.save_pretrained(aside)
    processor.save_pretrained(aside)
    path = aside / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"float16"', '"float32"'), encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for file in aside.iterdir():  # file by file, so that a reader of the old folder never finds it missing
        os.replace(file, out / file.name)
    aside.rmdir()
