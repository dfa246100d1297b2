"""The record of `qpcompile::farthest_tokens`."""

import torch

from qpcompile.kernels.farthest_tokens.op import OVERLOAD, farthest_tokens
from qpcompile.kernels.farthest_tokens.rule import RULE
from qpcompile.kernels.probe_inputs import choice
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.farthest_tokens.onnx import farthest_tokens

    return OnnxForm(farthest_tokens)


def _probe(device: torch.device) -> None:
    farthest_tokens(*choice(device))


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
