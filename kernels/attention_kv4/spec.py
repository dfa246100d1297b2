"""The record of `qpcompile::attention_kv4`."""

import torch

from qpcompile.kernels.attention_kv4 import cpu
from qpcompile.kernels.attention_kv4.op import OVERLOAD, attention_kv4
from qpcompile.kernels.attention_kv4.rule import RULE
from qpcompile.kernels.kv4_write.op import kv4_write
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.attention_kv4.onnx import attention_kv4

    return OnnxForm(attention_kv4)


def _probe(device: torch.device) -> None:
    q, cache = noise(1, 4, 3, 32, device=device), noise(1, 2, 5, 32, device=device)
    codes, affine = kv4_write(cache)
    attention_kv4(q, codes, affine, codes, affine, None, 0.2)


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized", cpu=cpu.attention_kv4, taped=True, onnx=_onnx)
