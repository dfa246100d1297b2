"""Write a checkpoint of Qwen2.5-VL-7B's shapes with random weights, a shard at a time: memory stays below two shards.

    python tests/bench/disk_checkpoint.py build/disk --layers 20        20 of 28 decoder layers: 12 GiB

The folder has the testbed's tokenizer and processor, with patches of 14 pixels, so that `qpcompile compile FOLDER`
reads it as any other. Only time and memory of such a compile are meaningful.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

TESTBED = Path(__file__).resolve().parents[1] / "testbed" / "qwen2_5_vl"
SHARD = 10**9
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
}
TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# A picture has 16 visual tokens.
PIXELS = 112 * 112


def main() -> None:
    """Write the folder."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28, help="of the decoder")
    parser.add_argument("--scale", type=int, default=1, help="divide widths and vocabulary by 2 or 4, for a trial")
    options = parser.parse_args()
    write(options.folder, options.layers, options.scale)
    size = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    print(f"{options.folder}: {size / 2**30:.2f} GiB of weights")


def write(folder: Path, layers: int, scale: int = 1) -> None:
    """Write the whole checkpoint into a new folder."""
    folder.mkdir(parents=True)
    for path in TESTBED.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    config = _config(json.loads((TESTBED / "config.json").read_text()), layers, scale)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"] |= {"patch_size": 14, "size": {"longest_edge": 4 * PIXELS, "shortest_edge": PIXELS}}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if shard and sum(each.nbytes for each in shard.values()) + 2 * tensor.numel() > SHARD:
            _save(shard, folder, where)
            shard = {}
        shard[name] = _values(name, tuple(tensor.shape), generator)
    _save(shard, folder, where)
    index: dict[str, Any] = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _config(config: dict[str, Any], layers: int, scale: int) -> dict[str, Any]:
    divided = ("num_attention_heads", "num_key_value_heads", "num_heads", "vocab_size")
    divided += ("hidden_size", "intermediate_size", "out_hidden_size")
    text, tower = (
        {key: value // scale if key in divided else value for key, value in sizes.items()} for sizes in (TEXT, TOWER)
    )
    config["text_config"] |= text | {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    config["vision_config"] |= tower
    return config | {"tie_word_embeddings": False, "dtype": "bfloat16"}


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for norms, zeros for biases, small normal values for everything else."""
    made = torch.empty(shape, dtype=torch.bfloat16)
    if name.endswith("bias"):
        return made.zero_()
    return made.fill_(1.0) if "norm" in name else made.normal_(std=0.02, generator=generator)


def _save(shard: dict[str, torch.Tensor], folder: Path, where: dict[str, str]) -> None:
    name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    where.update(dict.fromkeys(shard, name))


if __name__ == "__main__":
    main()
