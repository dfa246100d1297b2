"""The record of `qpcompile::simulate_kivi`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.simulate_kivi.op import OVERLOAD, simulate_kivi
from qpcompile.kernels.simulate_kivi.rule import RULE
from qpcompile.kernels.spec import Spec


def _probe(device: torch.device) -> None:
    simulate_kivi(noise(1, 2, 5, 32, device=device), 15, True)


SPEC = Spec(OVERLOAD, RULE, _probe, since="quantized")
