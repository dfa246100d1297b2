"""The host: the transformers model stripped of the weights that the graphs hold.

The code between the graphs (inserting picture features into the embeddings, position ids, the generation loop) remains
transformers' own. The host is that code on an empty copy of the model: weights of graphs become zero-sized, the others
(embeddings, separators between picture tiles) are shared with the original.
"""

# pyright: reportPrivateUsage=false
# torch has no public name for a module's own tables of tensors.

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from qpcompile.ir.edit import get_tensor


def empty_host(model_class: type[PreTrainedModel], config: object) -> PreTrainedModel:
    """A model of the given class whose tensors take no memory."""
    untyped: Any = model_class  # transformers gives `_from_config` no types
    with torch.device("meta"):
        host: PreTrainedModel = untyped._from_config(copy.deepcopy(config))
    return host.eval()


def host_tensors(model: torch.nn.Module, held: set[str]) -> dict[str, torch.Tensor]:
    """The tensors that the host needs: every parameter and buffer of `model` whose dotted name is not in `held`."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return {name: get_tensor(model, name).detach() for name in names if name not in held}


def _modules(root: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules by dotted name; torch's own method loses their type in its recursion."""
    return root.named_modules()


def fill_host(host: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Set the host's own tensors; all others become empty, so that `.dtype` and `.device` are the model's."""
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    for module_name, module in _modules(host):
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = tensors.get(prefix + name, torch.empty(0, dtype=dtype, device=device))
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                empty = torch.empty(0, dtype=buffer.dtype, device=device)
                module._buffers[name] = tensors.get(prefix + name, empty)
    return host
