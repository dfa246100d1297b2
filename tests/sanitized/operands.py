"""Valid operands for each of the project's operators, small and of random sizes."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.activation_quantize.reference import FUNCTIONS

Arguments = dict[str, Any]
Draw = random.Random
FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


def _f(draw: Draw, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(sizes).to(dtype or draw.choice(FLOATS))


def _positive(*sizes: int) -> Tensor:
    return torch.rand(sizes) + 0.5


def _flags(*sizes: int) -> Tensor:
    return torch.rand(sizes) < 0.7


def _codes(*sizes: int) -> Tensor:
    return torch.randint(0, 256, sizes, dtype=torch.uint8)


def _rows(draw: Draw) -> tuple[int, int]:
    return draw.choice((1, 1, 2, 5, 17, 40)), draw.choice((2, 6, 24, 33, 64, 96, 256))


def _tail(draw: Draw, channels: int) -> Arguments:
    scale = _positive(channels) if draw.random() < 0.5 else None
    groups = [size for size in (0, 0, 2, 3, 8, 32) if not size or channels % size == 0]
    side = draw.choice([each for each in range(1, 17) if channels % each == 0])
    change = draw.choice(("none", "rotated", "factors"))
    factors = [torch.randn(each, each) if change == "factors" else None for each in (side, channels // side)]
    return {
        "transform_scale": scale,
        "rotate": change == "rotated",
        **dict(zip(("left", "right"), factors, strict=True)),
        "shift": draw.choice((None, torch.randn(channels))),
        "group_size": draw.choice(groups),
        "clip_ratio": 0.9,
        "bits": draw.choice((4, 8)),
    }


def _cache(batch: int, heads: int, keys: int, size: int, bits: int) -> tuple[Tensor, Tensor]:
    return _codes(batch, heads, keys, (size * bits + 7) // 8), _positive(batch, heads, keys, 2)


def attention_kv(draw: Draw) -> Arguments:
    batch, groups, repeats, rows, keys, size = (
        draw.choice(each) for each in ((1, 2), (1, 2), (1, 2), (1, 2, 9), (1, 7, 40), (5, 8))
    )
    bits = {"k_bits": draw.choice((4, 8)), "v_bits": draw.choice((4, 8))}
    parts = dict(zip(("k_codes", "k_affine"), _cache(batch, groups, keys, size, bits["k_bits"]), strict=True))
    parts |= dict(zip(("v_codes", "v_affine"), _cache(batch, groups, keys, size, bits["v_bits"]), strict=True))
    mask = draw.choice((None, _flags(batch, 1, rows, keys), _f(draw, 1, groups * repeats, rows, keys)))
    filled = draw.choice((None, None, torch.tensor([keys])))
    q = _f(draw, batch, groups * repeats, rows, size)
    return {"q": q, **parts, "mask": mask, "scale": 0.3, **bits, "filled": filled}


def attention_received(draw: Draw) -> Arguments:
    tokens = draw.choice((1, 5, 20))
    lengths = torch.tensor([0, tokens // 2, tokens])
    return {
        "q": _f(draw, 1, 4, tokens, 8),
        "k": _f(draw, 1, 2, tokens, 8),
        "cu_seqlens": draw.choice((None, lengths)),
        "scale": 0.3,
        "class_token": draw.random() < 0.5,
    }


def _picked(draw: Draw) -> tuple[int, int, Arguments]:
    batch, tokens = draw.choice((1, 2)), draw.choice((1, 6, 20))
    return batch, tokens, {"counted": _flags(batch, tokens), "budget": torch.randint(0, tokens + 1, (batch,))}


def dpp_select(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    return {"features": _f(draw, batch, tokens, 8), "relevance": _positive(batch, tokens), **rest}


def farthest_tokens(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    return {"features": _f(draw, batch, tokens, 8), **rest}


def fuse_risk(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    scores = {"scores": torch.rand(batch, tokens), "risk": torch.rand(batch, tokens), "counted": rest["counted"]}
    return {**scores, "alpha": 0.4, "dynamic": draw.random() < 0.5, "minmax": draw.random() < 0.5}


def hadamard(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    return {"x": _f(draw, rows, channels), "scale": draw.choice((None, _positive(channels)))}


def kronecker(draw: Draw) -> Arguments:
    left, right = draw.choice((1, 3, 8)), draw.choice((2, 5, 16))
    channels = left * right
    scale = draw.choice((None, _positive(channels)))
    return {
        "x": _f(draw, 3, channels),
        "scale": scale,
        "left": torch.randn(left, left),
        "right": torch.randn(right, right),
    }


def kv_read(draw: Draw) -> Arguments:
    size, bits = draw.choice((1, 7, 8)), draw.choice((4, 8))
    codes, affine = _cache(2, 2, 5, size, bits)
    return {"codes": codes, "affine": affine, "head_dim": size, "bits": bits, "dtype": draw.choice(FLOATS)}


def kv_write(draw: Draw) -> Arguments:
    x = _f(draw, draw.choice((1, 2)), 3, draw.choice((1, 5)), draw.choice((1, 7, 64)))
    return {"x": x, "bits": draw.choice((4, 8))}


def rmsnorm_quantize(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    x = _f(draw, rows, channels)
    return {"x": x, "weight": _positive(channels).to(x.dtype), "eps": 1e-5, **_tail(draw, channels)}


def layernorm_quantize(draw: Draw) -> Arguments:
    made = rmsnorm_quantize(draw)
    tail = {name: value for name, value in made.items() if name not in ("x", "weight")}
    return {"x": made["x"], "weight": made["weight"], "bias": torch.randn_like(made["weight"]), **tail}


def activation(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    x = _f(draw, rows, channels)
    return {"x": x, "up": draw.choice((None, torch.randn_like(x))), "function": draw.choice(FUNCTIONS)}


def activation_quantize(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    x = _f(draw, rows, channels)
    up, function = draw.choice((None, torch.randn_like(x))), draw.choice(FUNCTIONS)
    return {"x": x, "up": up, "function": function, **_tail(draw, channels)}


def transform_quantize(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    return {"x": _f(draw, rows, channels), **_tail(draw, channels)}


def linear_int(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    features, groups = draw.choice((1, 3, 40, 65)), 2 if channels % 2 == 0 and draw.random() < 0.3 else 1
    q, dtype = torch.randint(-128, 128, (rows, channels), dtype=torch.int8), draw.choice(FLOATS)
    wide = torch.randint(-128, 128, (features, channels), dtype=torch.int8)
    return {
        "q": q,
        "scale": _positive(rows, groups),
        "weight": draw.choice((_codes(features, (channels + 1) // 2), wide)),
        "weight_scale": _positive(features, groups),
        "bias": draw.choice((None, _f(draw, features))),
        "dtype": dtype,
        "bits": 8,
        "residual": torch.randn(rows, features).to(dtype) if draw.random() < 0.3 else None,
    }


def linear_w4a16(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    features = draw.choice((1, 3, 40))
    groups = draw.choice([each for each in (1, 2, 3, channels) if channels % each == 0])
    weights = {"weight": _codes(features, (channels + 1) // 2), "weight_scale": _positive(features, groups)}
    return {"x": _f(draw, rows, channels), **weights, "bias": draw.choice((None, _f(draw, features)))}


def linear_w8a16(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    features = draw.choice((1, 3, 40, 65))
    weight = torch.randint(-127, 128, (features, channels), dtype=torch.int8)
    scales = {"weight": weight, "weight_scale": _positive(features, 1)}
    return {"x": _f(draw, rows, channels), **scales, "bias": draw.choice((None, _f(draw, features)))}


def merge_tokens(draw: Draw) -> Arguments:
    batch, tokens, _ = _picked(draw)
    targets = _flags(batch, tokens)
    weights = {"weights": torch.rand(batch, tokens), "targets": targets, "sources": ~targets}
    features = {"hidden": _f(draw, batch, tokens, 6), "keys": _f(draw, batch, tokens, 4)}
    return {**features, **weights, "nearest": draw.choice((0, 2))}


def pivot_tokens(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    flags = {"visual": rest["counted"], "valid": torch.ones(batch, tokens, dtype=torch.bool), "budget": rest["budget"]}
    features = {"hidden": _f(draw, batch, tokens, 6), "keys": _f(draw, batch, 2, tokens, 4)}
    return {**features, **flags, "visual_pivots": 2, "text_pivots": 1}


def quant_stub(draw: Draw) -> Arguments:
    return {"x": _f(draw, *_rows(draw))}


def quantization_risk(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    metric = draw.choice(("complex", "l2_norm", "l_inf"))
    return {"features": _f(draw, batch, tokens, 8), "counted": rest["counted"], "metric": metric, "group_size": 4}


def quantize_dynamic(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    tail = _tail(draw, channels)
    quantizer = {name: tail[name] for name in ("group_size", "clip_ratio", "bits")}
    return {"x": _f(draw, rows, channels), **quantizer}


def quantize_static(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    return {
        "x": _f(draw, rows, channels),
        "scale": _positive(*draw.choice(((1,), (rows, 1)))),
        "bits": draw.choice((4, 8)),
    }


def rmsnorm(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    return {"x": _f(draw, rows, channels), "weight": _positive(channels), "eps": 1e-5}


def rope(draw: Draw) -> Arguments:
    size, tokens = draw.choice((2, 8, 64)), draw.choice((1, 5))
    tables = {"cos": torch.randn(1, 1, tokens, size), "sin": torch.randn(1, 1, tokens, size)}
    return {"x": _f(draw, 2, 3, tokens, size), **tables}


def rope_kv_write(draw: Draw) -> Arguments:
    size, tokens, rows = draw.choice((2, 8, 24, 64)), draw.choice((1, 5)), draw.choice((1, 2))
    x = _f(draw, rows, 7, tokens, size)
    tables = {"cos": torch.randn(1, 1, tokens, size), "sin": torch.randn(rows, 1, tokens, size)}
    heads = {"q": x[:, :3], "k": x[:, 3:4], "v": x[:, 6:]}
    settings = {"rotate": draw.choice((True, False)), "k_bits": draw.choice((4, 8)), "v_bits": draw.choice((4, 8))}
    return {**heads, **tables, **settings, "center": draw.choice((None, torch.randn(1, 1, 1, size)))}


def rope_kv_append(draw: Draw) -> Arguments:
    given = rope_kv_write(draw)
    rows, size, before = given["q"].shape[0], given["q"].shape[3], draw.choice((0, 3))
    past = {f"{part}_codes": _codes(rows, 1, before, size * given[f"{part}_bits"] // 8) for part in "kv"}
    past |= {f"{part}_affine": _positive(rows, 1, before, 2) for part in "kv"}
    center = given.pop("center")
    return given | {name: past[name] for name in ("k_codes", "k_affine", "v_codes", "v_affine")} | {"center": center}


def attention_step(draw: Draw) -> Arguments:
    given = rope_kv_append(draw)
    (rows, heads, tokens, size), past = given["q"].shape, given["k_codes"].shape[2]
    seen = torch.randn(rows, 1, tokens, tokens + past)
    tail = {{"rotate": "rotate_result"}.get(name, name): value for name, value in _tail(draw, heads * size).items()}
    return given | {"mask": draw.choice((None, seen < 1, seen)), "scale": 0.3} | tail


def segment_attention(draw: Draw) -> Arguments:
    tokens = draw.choice((1, 5, 20))
    tensors = {"q": torch.randn(1, 4, tokens, 8), "k": torch.randn(1, 2, tokens, 8), "v": torch.randn(1, 2, tokens, 6)}
    return {**tensors, "cu_seqlens": torch.tensor([0, tokens // 2, tokens]), "scale": 0.3}


def gated_delta(draw: Draw) -> Arguments:
    batch, tokens, heads, width, values = draw.choice((1, 2)), draw.choice((1, 5, 70)), 2, draw.choice((1, 8)), 3
    return {
        **{name: torch.randn(batch, tokens, heads, width) / width for name in "qk"},
        "v": torch.randn(batch, tokens, heads, values),
        "decay": -torch.rand(batch, tokens, heads),
        "beta": torch.rand(batch, tokens, heads),
        "state": torch.randn(batch, heads, width, values),
    }


def channel_delta(draw: Draw) -> Arguments:
    operands = gated_delta(draw)
    return operands | {"decay": -torch.rand_like(operands["k"])}


def select_tokens(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    return {"scores": torch.rand(batch, tokens), "keep": draw.randint(0, tokens), "quota": rest["budget"]}


def simulate_kivi(draw: Draw) -> Arguments:
    return {"x": _f(draw, 1, 2, draw.choice((1, 40)), 8), "levels": 3, "key": draw.random() < 0.5}


def simulate_qvlm(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    return {"x": _f(draw, rows, channels), "low": -_positive(channels), "high": _positive(channels)}


def spread_tokens(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    return {"scores": torch.rand(batch, tokens), **rest, "share": 0.5}


def text_relevance(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    flags = {"visual": rest["counted"], "valid": torch.ones(batch, tokens, dtype=torch.bool)}
    return {"hidden": _f(draw, batch, tokens, 6), **flags, "sign": draw.choice((1, -1))}


def token_scores(draw: Draw) -> Arguments:
    batch, tokens, rest = _picked(draw)
    dtype = draw.choice(FLOATS)
    flags = {
        "visual": rest["counted"],
        "valid": torch.ones(batch, tokens, dtype=torch.bool),
        "queries": ~rest["counted"],
    }
    heads = {"q": _f(draw, batch, 4, tokens, 8, dtype=dtype), "k": _f(draw, batch, 2, tokens, 8, dtype=dtype)}
    mask = draw.choice((None, _flags(batch, 1, tokens, tokens)))
    return {
        "hidden": _f(draw, batch, tokens, 8, dtype=dtype),
        "rounded": _f(draw, batch, tokens, 8, dtype=dtype),
        **heads,
        "mask": mask,
        "scale": 0.3,
        **flags,
        "weights": [0.4, 0.3, 0.1, 0.2],
        "normalize": "percentile",
        "low": 1.0,
        "high": 99.0,
        "intra_mean": draw.random() < 0.5,
        "rotate": draw.random() < 0.5,
        "group_size": 0,
        "clip_ratio": 1.0,
        "bits": draw.choice((4, 8)),
        "relative": draw.random() < 0.5,
        "sink": 0.0,
    }


def linear(draw: Draw) -> Arguments:
    rows, channels = _rows(draw)
    x = _f(draw, rows, channels)
    return {"input": x, "weight": torch.randn(draw.choice((1, 40, 65)), channels).to(x.dtype), "bias": None}


def attention(draw: Draw) -> Arguments:
    tokens = draw.choice((1, 20, 40))
    tensors = {name: torch.randn(1, heads, tokens, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return {**tensors, "mask": draw.choice((None, _flags(1, 1, tokens, tokens))), "scale": 0.3}


def attend(draw: Draw) -> Arguments:
    """Operands of torch's own operator, in its forms: any leading sizes, causal, groups of heads."""
    grouped = draw.random() < 0.5
    tokens, leading = draw.choice((1, 5)), draw.choice(((), (2,), (1, 3)))
    sizes = {"q": 4, "k": 2 if grouped else 4, "v": 2 if grouped else 4}
    tensors = {name: torch.randn(*leading, heads, tokens, 8) for name, heads in sizes.items()}
    options = {"is_causal": draw.random() < 0.3, "scale": draw.choice((None, 0.3)), "enable_gqa": grouped}
    return {**tensors, "attn_mask": draw.choice((None, _flags(tokens, tokens))), "dropout_p": 0.0, **options}


def conv2d(draw: Draw) -> Arguments:
    """Separate patches, or a picture."""
    side = draw.choice((4, 9))
    return {
        "x": torch.randn(3, 2, side, side),
        "weight": torch.randn(5, 2, 4, 4),
        "bias": draw.choice((None, torch.randn(5))),
    }


OPERATORS: dict[str, Callable[[Draw], Arguments]] = {
    **{each.__name__: each for each in (attention_kv, attention_received, dpp_select, farthest_tokens, fuse_risk)},
    **{each.__name__: each for each in (activation, activation_quantize, attention_step, channel_delta, gated_delta)},
    **{each.__name__: each for each in (hadamard, kronecker, kv_read, kv_write, layernorm_quantize)},
    **{each.__name__: each for each in (linear_w4a16, linear_int, linear_w8a16, merge_tokens, pivot_tokens)},
    **{each.__name__: each for each in (quant_stub, quantization_risk, quantize_dynamic, quantize_static, rmsnorm)},
    **{each.__name__: each for each in (rope, rope_kv_append, rope_kv_write, segment_attention, select_tokens)},
    **{each.__name__: each for each in (simulate_kivi, simulate_qvlm, spread_tokens, text_relevance, token_scores)},
    **{each.__name__: each for each in (rmsnorm_quantize, transform_quantize)},
}
"""By the name of an operator in the namespace `qpcompile`."""
DIRECT: dict[str, Callable[[Draw], Arguments]] = {"linear": linear, "attention": attention}
"""What the CPU runs without an operator of ours."""
BOUND: dict[str, Callable[[Draw], Arguments]] = {"attend": attend, "conv2d": conv2d}
"""What a bound graph runs for torch's operators; it names torch's own errors."""
