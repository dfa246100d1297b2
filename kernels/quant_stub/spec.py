"""The record of `qpcompile::quant_stub`."""

import torch
from torch import Tensor

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.quant_stub.op import OVERLOAD, quant_stub
from qpcompile.kernels.quant_stub.rule import RULE
from qpcompile.kernels.spec import Spec


def _identity(x: Tensor) -> Tensor:
    return x


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    x = noise(3, 8, device=device)
    return quant_stub(x), x


SPEC = Spec(OVERLOAD, RULE, _probe, since="stubbed", until="packed", differentiable=_identity)
