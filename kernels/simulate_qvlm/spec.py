"""The record of `qpcompile::simulate_qvlm`."""

import torch

from qpcompile.kernels.probe_inputs import noise
from qpcompile.kernels.simulate_qvlm.op import OVERLOAD, simulate_qvlm
from qpcompile.kernels.simulate_qvlm.rule import RULE
from qpcompile.kernels.spec import Spec


def _probe(device: torch.device) -> None:
    simulate_qvlm(noise(3, 48, device=device), -torch.ones(48, device=device), torch.ones(48, device=device))


SPEC = Spec(OVERLOAD, RULE, _probe, since="packed")
