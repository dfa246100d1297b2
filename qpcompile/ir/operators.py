"""All custom operators of the project, by their names in graphs. Importing this module registers them."""

from __future__ import annotations

import torch

from qpcompile.kernels.attention.rule import TORCH_RULE as ATTENTION_RULE
from qpcompile.kernels.linear.rule import RULE as LINEAR_RULE
from qpcompile.kernels.rules import Rule
from qpcompile.kernels.spec import Spec, read_specs

SPECS: tuple[Spec, ...] = read_specs()
"""The record of each operator of the project, sorted by name."""

# Operators referred to by passes.
ours = torch.ops.qpcompile
ACTIVATION = ours.activation.default
ACTIVATION_QUANTIZE = ours.activation_quantize.default
ATTENTION_KV = ours.attention_kv.default
ATTENTION_RECEIVED = ours.attention_received.default
ATTENTION_STEP = ours.attention_step.default
CHANNEL_DELTA = ours.channel_delta.default
DPP_SELECT = ours.dpp_select.default
EXPERT_LINEAR = ours.expert_linear.default
EXPERT_LINEAR_A16 = ours.expert_linear_a16.default
EXPERT_LINEAR_INT = ours.expert_linear_int.default
FARTHEST_TOKENS = ours.farthest_tokens.default
FUSE_RISK = ours.fuse_risk.default
GATED_DELTA = ours.gated_delta.default
HADAMARD = ours.hadamard.default
KRONECKER = ours.kronecker.default
KV_READ = ours.kv_read.default
KV_WRITE = ours.kv_write.default
LAYERNORM_QUANTIZE = ours.layernorm_quantize.default
LINEAR_W4A16 = ours.linear_w4a16.default
LINEAR_INT = ours.linear_int.default
LINEAR_W8A16 = ours.linear_w8a16.default
MERGE_TOKENS = ours.merge_tokens.default
PIVOT_TOKENS = ours.pivot_tokens.default
QUANTIZATION_RISK = ours.quantization_risk.default
QUANTIZE_DYNAMIC = ours.quantize_dynamic.default
QUANTIZE_STATIC = ours.quantize_static.default
QUANT_STUB = ours.quant_stub.default
RMSNORM = ours.rmsnorm.default
RMSNORM_QUANTIZE = ours.rmsnorm_quantize.default
ROPE = ours.rope.default
ROPE_KV_APPEND = ours.rope_kv_append.default
ROPE_KV_WRITE = ours.rope_kv_write.default
SEGMENT_ATTENTION = ours.segment_attention.default
SELECT_TOKENS = ours.select_tokens.default
SPREAD_TOKENS = ours.spread_tokens.default
TEXT_RELEVANCE = ours.text_relevance.default
SIMULATE_KIVI = ours.simulate_kivi.default
SIMULATE_QVLM = ours.simulate_qvlm.default
TOKEN_SCORES = ours.token_scores.default
TRANSFORM_QUANTIZE = ours.transform_quantize.default

QUANTIZERS = (
    *(QUANTIZE_DYNAMIC, QUANTIZE_STATIC, TRANSFORM_QUANTIZE),
    *(RMSNORM_QUANTIZE, LAYERNORM_QUANTIZE, ACTIVATION_QUANTIZE, ATTENTION_STEP),
)
"""Operators that give codes and scales of activations."""

# Ours, and those of torch's that would repeat an operand where it is too short, or divide by no heads.
RULES: dict[object, Rule] = {
    **{spec.overload: spec.rule for spec in SPECS},
    torch.ops.aten.linear.default: LINEAR_RULE,
    torch.ops.aten.scaled_dot_product_attention.default: ATTENTION_RULE,
}
