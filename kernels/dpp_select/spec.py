"""The record of `qpcompile::dpp_select`."""

import torch

from qpcompile.kernels.dpp_select.op import OVERLOAD, dpp_select
from qpcompile.kernels.dpp_select.rule import RULE
from qpcompile.kernels.probe_inputs import choice
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.dpp_select.onnx import dpp_select

    return OnnxForm(dpp_select)


def _probe(device: torch.device) -> None:
    features, counted, budget = choice(device)
    dpp_select(features, features[..., 0].abs(), counted, budget)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
