"""Read checkpoints whose weights are integer codes: compressed-tensors (4 and 8 bits) and GPTQ (4 bits).

Both are dequantized into the model's own class; the grids of their weights are read once more, so that a compile whose
recipe asks for the same grid takes the codes over. Neither package is needed. What a checkpoint says about the inputs
of linears is not read: the recipe says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.auto_factory import _get_model_class

from qpcompile.capture.checkpoint_files import FULL_PRECISION, quantization, weight_files
from qpcompile.capture.config_sizes import refuse_larger
from qpcompile.errors import ModelError
from qpcompile.quantization.grids import Grid
from qpcompile.quantization.solver import expand
from qpcompile.quantization.words import WORD, unpack_int32

PACKED, CODES, GPTQ = "weight_packed", "weight", "qweight"
# Tensors of a linear beside its codes. Any other of these formats is of a variety that is not read.
PARTS = {
    PACKED: {"weight_scale", "weight_shape"},
    CODES: {"weight_scale"},
    GPTQ: {"scales", "qzeros", "g_idx"},
}
OTHERS = ("weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point", "k_scale")
FEW = 4
"""Rows by which a weight is recognized in the loaded model, whose names may be others."""


@dataclass(frozen=True)
class Stored:
    """One linear in the files: its name there, how its codes are stored, and bits that the names do not say."""

    name: str
    kind: str
    bits: int | None


def load_dequantized(folder: Path, config: Any) -> tuple[Any, Mapping[str, Any]]:
    """(model, transformers' loading report) of a quantized checkpoint, its weights dequantized.

    Raises ModelError for a variety of the format that is not read.
    """
    with Files(folder) as files:
        linears = list(_linears(files, folder))
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        own = {f"{each.name}.{part}" for each in linears for part in (each.kind, *PARTS[each.kind])}
        state = {name: files.tensor(name) for name in files.places if name not in own}
        # transformers would cast codes to weights, without scales.
        if stray := sorted(name for name, tensor in state.items() if tensor.dtype == torch.int8):
            raise _other(f"{stray[0]} is of I8, and nothing says what its codes are", folder)
        for each in linears:
            if f"{each.name}.weight" in state:
                raise _other(f"{each.name} has a weight beside its codes", folder)
            codes, scale = _read(files, each, folder)
            state[f"{each.name}.weight"] = (codes * expand(scale, codes.shape[1])).to(dtype)
    refuse_larger(config, {name: tuple(tensor.shape) for name, tensor in state.items()}, str(folder))
    del config.quantization_config
    made: Any = _get_model_class(config, AutoModelForImageTextToText._model_mapping)
    return made.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)


def grids(source: Any, model: nn.Module) -> dict[str, Grid]:
    """Module name -> grid, of the linears of a model that was loaded from `source`; empty for any other source."""
    folder = Path(source)
    if not folder.is_dir() or quantization(folder) is None:
        return {}
    modules = {_print(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, Grid] = {}
    with Files(folder) as files:
        for each in _linears(files, folder):
            codes, scale = _read(files, each, folder)
            weight = codes[:FEW] * expand(scale, codes.shape[1])[:FEW]
            dtype = next(model.parameters()).dtype
            name = modules.get(_print(weight.to(dtype), rows=len(codes)))
            if name is not None:
                bits = each.bits or _bits(files.tensor(f"{each.name}.{each.kind}"), codes.shape[1])
                found[name] = Grid(scale, bits)
    return found


def _print(weight: torch.Tensor, rows: int | None = None) -> tuple[int, int, bytes]:
    """What recognizes a weight f[N, K]: its shape and first rows."""
    first = weight[:FEW].detach().float().contiguous()
    return rows or len(weight), weight.shape[1], first.numpy().tobytes()


class Files:
    """The safetensors files of a folder, open for one block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> Files:
        for path in weight_files(self.folder):
            file = self._open.enter_context(safe_open(path, framework="pt"))
            self.places |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def tensor(self, name: str) -> torch.Tensor:
        return self.places[name].get_tensor(name)

    def kind(self, name: str) -> str:
        return self.places[name].get_slice(name).get_dtype()


def _linears(files: Files, folder: Path) -> Iterator[Stored]:
    """The quantized linears of the files. Raises ModelError for a variety that is not read."""
    settings = quantization(folder)
    assert settings is not None
    gptq = settings["quant_method"] == "gptq"
    bits = _check_gptq(settings, folder) if gptq else _check_compressed(settings, folder)
    kinds = {GPTQ} if gptq else {PACKED, CODES}
    found = 0
    for name in files.places:
        owner, _, part = name.rpartition(".")
        if part in OTHERS and not gptq:
            raise _other(f"{name} belongs to a variety of compressed-tensors that is not read", folder)
        if part not in kinds or (part == CODES and files.kind(name) != "I8"):
            continue
        if missing := sorted(each for each in PARTS[part] if f"{owner}.{each}" not in files.places):
            raise _other(f"{owner} has no {missing[0]}", folder)
        found += 1
        yield Stored(owner, part, bits if part != PACKED else None)
    if not found:
        raise _other(f"config.json says {settings['quant_method']}, and no weight in the files is stored so", folder)


def _check_compressed(settings: Mapping[str, Any], folder: Path) -> int | None:
    """The bits of unpacked codes. Raises ModelError for all but symmetric integers per channel or group."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    for group in groups:
        weights = group.get("weights") or {}
        form = tuple(weights.get(key) for key in ("type", "symmetric", "strategy"))
        if form[:2] != ("int", True) or form[2] not in ("channel", "group") or weights.get("num_bits") not in (4, 8):
            said = ", ".join(f"{key} {weights.get(key)}" for key in ("num_bits", "type", "symmetric", "strategy"))
            raise _other(f"weights of {said} are not read, only symmetric integers of 4 or 8 bits", folder)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if settings.get(key):
            raise _other(f"its {key} is not read", folder)
    bits = {int(group["weights"]["num_bits"]) for group in groups}
    return bits.pop() if len(bits) == 1 else None


def _check_gptq(settings: Mapping[str, Any], folder: Path) -> int:
    """4. Raises ModelError for act-order, zero points, other bits and other layouts."""
    if settings.get("bits") != 4:
        raise _other(f"GPTQ's weights of {settings.get('bits')} bits are not read, only of 4", folder)
    if settings.get("desc_act"):
        raise _other("act-order (desc_act) puts the inputs of a group in any order, and is not read", folder)
    if not settings.get("sym", True):
        raise _other("GPTQ's zero points (sym: false) are not read: no kernel takes them", folder)
    if settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        raise _other(f"GPTQ's layout {settings['checkpoint_format']!s:.40} is not read", folder)
    return 4


def _read(files: Files, each: Stored, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """codes: i8[N, K], scale: f32[N, G] of one linear."""
    if each.kind == GPTQ:
        return _read_gptq(files, each, folder)
    scale = files.tensor(f"{each.name}.weight_scale").float()
    codes = files.tensor(f"{each.name}.{each.kind}")
    if each.kind == PACKED:
        rows, columns = (int(size) for size in files.tensor(f"{each.name}.weight_shape").tolist())
        bits = _bits(codes, columns)
        if codes.dtype != torch.int32 or codes.shape != (rows, -(-columns * bits // WORD)):
            raise _other(f"{each.name} is not packed as its shape says", folder)
        codes = unpack_int32(codes, bits, columns)
    if scale.ndim != 2 or len(scale) != len(codes) or not scale.shape[1] or codes.shape[1] % scale.shape[1]:
        raise _other(f"the scales of {each.name} are {list(scale.shape)}, its weight is {list(codes.shape)}", folder)
    return codes, scale


def _read_gptq(files: Files, each: Stored, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    words, zeros, order = (files.tensor(f"{each.name}.{part}") for part in (GPTQ, "qzeros", "g_idx"))
    scale = files.tensor(f"{each.name}.scales").float().T.contiguous()
    codes = unpack_int32(words.T.contiguous(), 4, words.shape[0] * WORD // 4)
    if len(scale) != len(codes) or len(order) != codes.shape[1] or codes.shape[1] % scale.shape[1]:
        raise _other(f"the tensors of {each.name} contradict each other", folder)
    if not torch.equal(order.long(), torch.arange(len(order)) // (len(order) // scale.shape[1])):
        raise _other(f"{each.name} has act-order (g_idx), which is not read", folder)
    # Zeros are stored less one; the second layout stores them as they are.
    wanted = 0x88888888 if (quantization(folder) or {}).get("checkpoint_format") == "gptq_v2" else 0x77777777
    if not (zeros.long() & 0xFFFFFFFF == wanted).all():
        raise _other(f"{each.name} has zero points (qzeros), which no kernel takes", folder)
    return codes, scale


def _bits(stored: torch.Tensor, columns: int) -> int:
    """The bits of packed codes, by the width of a row; of unpacked ones, by their range."""
    if stored.dtype == torch.int32:
        return 4 if stored.shape[-1] == -(-columns * 4 // WORD) else 8
    return 4 if int(stored.amin()) >= -8 and int(stored.amax()) <= 7 else 8


def _other(what: str, folder: Path) -> ModelError:
    return ModelError(f"the checkpoint is quantized already: {what}", where=str(folder), do=FULL_PRECISION)
