"""What training will take, in words: told when the first steps of the first block of a graph have been measured.

The layers of a graph cost the same. Graphs whose turn comes later are estimated from how long all their batches took in
full precision:

    seconds = epochs * forward of the graph * (steps of an epoch / forward of the measured block)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from qpcompile.recipe.quantize import TrainingScheme

_LOG = logging.getLogger("qpcompile")
# Less than this is not worth another choice.
_LONG = 60.0


@dataclass
class TrainingTime:
    """See the module's docstring. forward: seconds of all batches in full precision, by the graph they run through."""

    options: TrainingScheme
    forward: dict[str, float] = field(default_factory=dict[str, float])

    def add_forward(self, graph: str, seconds: float) -> None:
        """Count one batch that has run through a graph."""
        self.forward[graph] = self.forward.get(graph, 0.0) + seconds

    def tell(self, graph: str, blocks: int, batches: int, step: float, forward: float) -> None:
        """Log what `blocks` of a graph take, and the graphs after it, once for each graph.

        step: seconds of one step of its first block; forward: seconds of all batches through that block.
        """
        if graph not in self.forward:
            return
        del self.forward[graph]
        block = self.options.epochs * batches * step
        text = f"train {graph}: about {words(block)} a block, {words(blocks * block)} for {blocks}"
        total = blocks * block
        if self.forward:
            total += self.options.epochs * sum(self.forward.values()) * batches * step / max(forward, 1e-9)
            text += f", {words(total)} with {', '.join(self.forward)}"
        _LOG.info("%s%s", text, self._choices() if total > _LONG else "")

    def _choices(self) -> str:
        epochs, samples = self.options.epochs, self.options.samples
        return (
            f"\n  faster: quantize.transform=hadamard trains nothing; time is proportional to quantize.training.epochs "
            f"({epochs}) and quantize.training.samples ({samples}); --device names an accelerator"
        )


def words(seconds: float) -> str:
    """A duration, to two digits."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
