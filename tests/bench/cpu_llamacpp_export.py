"""Write a model for llama.cpp: cpu_llamacpp_export.py SHAPE FOLDER, in the environment of its converters.

llama.cpp's own converters write the decoder in 16 bits, and its quantizer then Q4_0 and Q4_K_M; tower and projector are
Q8_0. The quantizer in C refuses towers, so that of its Python package is used. Random weights have no tokenizer, so one
is created in which each byte is a token.
"""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cpu_llamacpp import quantize
from cpu_models import build
from cpu_peers import BUILD, LLAMACPP
from cpu_shapes import BEGIN, END, SHAPES, VISION_END, VISION_START, Shape
from cpu_worker import STEP
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaForCausalLM, Qwen2VLImageProcessor

SOURCES = BUILD / LLAMACPP / "sources"
TYPES = ("Q4_0", "Q4_K_M")
SPECIAL = 16


def main(name: str, target: str) -> None:
    """Write a GGUF file of the decoder per type, and projector.gguf."""
    torch.set_num_threads(1)
    shape, folder = SHAPES[name], Path(target)
    unfinished = Path(f"{target}.unfinished")
    source = unfinished / "source"
    source.mkdir(parents=True)
    projector = unfinished / "projector.gguf"
    decoder = (llava if shape.family == "llava" else qwen2_vl)(shape, source, projector)
    for kind in TYPES:
        quantize(decoder, unfinished / f"{kind}.gguf", kind)
    read = {kind: step_mb(unfinished / f"{kind}.gguf") for kind in TYPES}
    (unfinished / STEP).write_text(json.dumps(read), "utf-8")
    shutil.rmtree(source)
    unfinished.rename(folder)


def llava(shape: Shape, source: Path, projector: Path) -> Path:
    """The decoder's GGUF file, and the projector's; the converter of CLIP towers wants the three parts apart."""
    model = build(shape).model, build(shape).lm_head
    decoder = LlamaForCausalLM(model[0].language_model.config)
    decoder.model.load_state_dict(model[0].language_model.state_dict())
    decoder.lm_head.load_state_dict(model[1].state_dict())
    decoder.save_pretrained(source / "decoder")
    write_tokenizer(shape, source / "decoder")
    tower = source / "tower"
    model[0].vision_tower.save_pretrained(tower)
    layer = {"vision_feature_layer": model[0].config.vision_feature_layer}
    add_settings(tower / "config.json", layer)
    weights = model[0].multi_modal_projector.state_dict()
    torch.save({f"multi_modal_projector.{key}": value for key, value in weights.items()}, source / "projector.pt")
    script = "tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py"
    convert(script, "-m", tower, "--clip-model-is-vision", "--llava-projector", source / "projector.pt")
    as_q8_0(tower / "mmproj-model-f16.gguf", projector)
    return as_gguf(source / "decoder", source / "decoder.gguf", "f16")


def qwen2_vl(shape: Shape, source: Path, projector: Path) -> Path:
    """The decoder's GGUF file, and the projector's, from one folder."""
    model = build(shape)
    model.save_pretrained(source)
    # As published checkpoints say it; transformers 4.57 says it of the decoder.
    add_settings(source / "config.json", {"architectures": [type(model).__name__]})
    write_tokenizer(shape, source)
    most = shape.side**2
    Qwen2VLImageProcessor(patch_size=shape.patch, min_pixels=56**2, max_pixels=most).save_pretrained(source)
    as_gguf(source, projector, "q8_0", "--mmproj")
    return as_gguf(source, source / "decoder.gguf", "f16")


def as_gguf(source: Path, file: Path, kind: str, *options: str) -> Path:
    """One file by llama.cpp's converter."""
    convert("convert_hf_to_gguf.py", source, "--outfile", file, "--outtype", kind, *options)
    return file


def as_q8_0(source: Path, target: Path) -> None:
    """A tower's file with the weights of linears in Q8_0, everything else as it is."""
    gguf = package()
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, arch="clip")
    for field in reader.fields.values():
        if field.types and field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1])
    f16, q8_0 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
    for each in reader.tensors:
        kind, data = each.tensor_type, each.data
        if kind == f16 and data.ndim == 2 and data.shape[1] % 32 == 0 and "embd" not in each.name:
            kind, data = q8_0, gguf.quants.quantize(data.astype("float32"), q8_0)
        writer.add_tensor(each.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def package() -> Any:
    """llama.cpp's Python package, from its sources."""
    sys.path.append(str(SOURCES / "gguf-py"))
    return importlib.import_module("gguf")


def convert(script: str, *arguments: str | Path) -> None:
    """Run a script of llama.cpp; what it says goes to the log."""
    command: Sequence[str | Path] = [sys.executable, SOURCES / script, *arguments]
    if subprocess.run(command, env={"PYTHONPATH": str(SOURCES / "gguf-py")}, check=False).returncode:
        sys.exit(f"{script} failed; what it said stands above this line")


def step_mb(file: Path) -> float:
    """The weights that a decode step reads, in MB (10^6 bytes): all but the embedding, of which it reads a row."""
    tensors = package().GGUFReader(file).tensors
    return sum(int(each.n_bytes) for each in tensors if each.name != "token_embd.weight") / 1e6


def add_settings(path: Path, settings: dict[str, Any]) -> None:
    """Add keys to a JSON file."""
    found = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**found, **settings}), "utf-8")


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """A SentencePiece model without pieces that merge: every byte of a text is a token."""
    pieces = sentencepiece_model_pb2.ModelProto()
    kinds = pieces.SentencePiece
    names = {0: "<unk>", BEGIN: "<s>", END: "</s>", VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>"}
    for number in range(SPECIAL):
        kind = kinds.CONTROL if number else kinds.UNKNOWN
        pieces.pieces.add(piece=names.get(number, f"<reserved {number}>"), score=0, type=kind)
    for byte in range(256):
        pieces.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=kinds.BYTE)
    for number in range(len(pieces.pieces), shape.vocabulary):
        pieces.pieces.add(piece=f"word {number}", score=-number, type=kinds.NORMAL)
    pieces.trainer_spec.model_type = pieces.trainer_spec.BPE
    pieces.trainer_spec.byte_fallback = True
    pieces.trainer_spec.vocab_size = len(pieces.pieces)
    (folder / "tokenizer.model").write_bytes(pieces.SerializeToString())


if __name__ == "__main__":
    main(*sys.argv[1:])
