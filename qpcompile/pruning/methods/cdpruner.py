"""CDPruner: select by relevance to the question and diversity. QAPruner: and by quantization risk.

    r_i   text_relevance; QAPruner: a r_i + (1 - a) risk_i
    L     diag(r) S diag(r), S the cosines of the visual embeddings
    keep  greedy MAP of the determinantal point process L: dpp_select

Sources: CDPruner (arXiv 2506.10967), section 3; QAPruner (arXiv 2604.02816), section 3, with the fusion of its code,
into the relevance rather than into a final score. The cosine with the question is a substitute for CLIP's, see
kernels/text_relevance; all pictures of a prompt form one set.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpcompile.ir.operators import DPP_SELECT
from qpcompile.pruning.before_decoder import BeforeDecoder, counted_tokens, text_relevance
from qpcompile.pruning.pruner import Point, Pruner
from qpcompile.pruning.risk import fuse_risk


@dataclass(frozen=True)
class CdPruner(BeforeDecoder):
    """See the module's docstring. `risk`: QAPruner."""

    risk: bool = False

    def scores(self, point: Point) -> fx.Node:
        """Earlier picks are higher."""
        relevance = text_relevance(point)
        if self.risk:
            relevance = fuse_risk(point, relevance, minmax=False)
        budget = point.share(point.visual)
        return point.only_visual(point.call(DPP_SELECT, point.hidden(), relevance, counted_tokens(point), budget))


METHODS: dict[str, Pruner] = {"cdpruner": CdPruner(), "qapruner": CdPruner(risk=True)}
