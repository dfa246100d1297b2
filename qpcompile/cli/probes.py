"""One small call of every operator, to see whether it runs on a device of this machine.

Where an operator has a path of its own for the CPU, the probe returns its result and the reference's, which must be
equal: integer kernels differ from processor to processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpcompile.ir.operators import ours
from qpcompile.kernels.linear_w4a4 import reference as linear_reference
from qpcompile.kernels.linear_w4a4.packing import pack_int4
from qpcompile.kernels.linear_w8a16.reference import quantize_rows
from qpcompile.kernels.quantize_int4 import reference as quantize_reference

Pair = tuple[Any, Any]
Probe = Callable[[torch.device], Pair | None]


def _noise(*shape: int, device: torch.device) -> Tensor:
    """Numbers that are the same on every machine: f32[shape] in -1..1."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * 1.7).reshape(shape).to(device)


def _choice(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features f32[2, 7, 12], which of them count, and how many are chosen per row."""
    counted = torch.arange(7, device=device).expand(2, 7) < 5
    return _noise(2, 7, 12, device=device), counted, torch.tensor([3, 2], device=device)


def _attention_kv4(device: torch.device) -> None:
    q, cache = _noise(1, 4, 3, 32, device=device), _noise(1, 2, 5, 32, device=device)
    codes, affine = ours.kv4_write(cache)
    ours.attention_kv4(q, codes, affine, codes, affine, None, 0.2)


def _kronecker(device: torch.device) -> None:
    ours.kronecker(_noise(3, 48, device=device), None, _noise(8, 8, device=device), _noise(6, 6, device=device))


def _attention_received(device: torch.device) -> None:
    q = _noise(1, 4, 7, 12, device=device)
    ours.attention_received(q, q, torch.tensor([0, 3, 7], device=device), 0.3, False)


def _rope(device: torch.device) -> None:
    angles = _noise(3, 12, device=device)
    ours.rope(_noise(1, 2, 3, 12, device=device), angles.cos(), angles.sin())


def _hadamard(device: torch.device) -> None:
    ours.hadamard(_noise(3, 48, device=device), None)


def _kv8_read(device: torch.device) -> None:
    codes, affine = ours.kv8_write(_noise(1, 2, 5, 32, device=device))
    ours.kv8_read(codes, affine, torch.float32)


def _kv8_write(device: torch.device) -> None:
    ours.kv8_write(_noise(1, 2, 5, 32, device=device))


def _quantize_int4_static(device: torch.device) -> None:
    ours.quantize_int4_static(_noise(3, 48, device=device), torch.ones(1, device=device))


def _simulate_kivi(device: torch.device) -> None:
    ours.simulate_kivi(_noise(1, 2, 5, 32, device=device), 15, True)


def _simulate_qvlm(device: torch.device) -> None:
    ours.simulate_qvlm(_noise(3, 48, device=device), -torch.ones(48, device=device), torch.ones(48, device=device))


def _kv4_read(device: torch.device) -> None:
    codes, affine = ours.kv4_write(_noise(1, 2, 5, 32, device=device))
    ours.kv4_read(codes, affine, 32, torch.float32)


def _kv4_write(device: torch.device) -> None:
    ours.kv4_write(_noise(1, 2, 5, 32, device=device))


def _layernorm_quantize(device: torch.device) -> None:
    x, weight = _noise(3, 48, device=device), _noise(48, device=device)
    ours.layernorm_quantize(x, weight, weight, 1e-6, None, True, 0, 1.0)


def _linear_w4a4(device: torch.device) -> Pair:
    q, scale = ours.quantize_int4(_noise(17, 256, device=device), 0, 1.0)
    codes, weight_scale = ours.quantize_int4(_noise(48, 256, device=device), 0, 1.0)
    operands = (q, scale, pack_int4(codes), weight_scale, None, torch.float32)
    return ours.linear_w4a4(*operands), linear_reference.linear_w4a4(*operands)


def _linear_w4a16(device: torch.device) -> None:
    codes, weight_scale = ours.quantize_int4(_noise(48, 256, device=device), 0, 1.0)
    ours.linear_w4a16(_noise(3, 256, device=device), pack_int4(codes), weight_scale, None)


def _linear_w8a16(device: torch.device) -> None:
    codes, weight_scale = quantize_rows(_noise(48, 256, device=device))
    ours.linear_w8a16(_noise(3, 256, device=device), codes, weight_scale, None)


def _merge_tokens(device: torch.device) -> None:
    hidden, flags = _noise(1, 6, 8, device=device), torch.arange(6, device=device)[None] < 2
    ours.merge_tokens(hidden, hidden, hidden[..., 0], flags, ~flags, 0)


def _quant_stub(device: torch.device) -> Pair:
    x = _noise(3, 8, device=device)
    return ours.quant_stub(x), x


def _quantize_int4(device: torch.device) -> Pair:
    x = _noise(17, 256, device=device)
    return ours.quantize_int4(x, 0, 1.0)[0], quantize_reference.quantize_int4(x, 0, 1.0)[0]


def _rmsnorm(device: torch.device) -> None:
    ours.rmsnorm(_noise(3, 48, device=device), _noise(48, device=device), 1e-6)


def _rmsnorm_quantize(device: torch.device) -> None:
    ours.rmsnorm_quantize(_noise(3, 48, device=device), _noise(48, device=device), 1e-6, None, True, 0, 1.0)


def _segment_attention(device: torch.device) -> None:
    q = _noise(1, 4, 7, 12, device=device)
    ours.segment_attention(q, q, q, torch.tensor([0, 3, 7], device=device), 0.3)


def _select_tokens(device: torch.device) -> None:
    ours.select_tokens(_noise(2, 7, device=device), 3, torch.tensor([3, 2], device=device))


def _silu_mul_quantize(device: torch.device) -> None:
    x = _noise(3, 48, device=device)
    ours.silu_mul_quantize(x, x, None, False, 0, 1.0)


def _spread_tokens(device: torch.device) -> None:
    scores = _noise(2, 7, device=device)
    ours.spread_tokens(scores, scores > -1, torch.tensor([3, 2], device=device), 0.5)


def _token_scores(device: torch.device) -> None:
    hidden, q = _noise(1, 6, 48, device=device), _noise(1, 4, 6, 12, device=device)
    valid = torch.ones(1, 6, dtype=torch.bool, device=device)
    visual = valid & (torch.arange(6, device=device) < 4)
    settings = ([0.45, 0.25, 0.1, 0.2], "percentile", 1.0, 99.0, False, False, 0, 1.0, False, 0.0)
    ours.token_scores(hidden, hidden, q, q, None, 0.3, visual, valid, ~visual, *settings)


def _dpp_select(device: torch.device) -> None:
    features, counted, budget = _choice(device)
    ours.dpp_select(features, features[..., 0].abs(), counted, budget)


def _farthest_tokens(device: torch.device) -> None:
    ours.farthest_tokens(*_choice(device))


def _fuse_risk(device: torch.device) -> None:
    scores = _noise(2, 7, device=device)
    ours.fuse_risk(scores, scores.abs(), scores > -1, 0.55, True, True)


def _pivot_tokens(device: torch.device) -> None:
    features, counted, budget = _choice(device)
    ours.pivot_tokens(features, features[:, None], counted, counted, budget, 2, 1)


def _quantization_risk(device: torch.device) -> None:
    features, counted, _ = _choice(device)
    ours.quantization_risk(features, counted, "complex", 4)


def _text_relevance(device: torch.device) -> None:
    features, counted, _ = _choice(device)
    ours.text_relevance(features, counted, torch.ones_like(counted), 1)


PROBES: dict[str, Probe] = {
    "attention_kv4": _attention_kv4,
    "attention_received": _attention_received,
    "dpp_select": _dpp_select,
    "farthest_tokens": _farthest_tokens,
    "fuse_risk": _fuse_risk,
    "hadamard": _hadamard,
    "kronecker": _kronecker,
    "kv4_read": _kv4_read,
    "kv4_write": _kv4_write,
    "kv8_read": _kv8_read,
    "kv8_write": _kv8_write,
    "layernorm_quantize": _layernorm_quantize,
    "linear_w4a16": _linear_w4a16,
    "linear_w4a4": _linear_w4a4,
    "linear_w8a16": _linear_w8a16,
    "merge_tokens": _merge_tokens,
    "pivot_tokens": _pivot_tokens,
    "quant_stub": _quant_stub,
    "quantization_risk": _quantization_risk,
    "quantize_int4": _quantize_int4,
    "quantize_int4_static": _quantize_int4_static,
    "rmsnorm": _rmsnorm,
    "rmsnorm_quantize": _rmsnorm_quantize,
    "rope": _rope,
    "segment_attention": _segment_attention,
    "select_tokens": _select_tokens,
    "silu_mul_quantize": _silu_mul_quantize,
    "spread_tokens": _spread_tokens,
    "text_relevance": _text_relevance,
    "simulate_kivi": _simulate_kivi,
    "simulate_qvlm": _simulate_qvlm,
    "token_scores": _token_scores,
}


def probe(name: str, device: torch.device) -> str:
    """Run one operator; the empty text if that went well, otherwise what went wrong."""
    try:
        with torch.no_grad():
            pair = PROBES[name](device)
    except Exception as error:  # noqa: BLE001 whatever a compiler or a driver throws is what has to be shown
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if pair is not None and not torch.equal(*pair):
        return "runs, but its result differs from the reference: report this processor"
    return ""
