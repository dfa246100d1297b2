"""Export a model for OpenVINO GenAI: cpu_openvino_export.py SHAPE FOLDER, in the environment of OpenVINO.

`optimum-cli export openvino --weight-format int4`, with the command's defaults otherwise. Random weights have no
tokenizer, so one is created in which each byte is a token.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from cpu_models import ROOT, build
from cpu_shapes import BEGIN, END, PAD, SHAPES, VIDEO, VISION_END, VISION_START, Shape
from openvino import Core
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, Qwen2VLImageProcessor

SPECIAL = 16
CHOSEN = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


def main(name: str, target: str) -> None:
    """Write the int4 folder and a note of the plug-in's settings."""
    torch.set_num_threads(1)
    shape, folder = SHAPES[name], Path(target)
    unfinished = Path(f"{target}.unfinished")
    source = unfinished / "source"
    model = build(shape)
    text = model.config.get_text_config()
    model.save_pretrained(source)
    if shape.folder:
        for pattern in ("*token*", "*processor*"):
            for path in (ROOT / shape.folder).glob(pattern):
                shutil.copy(path, source)
    else:
        write_tokenizer(shape, source)
        write_processor(shape, source)
    tool = Path(sys.executable).with_name("optimum-cli")
    command = [
        tool,
        "export",
        "openvino",
        "--model",
        source,
        "--task",
        "image-text-to-text",
        "--library",
        "transformers",
    ]
    # Groups (128 inputs by default) must divide every width.
    group = math.gcd(128, text.hidden_size, text.intermediate_size)
    groups = [] if group == 128 else ["--group-size", str(group)]
    if subprocess.run([*command, "--weight-format", "int4", *groups, unfinished / "int4"], check=False).returncode:
        sys.exit("optimum-cli export openvino failed; what it said stands above this line")
    shutil.rmtree(source)
    compiled = Core().compile_model(unfinished / "int4" / "openvino_language_model.xml", "CPU")
    chosen = {key: str(compiled.get_property(key)) for key in CHOSEN}
    (unfinished / "settings.json").write_text(json.dumps(chosen), "utf-8")
    unfinished.rename(folder)


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """Every byte is a token; the remaining ids of the model have names that do not occur in text."""
    names = {PAD: "<pad>", BEGIN: "<s>", END: "</s>", VIDEO: "<|video_pad|>"}
    names |= {VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>"}
    names[shape.image_token] = "<image>" if shape.family == "llava" else "<|image_pad|>"
    special = [names.get(number, f"<reserved {number}>") for number in range(SPECIAL)]
    listed = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    listed += [f"word {number}" for number in range(len(listed), shape.vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(listed)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=names[PAD],
        bos_token=names[BEGIN],
        eos_token=names[END],
        chat_template="{{ messages[0]['content'] }}",
    ).save_pretrained(folder)


def write_processor(shape: Shape, folder: Path) -> None:
    """The image processor."""
    if shape.family == "llava":
        crop = {"height": shape.side, "width": shape.side}
        CLIPImageProcessor(size={"shortest_edge": shape.side}, crop_size=crop).save_pretrained(folder)
        fields = {
            "processor_class": "LlavaProcessor",
            "patch_size": shape.patch,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
        }
        (folder / "processor_config.json").write_text(json.dumps(fields), "utf-8")
    else:
        most = shape.side**2
        Qwen2VLImageProcessor(patch_size=shape.patch, min_pixels=56**2, max_pixels=most).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
