"""Write a compiled model as a checkpoint of the format compressed-tensors, which other runtimes read.

    config.json (quantization_config)  generation_config.json  processor and tokenizer files
    model.safetensors, or shards with an index       weight_packed, weight_scale, weight_shape of each quantized linear
    README.md                                        how it is loaded, and what it is

Nothing here imports the package compressed-tensors: readers do. Before the folder appears, the model's class answers a
prompt with the weights that were written, and its logits are compared with the compiled model's.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qpcompile.emit.artifact.settings import CONFIG, leave_out_leads
from qpcompile.emit.compressed.packing import MIXED, PACKED, Scheme, stored
from qpcompile.emit.compressed.recipes import FORMAT, refuse_recipe
from qpcompile.emit.compressed.tensors import Tensors, read_tensors
from qpcompile.errors import ExportError
from qpcompile.files import staged_folder
from qpcompile.ir.program import Program
from qpcompile.kernels.quantize_dynamic.reference import dequantize, quantize_dynamic
from qpcompile.runtime.host import empty_host

_LOG = logging.getLogger("qpcompile")
# Largest distance of logits from the compiled model's, of their spread: in float32, with 8-bit inputs, whose codes flip
# with the last bit, and where types of 16 bits round.
EXACT, ROUNDED, HALF = 1e-4, 5e-2, 0.1
NAMED = 3
README = """# {name}, quantized

A `{name}` whose weights qpcompile quantized: {schemes}. The format is compressed-tensors.

```python
from transformers import {imports}  # pip install transformers compressed-tensors

model = AutoModelForImageTextToText.from_pretrained("."{whole})
processor = AutoProcessor.from_pretrained(".")
```

{why}vLLM and SGLang read the same format.

On one prompt the logits of `{name}` with these weights differ from the compiled model's by {distance:.1e} of their
spread.{unread}
"""


def export_compressed_tensors(
    program: Program,
    processor: Any,
    folder: str | PathLike[str],
    inputs: Mapping[str, Any],
    logits: Callable[..., torch.Tensor],
) -> None:
    """Write the checkpoint folder atomically.

    Args:
        inputs: a prompt on which the written weights are compared with the compiled model.
        logits: of the compiled model: inputs -> f[B, 1, vocabulary], the next token's.

    Raises ExportError for a recipe that the format cannot hold, with the nearest that it can, and for a model whose
    class would not compute the same with these weights; OutputError if `folder` exists.
    """
    refuse_recipe(program.recipe)
    host: Any = program.host
    # A model that was cast has another type than its configuration says; the folder's is that of its tensors.
    model = empty_host(type(host), host.config).to(host.dtype)
    found = read_tensors(program, model)
    if not found.codes:
        raise ExportError("no linear of this model is quantized", where=type(host).__name__, do="compile with w4a16")
    distance = _distance(found, program, inputs, logits)
    if refused := whole_only(found, model):
        _LOG.warning("transformers loads this folder with CompressedTensorsConfig(dequantize=True) only: %s", refused)
    with staged_folder(folder, needed=_size(found)) as out:
        model.generation_config = copy.deepcopy(host.generation_config)
        model.save_pretrained(out, state_dict=_state(found))
        _write_config(out / CONFIG, quantization_config(found, model))
        if processor is not None:
            processor.save_pretrained(out)
        leave_out_leads(out)
        (out / "README.md").write_text(_readme(found, type(host).__name__, distance, refused), encoding="utf-8")


def quantization_config(found: Tensors, model: PreTrainedModel) -> dict[str, Any]:
    """The entry of config.json. The scheme of most linears has the target `Linear`, others the names of theirs."""
    counts = Counter(codes.scheme for codes in found.codes.values())
    schemes = sorted(counts, key=lambda scheme: (-counts[scheme], str(scheme)))
    groups: dict[str, Any] = {}
    for place, scheme in enumerate(schemes):
        names = [site for site, codes in found.codes.items() if codes.scheme == scheme] if place else []
        groups[f"group_{place}"] = scheme.to_dict(_both(names, model) if place else ["Linear"])
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    formats = {scheme.format for scheme in schemes}
    return {
        "quant_method": FORMAT,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": _both([name for name in linears if name not in found.codes], model),
        "config_groups": groups,
    }


def whole_only(found: Tensors, model: PreTrainedModel) -> str:
    """Why transformers cannot hold the packed codes of this model; empty if it can.

    It initializes all modules before it reads them; some classes expect a weight in every linear, and packed ones have
    none.
    """
    bare = nn.Linear(1, 1)
    del bare.weight
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    for site, codes in found.codes.items():
        owner = max((name for name in parts if f"{site}.".startswith(f"{name}." if name else "")), key=len)
        try:
            if codes.scheme.format == PACKED:
                parts[owner]._init_weights(bare)
        except AttributeError:
            return f"{type(parts[owner]).__name__} initializes the weight of a linear that has none"
    return ""


def _both(names: list[str], model: PreTrainedModel) -> list[str]:
    """Names of modules as transformers has them, and as the checkpoint has them: readers compare with either."""
    own = model.state_dict()
    stored_names = [
        key.removesuffix(".weight")
        for name in names
        for key in revert_weight_conversion(model, {f"{name}.weight": own[f"{name}.weight"]})
    ]
    return sorted({*names, *stored_names})


def _state(found: Tensors) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by its name in the model."""
    state = {**found.plain, **found.unread}
    for site, codes in found.codes.items():
        state |= {f"{site}.{part}": each for part, each in stored(codes.codes, codes.scale, codes.scheme).items()}
    return state


def _size(found: Tensors) -> int:
    """Bytes of all tensors of the checkpoint."""
    plain = sum(tensor.nbytes for tensor in (*found.plain.values(), *found.unread.values()))
    return plain + sum(
        each.codes.numel() * each.scheme.weight_bits // 8 + each.scale.nbytes for each in found.codes.values()
    )


def _write_config(path: Path, quantization: dict[str, Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["quantization_config"] = quantization
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def _distance(
    found: Tensors, program: Program, inputs: Mapping[str, Any], logits: Callable[..., torch.Tensor]
) -> float:
    """How far the class's logits with these weights are from the compiled model's, as a share of their spread."""
    host: Any = program.host
    state = {**found.plain, **found.unread}
    state |= {f"{site}.weight": codes.weight(host.dtype) for site, codes in found.codes.items()}
    config = copy.deepcopy(host.config)
    model: Any = type(host).from_pretrained(None, config=config, state_dict=state, dtype=host.dtype).eval()
    clip = 1.0 if program.recipe.quantize is None else program.recipe.quantize.activations.clip_ratio
    for site, codes in found.codes.items():
        if codes.scheme.input_bits != 16:
            model.get_submodule(site).register_forward_pre_hook(_rounding(codes.scheme, clip))
    with torch.no_grad():
        expected, own = logits(**copy.deepcopy(dict(inputs))).float(), model(**inputs).logits[:, -1:].float()
    spread = expected - expected.mean(dim=-1, keepdim=True)
    far = float((own - expected).norm() / spread.norm().clamp(min=1e-30))
    most = HALF if host.dtype != torch.float32 else ROUNDED if _rounds(found) else EXACT
    if not far <= most:
        raise ExportError(
            f"{type(host).__name__} with these weights does not compute what the compiled model does: its logits are "
            f"{far:.2g} of their spread off",
            where=f"tensors written as zeros: {len(found.unread)}",
            do="use the compiled model or its artifact, and report this family",
        )
    return far


def _rounds(found: Tensors) -> bool:
    return any(codes.scheme.input_bits != 16 for codes in found.codes.values())


def _rounding(scheme: Scheme, clip: float) -> Callable[..., Any]:
    """A hook that rounds the input of a linear as its reader will."""

    def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = arguments
        return dequantize(*quantize_dynamic(x, 0, clip, scheme.input_bits)).to(x.dtype), *rest

    return hook


def _readme(found: Tensors, name: str, distance: float, refused: str) -> str:
    counts = Counter(codes.scheme for codes in found.codes.values())
    schemes = "; ".join(f"{count} linears with {_described(scheme)}" for scheme, count in counts.most_common())
    named = ", ".join([*found.unread][:NAMED]) + (", ..." if len(found.unread) > NAMED else "")
    unread = f"\n\nNo answer depends on {len(found.unread)} tensors, which are zeros: {named}." if found.unread else ""
    imports = ["AutoModelForImageTextToText", "AutoProcessor", *(["CompressedTensorsConfig"] if refused else [])]
    return README.format(
        name=name,
        schemes=schemes,
        imports=", ".join(imports),
        whole=", quantization_config=CompressedTensorsConfig(dequantize=True)" if refused else "",
        why=f"transformers cannot hold the packed codes: {refused}.\n\n" if refused else "",
        distance=distance,
        unread=unread,
    )


def _described(scheme: Scheme) -> str:
    per = f"{scheme.group_size} inputs" if scheme.group_size else "output channel"
    inputs = "" if scheme.input_bits == 16 else f", inputs rounded to {scheme.input_bits} bits per token"
    return f"{scheme.weight_bits}-bit weights, one scale per {per}{inputs}"
