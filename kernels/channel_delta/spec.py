"""The record of `qpcompile::channel_delta`."""

import torch

from qpcompile.kernels.channel_delta import reference
from qpcompile.kernels.channel_delta.op import OVERLOAD, channel_delta
from qpcompile.kernels.channel_delta.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.channel_delta.onnx import channel_delta

    return OnnxForm(channel_delta)


def _probe(device: torch.device) -> None:
    q, gate = noise(1, 3, 2, 4, device=device), noise(1, 3, 2, device=device).abs()
    channel_delta(q, q, q, -q.abs(), gate, torch.zeros(1, 2, 4, 4, device=device))


SPEC = Spec(OVERLOAD, RULE, _probe, since="captured", differentiable=reference.channel_delta, onnx=_onnx)
