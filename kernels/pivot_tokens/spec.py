"""The record of `qpcompile::pivot_tokens`."""

import torch

from qpcompile.kernels.pivot_tokens.op import OVERLOAD, pivot_tokens
from qpcompile.kernels.pivot_tokens.rule import RULE
from qpcompile.kernels.probe_inputs import choice
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.pivot_tokens.onnx import pivot_tokens

    return OnnxForm(pivot_tokens)


def _probe(device: torch.device) -> None:
    features, counted, budget = choice(device)
    pivot_tokens(features, features[:, None], counted, counted, budget, 2, 1)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
