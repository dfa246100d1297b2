"""Probes: one small call of every operator, to test whether it runs on a device of this machine."""

from __future__ import annotations

import torch

from qpcompile.ir.operators import SPECS
from qpcompile.kernels.spec import Probe

PROBES: dict[str, Probe] = {spec.name: spec.probe for spec in SPECS}


def probe(name: str, device: torch.device) -> str:
    """Run one operator; returns the empty string on success, otherwise the problem."""
    try:
        with torch.no_grad():
            pair = PROBES[name](device)
    except Exception as error:  # noqa: BLE001 any error of a compiler or driver has to be reported
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if pair is not None and not torch.equal(*pair):
        return "runs, but its result differs from the reference: report this processor"
    return ""
