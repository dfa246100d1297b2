"""The record of `qpcompile::select_tokens`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.select_tokens.op import OVERLOAD, select_tokens
from qpcompile.kernels.select_tokens.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.select_tokens.onnx import select_tokens

    return OnnxForm(select_tokens)


def _probe(device: torch.device) -> None:
    select_tokens(noise(2, 7, device=device), 3, torch.tensor([3, 2], device=device))


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
