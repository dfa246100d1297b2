"""The record of `qpcompile::text_relevance`."""

import torch

from qpcompile.kernels.probe_inputs import choice
from qpcompile.kernels.spec import OnnxForm, Spec
from qpcompile.kernels.text_relevance.op import OVERLOAD, text_relevance
from qpcompile.kernels.text_relevance.rule import RULE


def _onnx() -> OnnxForm:
    from qpcompile.kernels.text_relevance.onnx import text_relevance

    return OnnxForm(text_relevance)


def _probe(device: torch.device) -> None:
    features, counted, _ = choice(device)
    text_relevance(features, counted, torch.ones_like(counted), 1)


SPEC = Spec(OVERLOAD, RULE, _probe, since="cut", onnx=_onnx)
