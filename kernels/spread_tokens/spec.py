"""The record of `qpcompile::spread_tokens`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec
from qpcompile.kernels.spread_tokens.op import OVERLOAD, spread_tokens
from qpcompile.kernels.spread_tokens.rule import RULE


def _onnx() -> OnnxForm:
    from qpcompile.kernels.spread_tokens.onnx import spread_tokens

    return OnnxForm(spread_tokens)


def _probe(device: torch.device) -> None:
    scores = noise(2, 7, device=device)
    spread_tokens(scores, scores > -1, torch.tensor([3, 2], device=device), 0.5)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
