"""The record of `qpcompile::kv4_read`."""

import torch

from qpcompile.kernels.kv4_read.op import OVERLOAD, kv4_read
from qpcompile.kernels.kv4_read.rule import RULE
from qpcompile.kernels.kv4_write.op import kv4_write
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.kv4_read.onnx import kv4_read

    return OnnxForm(kv4_read)


def _probe(device: torch.device) -> None:
    codes, affine = kv4_write(noise(1, 2, 5, 32, device=device))
    kv4_read(codes, affine, 32, torch.float32)


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized", onnx=_onnx)
