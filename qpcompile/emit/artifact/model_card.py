"""The model card (README.md) of an artifact folder."""

from __future__ import annotations

from collections import Counter

from qpcompile.ir.program import Program
from qpcompile.quality.choice_table import HEADS, how_chosen, price_rows
from qpcompile.quality.verdict import increments, verdict
from qpcompile.recipe.bits_told import told_bits
from qpcompile.recipe.plan import Plan

_CARD = """---
library_name: qpcompile
pipeline_tag: image-text-to-text
tags: [qpcompile, vision-language, quantization, token-pruning]
---

# {name}, compiled

A `{name}` with {layers} decoder layers, compiled by qpcompile: quantization and visual-token pruning chosen together.
Weights take {megabytes:.2f} MB on disk.

## Quantization

{quantization}

## Visual tokens

{tokens}

## Numerics

{numerics}

## Agreement with full precision

{agreement}

## Use

```python
import qpcompile

model = qpcompile.load("path/to/this/folder")
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = model.processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)
```

`recipe.yaml` is what was asked, `plan.yaml` what was decided, `graph/*.txt` the graphs that run, `manifest.json` what
each site became. Tensors are safetensors and graphs are text: loading this folder runs no code from it.
"""

_NUMERICS = {
    "exact": "`exact`: sums are float64, rounded to float32 once. onnxruntime produces the codes of this module.",
    "fast": "`fast`: sums are float32. Another back end may round a code next to a tie the other way.",
}


def model_card(program: Program, size: int) -> str:
    """Markdown text; `size` is the number of bytes of all weights."""
    return _CARD.format(
        name=type(program.host).__name__,
        layers=len(program.layers),
        megabytes=size / 1e6,
        quantization=_quantization(program.plan),
        tokens=_tokens(program.plan),
        agreement=_agreement(program.plan),
        numerics=_NUMERICS[program.recipe.numerics],
    )


def _quantization(plan: Plan) -> str:
    if not plan.sites:
        return "None: every weight and every cache entry keeps its type."
    kinds = Counter(
        (site.graph, site.weight_bits, site.activation_bits, site.cache_bits, site.kernel) for site in plan.sites
    )
    rows = [
        f"| {graph} | {count} | {_bits(weight)} | {_bits(activation)} | {_bits(cache)} | `{kernel}` |"
        for (graph, weight, activation, cache, kernel), count in kinds.items()
    ]
    head = ["| graph | sites | weight bits | activation bits | cache bits | kernel |", f"|{' --- |' * 6}"]
    told = "".join(f"\n- {line}." for line in told_bits(plan))
    left = f"\n{len(plan.left_out)} sites in scope were left as they are; `plan.yaml` says why."
    return "\n".join([*head, *rows, *([told] if told else []), *([left] if plan.left_out else [])])


def _tokens(plan: Plan) -> str:
    if not plan.cuts:
        return "All visual tokens are kept in every layer."
    rows = [f"| {cut.layer} | {cut.ratio:.4f} | {cut.kept(576)} of 576 |" for cut in plan.cuts]
    table = ["| after layer | share kept | for example |", "| --- | --- | --- |", *rows]
    if plan.waived:
        table += ["", "Not taken into account:", "", *(f"- {line}" for line in plan.waived)]
    if plan.choice is None:
        return "\n".join(table)
    prices = [f"| {' | '.join(row)} |" for row in price_rows(plan.choice)]
    chosen = [
        f"Chosen: {how_chosen(plan.choice)}.",
        "",
        f"| {' | '.join(HEADS)} |",
        "| --- | --- | --- | --- |",
        *prices,
    ]
    warning = ["", f"**{plan.choice.warning}.**"] if plan.choice.warning else []
    return "\n".join([*table, "", *chosen, *warning])


def _agreement(plan: Plan) -> str:
    if plan.quality is None:
        return "Not measured: the recipe asked for none, or there was no data."
    rows = [f"| {cause} | {added:+.3g} |" for cause, added in increments(plan.quality)]
    head = ["| lost to | nats per token |", "| --- | --- |"] if rows else []
    return "\n".join([f"{verdict(plan.quality)}.", *([""] if rows else []), *head, *rows])


def _bits(bits: int | None) -> str:
    return "-" if bits is None else str(bits)
