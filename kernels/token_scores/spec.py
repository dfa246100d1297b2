"""The record of `qpcompile::token_scores`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec
from qpcompile.kernels.token_scores.op import OVERLOAD, token_scores
from qpcompile.kernels.token_scores.rule import RULE


def _onnx() -> OnnxForm:
    from qpcompile.kernels.token_scores.onnx import token_scores

    return OnnxForm(token_scores)


def _probe(device: torch.device) -> None:
    hidden, q = noise(1, 6, 48, device=device), noise(1, 4, 6, 12, device=device)
    valid = torch.ones(1, 6, dtype=torch.bool, device=device)
    visual = valid & (torch.arange(6, device=device) < 4)
    settings = ([0.45, 0.25, 0.1, 0.2], "percentile", 1.0, 99.0, False, False, 0, 1.0, 4, False, 0.0)
    token_scores(hidden, hidden, q, q, None, 0.3, visual, valid, ~visual, *settings)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
