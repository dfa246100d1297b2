"""The record of `qpcompile::hadamard`."""

import torch

from qpcompile.kernels.hadamard import cpu, reference
from qpcompile.kernels.hadamard.op import OVERLOAD, hadamard
from qpcompile.kernels.hadamard.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.hadamard.onnx import hadamard

    return OnnxForm(hadamard)


def _probe(device: torch.device) -> None:
    hadamard(noise(3, 48, device=device), None)


SPEC = Spec(
    OVERLOAD, RULE, _probe, since="transformed", cpu=cpu.hadamard, differentiable=reference.hadamard, onnx=_onnx
)
