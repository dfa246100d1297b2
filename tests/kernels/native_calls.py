"""A valid call of every function of the library, by the names of its arguments."""

from collections.abc import Callable
from typing import Any

import torch

from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.cells import ELEMENTS, SIGNATURES

Arguments = dict[str, Any]
AMX_AWAY = frozenset(native.AMX) if not native.library().amx else frozenset[str]()


def _i8(*sizes: int) -> torch.Tensor:
    return torch.randint(-8, 8, sizes, dtype=torch.int8)


def _u8(*sizes: int) -> torch.Tensor:
    return torch.randint(0, 256, sizes, dtype=torch.uint8)


def _bf16(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes).bfloat16()


def linear_int() -> Arguments:
    return {
        "q": _i8(3, 64),
        "scale": torch.rand(3, 2),
        "weight": _u8(5, 32),
        "weight_scale": torch.rand(5, 1),
        "bias": torch.rand(5),
        "y": torch.zeros(3, 5),
        "tokens": 3,
        "columns": 64,
        "features": 5,
        "scale_groups": 2,
        "weight_groups": 1,
    }


def expert_linear_int() -> Arguments:
    sizes = {"tokens": 3, "rows": 1, "slots": 2, "experts": 4, "columns": 64, "features": 5}
    return {
        "q": _i8(3, 1, 64),
        "scale": torch.rand(3, 1, 2),
        "weight": _u8(4, 5, 32),
        "weight_scale": torch.rand(4, 5, 1),
        "index": torch.tensor([[0, 3], [3, 1], [0, 0]]),
        "y": torch.zeros(3, 2, 5),
        **sizes,
        "scale_groups": 2,
        "weight_groups": 1,
    }


def linear_int_amx() -> Arguments:
    return {
        "q": _i8(3, 64),
        "scale": torch.rand(3, 1),
        "weight": _u8(5, 32),
        "weight_scale": torch.rand(5, 1),
        "bias": torch.rand(5),
        "residual": torch.rand(3, 5),
        "y": torch.zeros(3, 5),
        "tokens": 3,
        "columns": 64,
        "features": 5,
    }


def unpack_int4() -> Arguments:
    return {"weight": _u8(5, 17), "codes": _i8(5, 33), "features": 5, "columns": 33}


def scale_int32() -> Arguments:
    sums = torch.randint(-99, 99, (3, 5), dtype=torch.int32)
    scales = {"scale": torch.rand(3, 1), "weight_scale": torch.rand(5, 1), "bias": _bf16(5)}
    return {"sums": sums, **scales, "y": _bf16(3, 5), "tokens": 3, "features": 5}


def linear() -> Arguments:
    return {"x": _bf16(3, 40), "weight": _bf16(5, 40), "y": _bf16(3, 5), "tokens": 3, "columns": 40, "features": 5}


def linear_w8a16() -> Arguments:
    weights = {"weight": _i8(5, 40), "weight_scale": torch.rand(5, 1), "bias": _bf16(5)}
    return {"x": torch.randn(3, 40), **weights, "y": torch.zeros(3, 5), "tokens": 3, "columns": 40, "features": 5}


def linear_w4a16() -> Arguments:
    tensors = {"x": torch.randn(3, 45), "weight": _u8(5, 23), "weight_scale": torch.rand(5, 3), "bias": torch.rand(5)}
    return {**tensors, "y": torch.zeros(3, 5), "tokens": 3, "columns": 45, "features": 5, "groups": 3}


def dequantize_int4() -> Arguments:
    tensors = {"weight": _u8(5, 23), "weight_scale": torch.rand(5, 3), "dense": torch.zeros(5, 45)}
    return {**tensors, "features": 5, "columns": 45, "groups": 3}


def kv_write() -> Arguments:
    made = {"codes": _u8(2, 3, 4, 5), "affine": torch.zeros(2, 3, 4, 2)}
    return {
        "x": torch.randn(2, 4, 3, 9).transpose(1, 2),
        **made,
        "batch": 2,
        "heads": 3,
        "tokens": 4,
        "size": 9,
        "bits": 4,
    }


def kv_write_8() -> Arguments:
    return kv_write() | {"codes": _u8(2, 3, 4, 9), "bits": 8}


def rope() -> Arguments:
    tables = {"cos": torch.randn(2, 3, 4, 8), "sin": torch.randn(2, 3, 4, 8)}
    made = {"x": torch.randn(2, 3, 4, 8), **tables, "y": torch.zeros(2, 3, 4, 8)}
    return {**made, "batch": 2, "heads": 3, "tokens": 4, "size": 8}


def rope_kv_write() -> Arguments:
    q, k, v = torch.randn(2, 3, 8, 24).transpose(1, 2).split((4, 2, 2), dim=1)
    tensors = {"q": q, "k": k, "v": v.contiguous(), "cos": torch.randn(2, 1, 3, 24), "sin": torch.randn(2, 1, 3, 24)}
    tensors |= {"y": torch.zeros(2, 4, 3, 24), "k_codes": _u8(2, 2, 3, 12), "k_affine": torch.zeros(2, 2, 3, 2)}
    tensors |= {"v_codes": _u8(2, 2, 3, 12), "v_affine": torch.zeros(2, 2, 3, 2)}
    factors = {"left": torch.rand(4, 4), "right": torch.rand(6, 6), "tiles": None, "left_size": 4, "right_size": 6}
    sizes = {"batch": 2, "heads": 4, "groups": 2, "tokens": 3, "size": 24, "k_bits": 4, "v_bits": 4}
    return {**tensors, **factors, "center": torch.rand(2, 24), **sizes}


def rope_kv_write_8() -> Arguments:
    return rope_kv_write() | {"k_codes": _u8(2, 2, 3, 24), "k_bits": 8}


def attention_kv() -> Arguments:
    cache = {"k_codes": _u8(2, 2, 7, 4), "k_affine": torch.rand(2, 2, 7, 2)}
    cache |= {"v_codes": _u8(2, 2, 7, 4), "v_affine": torch.rand(2, 2, 7, 2)}
    tensors = {"q": torch.randn(2, 4, 1, 8), **cache, "mask": torch.ones(2, 4, 1, 7, dtype=torch.bool)}
    sizes = {"batch": 2, "heads": 4, "groups": 2, "rows": 1, "keys": 7, "room": 7, "size": 8, "k_bits": 4, "v_bits": 4}
    return {**tensors, "y": torch.zeros(2, 1, 4, 8), **sizes, "scale": 0.5}


def attention_kv_8() -> Arguments:
    return attention_kv() | {"v_codes": _u8(2, 2, 7, 8), "v_bits": 8}


def attention_amx() -> Arguments:
    tensors = {"q": _bf16(2, 4, 40, 8), "k": _bf16(2, 2, 36, 8), "v": _bf16(2, 2, 36, 8)}
    tensors |= {"mask": torch.ones(2, 4, 40, 36, dtype=torch.bool), "y": _bf16(2, 4, 40, 8)}
    return {**tensors, "batch": 2, "heads": 4, "groups": 2, "queries": 40, "keys": 36, "size": 8, "scale": 0.5}


def attention_mass_amx() -> Arguments:
    tensors = {"q": _bf16(2, 4, 40, 8), "k": _bf16(2, 2, 40, 8), "mask": torch.ones(2, 4, 40, 40, dtype=torch.bool)}
    tensors |= {"groups": torch.rand(2, 3, 40), "mass": torch.zeros(2, 3, 40)}
    return {**tensors, "batch": 2, "heads": 4, "key_heads": 2, "tokens": 40, "size": 8, "group_count": 3, "scale": 0.5}


def change_tiles_amx() -> Arguments:
    tiles = torch.zeros(2 * (16 * 32 + 32 * 32), dtype=torch.bfloat16)
    return {"left": torch.rand(4, 4), "right": torch.rand(6, 6), "tiles": tiles, "left_size": 4, "right_size": 6}


def rows() -> Arguments:
    tensors = {"x": torch.randn(3, 50)[:, 26:], "second": torch.randn(3, 40)[:, 16:]}
    tensors |= {"q": _i8(3, 24), "scale": torch.rand(3, 2)}
    return {**tensors, "y": None, "rows": 3, **_plan(kind=3)}


def norm_rows() -> Arguments:
    plan = _plan(kind=2) | {"weight": torch.rand(24), "bias": torch.rand(24), "group_size": 0}
    return {
        "x": torch.randn(3, 24),
        "second": None,
        "q": None,
        "scale": None,
        "y": torch.rand(3, 24),
        "rows": 3,
        **plan,
    }


def gates() -> Arguments:
    return {"made": torch.zeros(65536), **_plan(kind=4)}


def add() -> Arguments:
    return {"x": torch.randn(3, 5), "y": torch.randn(3, 5), "sum": torch.zeros(3, 5)}


def append() -> Arguments:
    return {"token": _u8(2, 2, 1, 3), "room": _u8(2, 2, 5, 3), "heads": 4, "size": 3, "tokens": 5, "at": 2}


def _plan(kind: int) -> Arguments:
    tensors = {"weight": None, "bias": None, "transform_scale": torch.rand(24), "left": torch.rand(4, 4)}
    tensors |= {"right": torch.rand(6, 6), "shift": torch.rand(24), "tiles": None, "gates": None}
    sizes = {"channels": 24, "group_size": 12, "left_size": 4, "right_size": 6}
    return {
        **tensors,
        **sizes,
        "kind": kind,
        "element": 0,
        "rounded": 0,
        "highest": 7,
        "constant": 1e-5,
        "clip_ratio": 0.9,
    }


WIDENED = ("x", "second", "q", "k", "v", "y")
"""Arguments that are float64 where sums are."""


def _wide(arguments: Callable[[], Arguments]) -> Callable[[], Arguments]:
    """The same call on rows in float64."""

    def made() -> Arguments:
        given = arguments()
        rows = {name: given[name].double() for name in WIDENED if _is_float(given.get(name))}
        return given | rows | ({"element": ELEMENTS[torch.float64]} if "element" in given else {})

    return made


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


TWICE = ("rows", "gates", "attention_kv", "rope_kv_write")
"""Functions that are there for both types of sums."""
CALLS: dict[str, tuple[str, Callable[[], Arguments]]] = {
    **{name: (name, globals()[name]) for name in SIGNATURES if name not in TWICE},
    "rows_f64": ("rows_f64", _wide(rows)),
    "rows_f32": ("rows_f32", rows),
    "norm_rows_f64": ("rows_f64", _wide(norm_rows)),
    "norm_rows_f32": ("rows_f32", norm_rows),
    "attention_kv_f64": ("attention_kv_f64", _wide(attention_kv)),
    "attention_kv_f32": ("attention_kv_f32", attention_kv),
    "attention_kv_8_f32": ("attention_kv_f32", attention_kv_8),
    "kv_write_8": ("kv_write", kv_write_8),
    "rope_kv_write_f64": ("rope_kv_write_f64", _wide(rope_kv_write)),
    "rope_kv_write_f32": ("rope_kv_write_f32", rope_kv_write),
    "rope_kv_write_8_f32": ("rope_kv_write_f32", rope_kv_write_8),
    "gates_f32": ("gates_f32", gates),
}
"""By a name of the case: the function, and what makes its arguments."""
HERE = [case for case, (symbol, _) in CALLS.items() if symbol not in AMX_AWAY]
"""The cases that this processor can run."""


def make(symbol: str, arguments: Arguments, level: int | None = None) -> None:
    """Call a function with arguments in any order."""
    signature = SIGNATURES[native.name_of(symbol)]
    native.call(symbol, *(arguments[name] for name, _ in signature), level=level)
