"""Methods that read the vision tower, in every family: it is read, or the compile is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from programs import changed_recipe

from qpcompile.capture.capture import capture
from qpcompile.errors import PlanError
from qpcompile.ir.pass_manager import run_passes
from qpcompile.pass_list import passes
from qpcompile.pruning.pruner import INPUT
from qpcompile.runtime.machine import Machine

ON_THE_HOST = "does more with patches"
REFUSED = {
    "llava_next": ON_THE_HOST,
    "llava_onevision": ON_THE_HOST,
    "internvl": ON_THE_HOST,
    "mistral3": ON_THE_HOST,
    "smolvlm": "cannot be traced",
    "idefics3": "cannot be traced",
    "gemma3": "cannot be traced",
}


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.parametrize("method", ["visionzip", "prumerge_plus"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_tower_is_read_or_refused(name: str, method: str) -> None:
    model, cases = FAMILIES[name]()
    recipe = changed_recipe("none", f"tokens.method={method}", "tokens.keep=0.4", "tokens.spread_share=0.5")
    program = capture(model, cases["one"], recipe)
    if name in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[name]):
            run_passes(program, passes((), 0))
        return
    run_passes(program, passes((), 0))
    machine = Machine(program)
    for inputs in cases.values():
        cache = machine.prefill(dict(inputs))
        alive = cache.alive[INPUT].sum(dim=1)
        visual = torch.isin(inputs["input_ids"], torch.tensor([program.host.config.image_token_id]))  # type: ignore[union-attr]
        text = inputs["attention_mask"].bool() & ~visual
        assert alive.tolist() == [
            int(words) - int(-2 * own // 5) for words, own in zip(text.sum(1), visual.sum(1), strict=True)
        ]
