"""One small call of every operator, to see whether it runs on a device of this machine."""

from __future__ import annotations

import torch

from qpcompile.ir.operators import SPECS
from qpcompile.kernels.spec import Probe

PROBES: dict[str, Probe] = {spec.name: spec.probe for spec in SPECS}


def probe(name: str, device: torch.device) -> str:
    """Run one operator; the empty text if that went well, otherwise what went wrong."""
    try:
        with torch.no_grad():
            pair = PROBES[name](device)
    except Exception as error:  # noqa: BLE001 whatever a compiler or a driver throws is what has to be shown
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if pair is not None and not torch.equal(*pair):
        return "runs, but its result differs from the reference: report this processor"
    return ""
