"""The record of `qpcompile::kv_read`."""

import torch

from qpcompile.kernels.kv_read.op import OVERLOAD, kv_read
from qpcompile.kernels.kv_read.rule import RULE
from qpcompile.kernels.kv_write.op import kv_write
from qpcompile.kernels.kv_write.reference import BITS
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.kv_read.onnx import kv_read

    return OnnxForm(kv_read)


def _probe(device: torch.device) -> None:
    for bits in BITS:
        codes, affine = kv_write(noise(1, 2, 5, 32, device=device), bits)
        kv_read(codes, affine, 32, bits, torch.float32)


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized", onnx=_onnx)
