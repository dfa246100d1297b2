"""The record of `qpcompile::kv4_write`."""

import torch

from qpcompile.kernels.kv4_write import cpu
from qpcompile.kernels.kv4_write.op import OVERLOAD, kv4_write
from qpcompile.kernels.kv4_write.rule import RULE
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.kv4_write.onnx import kv4_write

    return OnnxForm(kv4_write)


def _probe(device: torch.device) -> None:
    kv4_write(noise(1, 2, 5, 32, device=device))


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized", cpu=cpu.kv4_write, taped=True, onnx=_onnx)
