"""The record of `qpcompile::quantization_risk`."""

import torch

from qpcompile.kernels.probe_inputs import choice
from qpcompile.kernels.quantization_risk.op import OVERLOAD, quantization_risk
from qpcompile.kernels.quantization_risk.rule import RULE
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.quantization_risk.onnx import quantization_risk

    return OnnxForm(quantization_risk)


def _probe(device: torch.device) -> None:
    features, counted, _ = choice(device)
    quantization_risk(features, counted, "complex", 4)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
