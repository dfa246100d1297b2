"""The record of `qpcompile::gated_delta`."""

import torch

from qpcompile.kernels.gated_delta import reference
from qpcompile.kernels.gated_delta.op import OVERLOAD, gated_delta
from qpcompile.kernels.gated_delta.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.gated_delta.onnx import gated_delta

    return OnnxForm(gated_delta)


def _probe(device: torch.device) -> None:
    q, gate = noise(1, 3, 2, 4, device=device), noise(1, 3, 2, device=device)
    gated_delta(q, q, q, -gate.abs(), gate.abs(), torch.zeros(1, 2, 4, 4, device=device))


SPEC = Spec(OVERLOAD, RULE, _probe, since="captured", differentiable=reference.gated_delta, onnx=_onnx)
