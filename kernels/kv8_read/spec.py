"""The record of `qpcompile::kv8_read`."""

import torch

from qpcompile.kernels.kv8_read.op import OVERLOAD, kv8_read
from qpcompile.kernels.kv8_read.rule import RULE
from qpcompile.kernels.kv8_write.op import kv8_write
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.kv8_read.onnx import kv8_read

    return OnnxForm(kv8_read)


def _probe(device: torch.device) -> None:
    codes, affine = kv8_write(noise(1, 2, 5, 32, device=device))
    kv8_read(codes, affine, torch.float32)


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized", onnx=_onnx)
