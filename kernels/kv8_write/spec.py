"""The record of `qpcompile::kv8_write`."""

import torch

from qpcompile.kernels.kv8_write.op import OVERLOAD, kv8_write
from qpcompile.kernels.kv8_write.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.kv8_write.onnx import kv8_write

    return OnnxForm(kv8_write)


def _probe(device: torch.device) -> None:
    kv8_write(noise(1, 2, 5, 32, device=device))


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized", onnx=_onnx)
