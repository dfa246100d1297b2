"""The record of `qpcompile::attention_received`."""

import torch

from qpcompile.kernels.attention_received.op import OVERLOAD, attention_received
from qpcompile.kernels.attention_received.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.attention_received.onnx import attention_received

    return OnnxForm(attention_received)


def _probe(device: torch.device) -> None:
    q = noise(1, 4, 7, 12, device=device)
    attention_received(q, q, torch.tensor([0, 3, 7], device=device), 0.3, False)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
