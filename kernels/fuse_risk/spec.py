"""The record of `qpcompile::fuse_risk`."""

import torch

from qpcompile.kernels.fuse_risk.op import OVERLOAD, fuse_risk
from qpcompile.kernels.fuse_risk.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.fuse_risk.onnx import fuse_risk

    return OnnxForm(fuse_risk)


def _probe(device: torch.device) -> None:
    scores = noise(2, 7, device=device)
    fuse_risk(scores, scores.abs(), scores > -1, 0.55, True, True)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
