"""Plants outlier channels in a model without changing its function.

    python tests/testbed/plant_outliers.py tests/testbed/llava tests/testbed/llava-outliers

Small models lack the outlier channels that make 4-bit activations hard in large ones. Here a few channels of each place
where one linear operation follows another (or a norm's gain) are scaled up, and the weights that read them down:

    norm gain -> q, k, v     norm gain -> gate, up (or fc1)     up -> down     v -> o     merger's norm -> merger

Factors are powers of two, so that float16 weights stay exact except subnormal ones. The residual channels are the same
in every layer of a tower or decoder, as in large models; those inside the MLP and the heads are drawn per layer.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from architectures import save_folder
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel


@dataclass(frozen=True)
class Dose:
    """How many channels are scaled, and by how much, in one kind of place."""

    channels: int
    factor: float


@torch.no_grad()
def move_scale(writers: list[Tensor], readers: list[Tensor], written: Tensor, read: Tensor, factor: float) -> None:
    """Multiplies rows `written` of the weights that write the channels, and divides columns `read` of their readers."""
    for tensor in writers:
        tensor[written] *= factor
    for tensor in readers:
        tensor[:, read] /= factor


def _outputs(*modules: nn.Module) -> list[Tensor]:
    """Weights and biases, whose first dimension is the output channel."""
    tensors = (getattr(module, name, None) for module in modules for name in ("weight", "bias"))
    return [tensor for tensor in tensors if tensor is not None]


def _draw(width: int, dose: Dose, generator: torch.Generator) -> Tensor:
    return torch.randperm(width, generator=generator)[: dose.channels]


def plant_decoder(model: PreTrainedModel, norm: Dose, inner: Dose, generator: torch.Generator) -> None:
    """All decoder layers (without the last norm, whose reader is tied to the word embeddings)."""
    decoder = model.model.language_model
    width, head_dim = decoder.config.hidden_size, decoder.config.hidden_size // decoder.config.num_attention_heads
    repeats = decoder.config.num_attention_heads // decoder.config.num_key_value_heads
    residual = _draw(width, norm, generator)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        move_scale(_outputs(layer.input_layernorm), qkv, residual, residual, norm.factor)
        gate_up = [mlp.gate_proj.weight, mlp.up_proj.weight]
        move_scale(_outputs(layer.post_attention_layernorm), gate_up, residual, residual, norm.factor)
        rows = _draw(mlp.up_proj.out_features, inner, generator)
        move_scale(_outputs(mlp.up_proj), [mlp.down_proj.weight], rows, rows, inner.factor)
        rows = _draw(attention.v_proj.out_features, inner, generator)
        heads = (rows // head_dim)[:, None] * repeats + torch.arange(repeats)  # query heads that share this KV head
        columns = (heads * head_dim + (rows % head_dim)[:, None]).flatten()
        move_scale(_outputs(attention.v_proj), [attention.o_proj.weight], rows, columns, inner.factor)


def plant_clip(model: PreTrainedModel, norm: Dose, inner: Dose, generator: torch.Generator) -> None:
    """All layers of the CLIP tower (without fc1 -> fc2, which has a non-linearity in between)."""
    tower = model.model.vision_tower
    residual = _draw(tower.config.hidden_size, norm, generator)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        move_scale(_outputs(layer.layer_norm1), qkv, residual, residual, norm.factor)
        move_scale(_outputs(layer.layer_norm2), [layer.mlp.fc1.weight], residual, residual, norm.factor)
        rows = _draw(tower.config.hidden_size, inner, generator)
        move_scale(_outputs(attention.v_proj), [attention.out_proj.weight], rows, rows, inner.factor)


def plant_qwen_tower(model: PreTrainedModel, norm: Dose, inner: Dose, generator: torch.Generator) -> None:
    """All layers of the Qwen2.5-VL tower, and its merger, which reads four patches side by side."""
    tower = model.model.visual
    width = tower.config.hidden_size
    residual = _draw(width, norm, generator)
    for block in tower.blocks:
        move_scale(_outputs(block.norm1), [block.attn.qkv.weight], residual, residual, norm.factor)
        gate_up = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight]
        move_scale(_outputs(block.norm2), gate_up, residual, residual, norm.factor)
        rows = _draw(tower.config.intermediate_size, inner, generator)
        move_scale(_outputs(block.mlp.up_proj), [block.mlp.down_proj.weight], rows, rows, inner.factor)
        rows = _draw(width, inner, generator)
        move_scale(_outputs(block.attn.qkv), [block.attn.proj.weight], 2 * width + rows, rows, inner.factor)
    merged = (torch.arange(4)[:, None] * width + residual).flatten()
    move_scale(_outputs(tower.merger.ln_q), [tower.merger.mlp[0].weight], residual, merged, norm.factor)


def plant(model: PreTrainedModel, norm: Dose, inner: Dose, seed: int) -> None:
    """Plants outliers in tower and decoder, in place."""
    generator = torch.Generator().manual_seed(seed)
    plant_decoder(model, norm, inner, generator)
    if isinstance(model, LlavaForConditionalGeneration):
        plant_clip(model, norm, inner, generator)
    else:
        plant_qwen_tower(model, norm, inner, generator)


def main() -> None:
    """Command line: reads a model folder, writes the planted one."""
    parser = argparse.ArgumentParser(description="Plants outlier channels without changing the function.")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--norm", type=float, nargs=2, default=[2, 8], metavar=("CHANNELS", "FACTOR"))
    parser.add_argument("--inner", type=float, nargs=2, default=[2, 8], metavar=("CHANNELS", "FACTOR"))
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.base)
    norm, inner = (Dose(int(channels), factor) for channels, factor in (options.norm, options.inner))
    plant(model, norm, inner, options.seed)
    save_folder(model, AutoProcessor.from_pretrained(options.base), options.out)


if __name__ == "__main__":
    main()
