"""The record of `qpcompile::attention_kv`."""

import torch

from qpcompile.kernels.attention_kv import cpu
from qpcompile.kernels.attention_kv.op import OVERLOAD, attention_kv
from qpcompile.kernels.attention_kv.rule import RULE
from qpcompile.kernels.kv_write.op import kv_write
from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.spec import OnnxForm, Spec


def _onnx() -> OnnxForm:
    from qpcompile.kernels.attention_kv.onnx import attention_kv

    return OnnxForm(attention_kv)


def _probe(device: torch.device) -> None:
    q, cache = noise(1, 4, 3, 32, device=device), noise(1, 2, 5, 32, device=device)
    # Keys matter more than values: theirs may have more bits.
    attention_kv(q, *kv_write(cache, 4), *kv_write(cache, 4), None, 0.2, 4, 4)
    attention_kv(q, *kv_write(cache, 8), *kv_write(cache, 4), None, 0.2, 8, 4)


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized", cpu=cpu.attention_kv, taped=True, onnx=_onnx)
