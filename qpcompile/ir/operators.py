"""Every operator of the project, by the name it has in graphs. Importing this defines them all."""

from __future__ import annotations

import torch

from qpcompile.kernels.attention.rule import TORCH_RULE as ATTENTION_RULE
from qpcompile.kernels.attention_kv4 import op as _attention_kv4
from qpcompile.kernels.attention_received import op as _attention_received
from qpcompile.kernels.dpp_select import op as _dpp_select
from qpcompile.kernels.farthest_tokens import op as _farthest_tokens
from qpcompile.kernels.fuse_risk import op as _fuse_risk
from qpcompile.kernels.hadamard import op as _hadamard
from qpcompile.kernels.kronecker import op as _kronecker
from qpcompile.kernels.kv4_read import op as _kv4_read
from qpcompile.kernels.kv4_write import op as _kv4_write
from qpcompile.kernels.kv8_read import op as _kv8_read
from qpcompile.kernels.kv8_write import op as _kv8_write
from qpcompile.kernels.layernorm_quantize import op as _layernorm_quantize
from qpcompile.kernels.linear.rule import RULE as LINEAR_RULE
from qpcompile.kernels.linear_w4a4 import op as _linear_w4a4
from qpcompile.kernels.linear_w4a16 import op as _linear_w4a16
from qpcompile.kernels.linear_w8a16 import op as _linear_w8a16
from qpcompile.kernels.merge_tokens import op as _merge_tokens
from qpcompile.kernels.pivot_tokens import op as _pivot_tokens
from qpcompile.kernels.quant_stub import op as _quant_stub
from qpcompile.kernels.quantization_risk import op as _quantization_risk
from qpcompile.kernels.quantize_int4 import op as _quantize_int4
from qpcompile.kernels.quantize_int4_static import op as _quantize_int4_static
from qpcompile.kernels.rmsnorm import op as _rmsnorm
from qpcompile.kernels.rmsnorm_quantize import op as _rmsnorm_quantize
from qpcompile.kernels.rope import op as _rope
from qpcompile.kernels.rules import Rule
from qpcompile.kernels.segment_attention import op as _segment_attention
from qpcompile.kernels.select_tokens import op as _select_tokens
from qpcompile.kernels.silu_mul_quantize import op as _silu_mul_quantize
from qpcompile.kernels.simulate_kivi import op as _simulate_kivi
from qpcompile.kernels.simulate_qvlm import op as _simulate_qvlm
from qpcompile.kernels.spread_tokens import op as _spread_tokens
from qpcompile.kernels.text_relevance import op as _text_relevance
from qpcompile.kernels.token_scores import op as _token_scores

MODULES = (
    _attention_kv4,
    _attention_received,
    _dpp_select,
    _farthest_tokens,
    _fuse_risk,
    _hadamard,
    _kronecker,
    _kv4_read,
    _kv4_write,
    _kv8_read,
    _kv8_write,
    _layernorm_quantize,
    _linear_w4a16,
    _linear_w4a4,
    _linear_w8a16,
    _merge_tokens,
    _pivot_tokens,
    _quant_stub,
    _quantization_risk,
    _quantize_int4,
    _quantize_int4_static,
    _rmsnorm,
    _rmsnorm_quantize,
    _rope,
    _segment_attention,
    _select_tokens,
    _silu_mul_quantize,
    _spread_tokens,
    _text_relevance,
    _simulate_kivi,
    _simulate_qvlm,
    _token_scores,
)

ours = torch.ops.qpcompile
ATTENTION_KV4 = ours.attention_kv4.default
ATTENTION_RECEIVED = ours.attention_received.default
DPP_SELECT = ours.dpp_select.default
FARTHEST_TOKENS = ours.farthest_tokens.default
FUSE_RISK = ours.fuse_risk.default
HADAMARD = ours.hadamard.default
KRONECKER = ours.kronecker.default
KV4_READ = ours.kv4_read.default
KV4_WRITE = ours.kv4_write.default
KV8_READ = ours.kv8_read.default
KV8_WRITE = ours.kv8_write.default
LAYERNORM_QUANTIZE = ours.layernorm_quantize.default
LINEAR_W4A16 = ours.linear_w4a16.default
LINEAR_W4A4 = ours.linear_w4a4.default
LINEAR_W8A16 = ours.linear_w8a16.default
MERGE_TOKENS = ours.merge_tokens.default
PIVOT_TOKENS = ours.pivot_tokens.default
QUANTIZATION_RISK = ours.quantization_risk.default
QUANTIZE_INT4 = ours.quantize_int4.default
QUANTIZE_INT4_STATIC = ours.quantize_int4_static.default
QUANT_STUB = ours.quant_stub.default
RMSNORM = ours.rmsnorm.default
RMSNORM_QUANTIZE = ours.rmsnorm_quantize.default
ROPE = ours.rope.default
SEGMENT_ATTENTION = ours.segment_attention.default
SELECT_TOKENS = ours.select_tokens.default
SILU_MUL_QUANTIZE = ours.silu_mul_quantize.default
SPREAD_TOKENS = ours.spread_tokens.default
TEXT_RELEVANCE = ours.text_relevance.default
SIMULATE_KIVI = ours.simulate_kivi.default
SIMULATE_QVLM = ours.simulate_qvlm.default
TOKEN_SCORES = ours.token_scores.default

# Ours, and those of torch's that would repeat an operand where it is too short, or divide by no heads.
RULES: dict[object, Rule] = {
    **{getattr(ours, rule.name.removeprefix("qpcompile::")).default: rule for rule in (each.RULE for each in MODULES)},
    torch.ops.aten.linear.default: LINEAR_RULE,
    torch.ops.aten.scaled_dot_product_attention.default: ATTENTION_RULE,
}
