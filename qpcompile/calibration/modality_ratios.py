"""Loss sensitivity of visual against text tokens, at the output of each linear.

    g = mean |dL / dY| over visual and over text tokens        rho = max(g_visual / g_text, its median over linears)

L is the cross-entropy of the model's own greedy next token, so that samples need no answers.

Source: "MBQ" (arXiv 2412.19509), section 3.2, which takes the gradients of a reference answer at the outputs of each
layer's attention and MLP; here they are taken at each linear's own output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from qpcompile.calibration.blocks import run_nodes
from qpcompile.ir.edit import aten, is_call
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import EXPERT_LINEAR, QUANT_STUB
from qpcompile.ir.program import Graph
from qpcompile.runtime.placement import Placement

Found = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""The sum and count of one sample, f[2], at visual and at text tokens, by site."""


@dataclass
class ModalityGradients:
    """Sums of |dL / dY| over tokens and channels, and their counts, per site and modality."""

    visual: dict[str, torch.Tensor] = field(default_factory=dict)
    text: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def measure(
        prefill: Graph,
        head: Graph | None,
        feeds: dict[str, torch.Tensor],
        visual: torch.Tensor,
        valid: torch.Tensor,
        on: Placement,
    ) -> Found:
        """One sample. visual, valid: bool[B, S], which tokens are visual, and which are not padding.

        The backward pass reads all weights: on an accelerator the whole decoder must fit.
        """
        visual, valid = on.there((visual, valid))
        outputs: dict[str, torch.Tensor] = {}

        def look(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
            source = node.args[0] if is_call(node, aten.linear.default, EXPERT_LINEAR) else None
            if is_call(source, QUANT_STUB) and (fact := stub_fact(source)) is not None:
                value.retain_grad()
                outputs[fact.site] = value
            return value

        with torch.enable_grad():
            given = {name: feed.detach() for name, feed in feeds.items()}
            given["inputs_embeds"].requires_grad_()
            result = next(iter(run_nodes(prefill, given, on, look).values()))
            if head is not None:
                (name,) = head.inputs
                result = next(iter(run_nodes(head, {name: result[:, -1:]}, on, None).values()))
            scores = result[:, -1].float()
            torch.nn.functional.cross_entropy(scores, scores.detach().argmax(dim=-1)).backward()
        found: Found = {}
        for site, output in outputs.items():
            # Of experts: f[B S, J, O].
            tokens = output.shape[:2] == visual.shape or len(output) == visual.numel()
            if output.grad is None or not tokens:
                continue
            size = output.grad.abs().reshape(*visual.shape, -1).mean(dim=-1)
            own, other = (
                on.back(torch.stack([size[chosen].sum(), chosen.sum().to(size.dtype)]))
                for chosen in (visual & valid, valid & ~visual)
            )
            found[site] = own, other
        return found

    def add(self, found: Found) -> None:
        """Add what was measured on one sample."""
        for site, parts in found.items():
            for sums, part in zip((self.visual, self.text), parts, strict=True):
                sums[site] = sums.get(site, torch.zeros_like(part)) + part

    def ratios(self) -> dict[str, float]:
        """rho per site."""
        raw = {
            site: float((self.visual[site][0] / self.visual[site][1]) / (text[0] / text[1]).clamp(min=1e-30))
            for site, text in self.text.items()
            if self.visual[site][1] > 0 and text[1] > 0
        }
        if not raw:
            return {}
        middle = float(torch.tensor(list(raw.values())).median())
        return {site: max(ratio, middle) for site, ratio in raw.items()}
