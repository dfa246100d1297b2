"""Promise 3 where pictures are read through cross-attention: cut states answer as if a mask hid the dropped ones."""

from __future__ import annotations

import copy
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from qpcompile.capture.capture import capture
from qpcompile.capture.samples import Samples
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import InputError
from qpcompile.ir.program import PREFILL
from qpcompile.pipeline import compile_captured
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.prepare import PICTURES, PROMPT, STATES_OF

OPTIONS: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
OPTIONS |= {"max_new_tokens": 4, "min_new_tokens": 4}
# The mask that hides states, what the states are of, and which parts of the decoder take the mask. The others are in
# tests/zoo.
KINDS = {
    "vision-encoder-decoder": ("encoder_attention_mask", PICTURES, "$"),
    "mllama": ("cross_attention_mask", PICTURES, "$"),
    "t5gemma2": ("encoder_attention_mask", PROMPT, "$"),
    "idefics": ("image_attention_mask", PICTURES, r"gated_cross_attn_layers\.\d+$"),
}


def hidden(argument: str, kept: torch.Tensor) -> Any:
    """A hook that hides all states but those in `kept: i64[B, N]`, -1 for none."""

    def hook(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get(argument)
        count = mask.shape[-1] if mask is not None else kwargs["encoder_hidden_states"].shape[1]
        seen = torch.zeros(len(kept), count + 1, dtype=torch.bool).scatter_(1, kept % (count + 1), True)[:, :-1]
        if mask is not None and mask.ndim == 4:
            new = mask.masked_fill(~seen[:, None, None], torch.finfo(mask.dtype).min)
        else:
            new = seen.long() if mask is None else mask * seen
        return args, kwargs | {argument: new}

    return hook


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_dropped_states_are_never_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent / "zoo"), *sys.path])
    from models import build  # pyright: ignore[reportMissingImports]

    argument, of, parts = KINDS[name]
    model, cases = build(name)
    program = capture(model, copy.deepcopy(cases["one"]), Recipe.load("prune-30").with_overrides(["quality.samples=0"]))
    assert program.graphs[PREFILL].constants[STATES_OF] == of
    compiled = compile_captured(program, None, Samples([cases["one"], cases["longer"]], None, 2, 0))
    decoder = model.get_submodule(program.graphs[PREFILL].owner)
    for case in ("longer", "padded", "pictures"):
        inputs = cases[case]
        kept = compiled.kept_tokens(**inputs)[-1]
        with ExitStack() as hooks:
            for path, module in decoder.named_modules():
                if re.match(parts, path):
                    hook = module.register_forward_pre_hook(hidden(argument, kept), with_kwargs=True)
                    hooks.callback(hook.remove)
            expected = model.generate(**copy.deepcopy(inputs), **OPTIONS)  # type: ignore[operator]
        _same(compiled, inputs, expected)
        if of == PROMPT:
            text = (inputs["input_ids"] != model.config.image_token_id) & inputs["attention_mask"].bool()
            kept_text = [set(text[row].nonzero()[:, 0].tolist()) <= set(kept[row].tolist()) for row in range(len(kept))]
            assert all(kept_text) and kept.shape[1] < inputs["input_ids"].shape[1]
    if of == PROMPT:
        encoded = model.get_encoder()(**cases["one"])
        with pytest.raises(InputError, match="which states of the encoder"):
            compiled.generate(encoder_outputs=encoded, attention_mask=cases["one"]["attention_mask"], max_new_tokens=2)


def _same(compiled: CompiledVLM, inputs: dict[str, torch.Tensor], expected: Any) -> None:
    found = compiled.generate(**inputs, **OPTIONS)
    assert torch.equal(found.sequences, expected.sequences)
    assert float((torch.stack(found.logits) - torch.stack(expected.logits)).abs().max()) < 1e-4
