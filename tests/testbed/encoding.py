"""Pictures to visual tokens in training: the models' own towers, without computations whose results are unused."""

from types import MethodType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)


def encode_pictures(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """u8[B, H, W, 3] -> f32[B, N, C], the projector's output in raster order."""
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    if isinstance(model, LlavaForConditionalGeneration):
        tower = model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(scaled))
        layers = tower.encoder.layers
        read = len(layers) + 1 + cast(int, model.config.vision_feature_layer)
        for layer in layers[:read]:
            hidden = layer(hidden, attention_mask=None)
        return model.model.multi_modal_projector(hidden[:, 1:])
    B, _, H, W = scaled.shape
    patches = scaled.reshape(B, 3, H // 8, 2, 4, W // 8, 2, 4).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = patches[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # two equal frames
    grid = torch.tensor([[1, H // 4, W // 4]]).repeat(B, 1)
    return model.model.visual(patches.reshape(-1, 96), grid_thw=grid).pooler_output.reshape(B, H * W // 64, -1)


def use_grouped_windows(model: PreTrainedModel) -> None:
    """Make windowed attention run all windows of one size in one call instead of one after the other."""
    for module in model.modules():
        if isinstance(module, Qwen2_5_VLVisionAttention):
            module.forward = MethodType(_grouped_forward, module)


def _grouped_forward(
    self: Qwen2_5_VLVisionAttention,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: object,
) -> Tensor:
    """Same result as the class's own forward."""
    total = len(hidden_states)
    q, k, v = self.qkv(hidden_states).view(total, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    lengths = cu_seqlens.diff()
    outputs, places = [], []
    for length in lengths.unique().tolist():
        rows = cu_seqlens[:-1][lengths == length, None] + torch.arange(length)
        query, key, value = (t[rows].transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(query, key, value)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        places.append(rows.flatten())
    joined = torch.cat(outputs)[torch.cat(places).argsort()]
    return self.proj(joined.flatten(1))
