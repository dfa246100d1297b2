"""Rewrite graphs for speed in onnxruntime: `export_onnx(..., fast=True)`. The numerics change as listed here.

    linear layers on codes           %q, %s = quantize_dynamic(%x); linear_int(%q, %s, W)  ->  linear_w4a16(%x, W)
                                     with the same 4-bit weights; activations are rounded to 8 bits inside the operator
    experts on codes                 expert_linear_int(%q, %s, W, %i)  ->  expert_linear_a16(%x, W, %i), as for linears;
                                     8-bit weights remain a float product per expert
    8-bit weights                    linear_int(%q, %s, W), linear_w8a16(%x, W)  ->  linear_w8(%x, W), the same weights
    the head                         linear(%x, W)  ->  linear_w8(%x, W'), 8-bit weights in blocks of 128
    token embeddings                 embedding(W, %ids)  ->  embedding_16, 16 bits per number
    sums in float64                  are float32 again
    attention in prefill             on unquantized keys and values
    a cache of 4 or 8 bits           is 8 bits, with one scale per channel of a head, taken from the prompt
    attention of a tower             within segments, in onnxruntime's operator (segments.py)
    attention in decode              cat(%past, %new) and what reads it  ->  cached_attention, which appends in place

All edits are on the part only, whose nodes are copies; weights are shared with the program, which is unchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qpcompile.emit.onnx.edit import calls, put
from qpcompile.emit.onnx.example import SIZES, decode_example, prefill_example, vision_example
from qpcompile.emit.onnx.fast.attention import append_in_place, float_keys, rotary_in_one
from qpcompile.emit.onnx.fast.cache_writes import split_cache_writes
from qpcompile.emit.onnx.fast.inputs import patches_in_one, tokens_in_16_bits
from qpcompile.emit.onnx.wrap import Part
from qpcompile.errors import ExportError
from qpcompile.ir.edit import aten, get_tensor, is_call, set_tensor
from qpcompile.ir.operators import (
    ACTIVATION,
    ACTIVATION_QUANTIZE,
    EXPERT_LINEAR_A16,
    EXPERT_LINEAR_INT,
    HADAMARD,
    KRONECKER,
    LAYERNORM_QUANTIZE,
    LINEAR_INT,
    LINEAR_W4A16,
    LINEAR_W8A16,
    QUANTIZE_DYNAMIC,
    QUANTIZE_STATIC,
    RMSNORM,
    RMSNORM_QUANTIZE,
    ROPE,
    TRANSFORM_QUANTIZE,
)
from qpcompile.ir.program import DECODE, HEAD, PREFILL, VISION, Program
from qpcompile.ir.shapes import value
from qpcompile.kernels.activation_quantize.reference import SLOPE
from qpcompile.kernels.linear_w4a16.onnx_contrib import block_size

Tensor = torch.Tensor

# Descriptions of the numbers, stored in the manifest of an exported folder.
AS_MODULE = {
    "exact": ("the compiled module's, code for code: sums are float64, rounded to float32 once",),
    "fast": ("the compiled module's, but for float32 sums in another order: a code next to a tie may differ by one",),
}
"""By the recipe's numerics, where the graphs are the module's."""
CHANGES = (
    "weights are the compiled model's weights; in front of them activations have 8 bits, one scale per token in "
    "prefill and one per 128 channels of a token in decode, in place of the recipe's",
    "the head has the module's 8-bit weights, or 8-bit weights in blocks of 128 where the module's has 16 bits and the "
    "recipe quantizes anything; activations have 8 bits in front of both",
    "token embeddings are float16, or bfloat16 where the model's are, if the recipe quantizes anything and they have "
    "no 8-bit codes already",
    "a 4-bit or 8-bit cache has 8 bits, one scale per channel of a head for all prompts of a batch: 1.5 times the "
    "prompt's largest value; prefill attends to keys and values before they are rounded",
    "sums are float32, but for those of the pruners themselves",
)

HEAD_BLOCK = 128


def fast_parts(program: Program, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The fast graphs of a folder, made from the exact ones, which are consumed.

    Raises ExportError if a cache cannot grow in place.
    """
    for part in parts.values():
        split_cache_writes(part)
    picture = vision_example(program, SIZES[0])
    said = _note_values(parts[VISION], picture)
    prompt = prefill_example(program, SIZES[0], said)
    token = decode_example(program, prompt, _note_values(parts[PREFILL], prompt))
    _note_values(parts[DECODE], token)
    return {name: _fast_part(program, name, part) for name, part in parts.items()}


class _Noting(fx.Interpreter):
    """Records type and sizes of every value in its node, and the values of masks."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, Tensor):
            n.meta["val"] = found if found.dtype == torch.bool else found.to("meta")
        return found


def _note_values(part: Part, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        returned = _Noting(part.module).run(*[example[path] for path in part.inputs])
    return dict(zip(part.outputs, returned, strict=True))


def _fast_part(program: Program, name: str, part: Part) -> Part:
    scheme = program.recipe.quantize
    _narrow(part)
    _float_activations(part)
    if scheme is not None:
        _weights_of_8_bits(part)
        tokens_in_16_bits(part)
    patches_in_one(part)
    rotary_in_one(part)
    small_cache = scheme is not None and scheme.kv_cache.bits != 16
    part = append_in_place(part, small_cache) if name == DECODE else float_keys(part, small_cache)
    part.module.graph.eliminate_dead_code()
    part.module.graph.lint()
    part.module.recompile()
    return part


def _narrow(part: Part) -> None:
    """Undo the pass `widen_sums` of exact numerics: remove all casts to float64, and those of turned heads back."""
    for node in calls(part, aten.to.dtype):
        source = node.args[0]
        tensor = source.meta.get("val") if isinstance(source, fx.Node) else None
        widened = node.args[1] == torch.float64 and isinstance(tensor, Tensor) and tensor.is_floating_point()
        if widened or (node.args[1] == torch.float32 and is_call(source, HADAMARD, ROPE)):
            node.replace_all_uses_with(source)  # type: ignore[arg-type]


def _float_activations(part: Part) -> None:
    """Make linear layers read the inputs of their quantizers."""
    for node in calls(part, ACTIVATION):
        gate = _gated(part, node, *node.args)
        gate.meta["val"] = value(node)
        node.replace_all_uses_with(gate)
    sources: dict[fx.Node, fx.Node | None] = {}
    for node in calls(part, LINEAR_INT, EXPERT_LINEAR_INT):
        # last: a bias, or which experts were chosen.
        codes, _, weight, weight_scale, last, dtype, _, *residual = node.args
        pair = codes.args[0] if is_call(codes, operator.getitem) else None
        if not isinstance(pair, fx.Node):
            continue
        if pair not in sources:
            sources[pair] = _unquantized(part, pair)
        if (source := sources[pair]) is not None:
            if dtype != torch.float32:
                # Scales and shifts of activations are float32: the quantizer's input may be wider.
                source = put(part, node, aten.to.dtype, source, dtype, like=node)
            packed = value(weight).dtype == torch.uint8  # type: ignore[arg-type]
            target = LINEAR_W4A16 if packed else LINEAR_W8A16
            target = EXPERT_LINEAR_A16 if node.target is EXPERT_LINEAR_INT else target
            new = put(part, node, target, source, weight, weight_scale, last, like=node)
            new.meta["val"] = value(node)
            if residual:
                new = put(part, node, aten.add.Tensor, new, *residual, like=node)
                new.meta["val"] = value(node)
            node.replace_all_uses_with(new)


def _unquantized(part: Part, pair: fx.Node) -> fx.Node | None:
    """The input of a quantizer; None if the node is not a known quantizer."""
    args = pair.args
    if is_call(pair, QUANTIZE_DYNAMIC, QUANTIZE_STATIC):
        return args[0]  # type: ignore[return-value]
    if is_call(pair, RMSNORM_QUANTIZE):
        x, weight, eps, *epilogue = args
        y = put(part, pair, RMSNORM, x, weight, eps, like=pair)
    elif is_call(pair, LAYERNORM_QUANTIZE):
        x, weight, bias, eps, *epilogue = args
        assert isinstance(x, fx.Node)
        y = put(part, pair, aten.layer_norm.default, x, [value(x).shape[-1]], weight, bias, eps, like=pair)
    elif is_call(pair, ACTIVATION_QUANTIZE):
        *gate, epilogue = *args[:3], args[3:]
        y = _gated(part, pair, *gate)
    elif is_call(pair, TRANSFORM_QUANTIZE):
        y, *epilogue = args
    else:
        return None
    scale, rotate, left, right, shift, *_ = epilogue
    if left is not None:
        y = put(part, pair, KRONECKER, y, scale, left, right, like=pair)
    elif rotate:
        y = put(part, pair, HADAMARD, y, scale, like=pair)
    elif scale is not None:
        y = put(part, pair, aten.mul.Tensor, y, scale, like=pair)
    return y if shift is None else put(part, pair, aten.sub.Tensor, y, shift, like=pair)  # type: ignore[return-value]


def _gated(part: Part, before: fx.Node, x: Any, up: Any, function: Any) -> fx.Node:
    """f(x), or f(x) * up, in torch's operators."""
    y = _activation(part, before, x, function)
    return y if up is None else put(part, before, aten.mul.Tensor, y, up, like=before)


def _activation(part: Part, before: fx.Node, x: Any, function: Any) -> fx.Node:
    """A function of activation_quantize in torch's operators."""
    if function == "silu":
        return put(part, before, aten.silu.default, x, like=before)
    if function == "gelu_sigmoid":
        inner = put(part, before, aten.mul.Tensor, x, SLOPE, like=before)
        return put(
            part, before, aten.mul.Tensor, x, put(part, before, aten.sigmoid.default, inner, like=before), like=before
        )
    kind = "tanh" if function == "gelu_tanh" else "none"
    return put(part, before, aten.gelu.default, x, approximate=kind, like=before)


def linear_w8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: f[..., K], codes: u8[N, B, size], zero at 128, scale: f32[N, B] -> f[..., N], B blocks of inputs."""
    weight = ((codes.float() - 128) * scale[..., None]).flatten(1)[:, : x.shape[-1]]
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def quantize_w8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: f[N, K] -> codes and scale of `linear_w8`; a partial last block is zero-padded."""
    wide = weight.detach().float()
    wide = torch.nn.functional.pad(wide, (0, -wide.shape[1] % HEAD_BLOCK)).unflatten(1, (-1, HEAD_BLOCK))
    scale = wide.abs().amax(-1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (torch.round(wide / scale[..., None]) + 128).to(torch.uint8), scale


def in_blocks(codes: Tensor, scale: Tensor, block: int = HEAD_BLOCK) -> tuple[Tensor, Tensor]:
    """codes: i8[N, K], scale: f32[N, G] -> those of `linear_w8`, in blocks of inputs; the last one is zero-padded."""
    moved = torch.nn.functional.pad(codes.view(torch.uint8) ^ 128, (0, -codes.shape[1] % block), value=128)
    blocks = moved.unflatten(1, (-1, block))
    return blocks, scale.repeat_interleave(blocks.shape[1] // scale.shape[1], 1)


def _weights_of_8_bits(part: Part) -> None:
    """Bring 8-bit weights, and the head's floats, into the layout of `linear_w8`."""
    for node in calls(part, aten.linear.default, LINEAR_W8A16):
        x, weight, *rest = node.args
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        if node.target is not LINEAR_W8A16 and not str(weight.target).startswith(f"{HEAD}."):
            continue
        tensor = get_tensor(part.module, str(weight.target))
        if node.target is LINEAR_W8A16:
            scale, *bias = rest
            assert isinstance(scale, fx.Node)
            steps = get_tensor(part.module, str(scale.target))
            block = block_size(tensor.shape[1], steps.shape[1])
            if block is None:
                raise ExportError(
                    f"a group of {tensor.shape[1] // steps.shape[1]} inputs cannot be split into blocks of 16 or more",
                    where=str(weight.target),
                    do="export without fast, or compile with quantize.weights.granularity: channel",
                )
            made = in_blocks(tensor, steps, block)
        else:
            made, bias = quantize_w8(tensor), rest
        names = (f"{weight.target}_blocks", f"{weight.target}_block_scale")
        for name, each in zip(names, made, strict=True):
            set_tensor(part.module, name, each)
        with part.module.graph.inserting_before(node):
            given = [part.module.graph.get_attr(name) for name in names]
        node.replace_all_uses_with(put(part, node, linear_w8, x, *given, bias[0] if bias else None, like=node))
