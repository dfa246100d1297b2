"""The record of `qpcompile::merge_tokens`."""

import torch

from qpcompile.kernels.merge_tokens.op import OVERLOAD, merge_tokens
from qpcompile.kernels.merge_tokens.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.merge_tokens.onnx import merge_tokens

    return OnnxForm(merge_tokens)


def _probe(device: torch.device) -> None:
    hidden, flags = noise(1, 6, 8, device=device), torch.arange(6, device=device)[None] < 2
    merge_tokens(hidden, hidden, hidden[..., 0], flags, ~flags, 0)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
