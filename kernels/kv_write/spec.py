"""The record of `qpcompile::kv_write`."""

import torch

from qpcompile.kernels.kv_write import cpu
from qpcompile.kernels.kv_write.op import OVERLOAD, kv_write
from qpcompile.kernels.kv_write.reference import BITS
from qpcompile.kernels.kv_write.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.kv_write.onnx import kv_write

    return OnnxForm(kv_write)


def _probe(device: torch.device) -> None:
    for bits in BITS:
        kv_write(noise(1, 2, 5, 32, device=device), bits)


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized", cpu=cpu.kv_write, taped=True, onnx=_onnx)
