"""All pruning methods by the name a recipe gives them."""

from __future__ import annotations

from qpcompile.pruning.methods.cdpruner import CdPruner
from qpcompile.pruning.methods.dart import Dart
from qpcompile.pruning.methods.divprune import DivPrune
from qpcompile.pruning.methods.fastv import FastV
from qpcompile.pruning.methods.joint import Joint
from qpcompile.pruning.methods.prumerge import PruMergePlus
from qpcompile.pruning.methods.pyramid_drop import PyramidDrop
from qpcompile.pruning.methods.quota import Quota
from qpcompile.pruning.methods.random_tokens import RandomTokens
from qpcompile.pruning.methods.sparse_vlm import SparseVLM
from qpcompile.pruning.methods.trim import Trim
from qpcompile.pruning.methods.visionzip import VisionZip
from qpcompile.pruning.methods.withdraw import Withdraw
from qpcompile.pruning.pruner import Pruner

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
