"""All pruning methods by the name a recipe gives them."""

from __future__ import annotations

from qpcompile.ir.pruners.pruner import Pruner
from qpcompile.ir.pruners.quota import Quota
from qpcompile.ir.pruners.random_tokens import RandomTokens

PRUNERS: dict[str, Pruner] = {
    # In the decoder, behind the layers of a schedule.
    "quota": Quota(),
    "random": RandomTokens(),
    # Before the decoder.
    "random_input": RandomTokens(before_decoder=True),
}
