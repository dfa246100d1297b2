"""All pruning methods by the name a recipe gives them."""

from __future__ import annotations

from qpcompile.ir.pruners.cdpruner import CdPruner
from qpcompile.ir.pruners.dart import Dart
from qpcompile.ir.pruners.divprune import DivPrune
from qpcompile.ir.pruners.fastv import FastV
from qpcompile.ir.pruners.joint import Joint
from qpcompile.ir.pruners.prumerge import PruMergePlus
from qpcompile.ir.pruners.pruner import Pruner
from qpcompile.ir.pruners.pyramid_drop import PyramidDrop
from qpcompile.ir.pruners.quota import Quota
from qpcompile.ir.pruners.random_tokens import RandomTokens
from qpcompile.ir.pruners.sparse_vlm import SparseVLM
from qpcompile.ir.pruners.trim import Trim
from qpcompile.ir.pruners.visionzip import VisionZip
from qpcompile.ir.pruners.withdraw import Withdraw

PRUNERS: dict[str, Pruner] = {
    # In the decoder, behind the layers of a schedule.
    "quota": Quota(),
    "random": RandomTokens(),
    "fastv": FastV(),
    "pyramiddrop": PyramidDrop(),
    "sparsevlm": SparseVLM(),
    "vtw": Withdraw(),
    "dart": Dart(),
    # Both.
    "joint": Joint(),
    # Before the decoder.
    "random_input": RandomTokens(before_decoder=True),
    "visionzip": VisionZip(),
    "prumerge_plus": PruMergePlus(),
    "cdpruner": CdPruner(),
    "qapruner": CdPruner(risk=True),
    "divprune": DivPrune(),
    "trim": Trim(),
}
