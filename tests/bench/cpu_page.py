"""The page that the CPU benchmark writes for one kind of processor: machine, versions, artifacts, tables, targets."""

import os
import platform
import posixpath
import re
import textwrap
from collections.abc import Iterable, Sequence

from cpu_peers import ROOT
from cpu_processor import processor
from cpu_table import BASELINE, BEST_PEER, READING, Row, Target, as_markdown, busyness, targets_as_markdown

WIDTH = 120
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")
GENAI = "OpenVINO GenAI int4"
PLAIN, PRUNED = "ours w4a4kv4, bf16", "ours quota-30, bf16"
FAST = "ours quota-30, ONNX fast"
EIGHT_BITS = "ours w4a8kv4, bf16"
# A step that takes 1.43 times a read of its bytes reaches 70 % of the bandwidth.
BANDWIDTH = round(1 / 0.7, 2)
TARGETS = [
    *(
        Target(shape, measure, ours, other, most)
        for shape in ("A", "B")
        for measure, ours, other, most in (
            ("first_ms", PRUNED, BEST_PEER, 0.5),
            ("first_ms", FAST, BEST_PEER, 0.5),
            *(("first_ms", ours, BEST_PEER, 0.75) for ours in (PLAIN, EIGHT_BITS)),
            *(("decode_ms", ours, BEST_PEER, 0.8) for ours in (PLAIN, PRUNED, EIGHT_BITS, FAST)),
            *(("decode_ms", ours, READING, BANDWIDTH) for ours in (PLAIN, PRUNED, EIGHT_BITS)),
            ("first_wall_ms", f"{PLAIN}, 2 threads", PLAIN, round(1 / 1.8, 2)),
            ("decode_wall_ms", f"{PLAIN}, 2 threads", PLAIN, round(1 / 1.8, 2)),
            # Eight prompts in the time of two: four times the tokens per second.
            ("decode_ms", f"{PLAIN}, batch 8", PLAIN, 2.0),
            ("weights_mb", PRUNED, GENAI, 1.0),
            ("peak_mb", PRUNED, GENAI, 1.2),
        )
    ),
    *(
        Target("testbed", measure, ours, BASELINE, 1.0)
        for measure in ("first_ms", "decode_ms")
        for ours in ("ours w4a4kv4", "ours quota-30", PLAIN, PRUNED)
    ),
]


INTRODUCTION = """One picture, batch 1 unless a row says otherwise, greedy, {} new tokens, random weights
(tests/bench/cpu_models.py), one thread on one core unless a row says otherwise. Each peer is a process; all answer in
turns. Medians, in brackets minimum and maximum. The first token includes tower, projector, prompt and its logits;
OpenVINO GenAI and llama.cpp also resize and normalise the picture. No peer keeps a prompt's cache for the next answer.
ORT: graphs exported by this package without quantization, int4 by onnxruntime's own tool; except `caches in place`,
which uses onnxruntime's own attention, they copy their caches on each step and have no fused attention. llama.cpp:
files by its own converters and quantizer."""
COLUMNS = f"""`peak MB`: resident memory since the process began. Baseline: {BASELINE}, in the same run. `share of the
bandwidth`: time to read the weights that a decode step must read, and the cache where the peer tells its size, at the
core's bandwidth, over the time of a step. `{BEST_PEER}` in the targets: the fastest runtime of the same run that is not
ours, with one thread and one prompt."""
CLOCKS = (
    """Times are CPU time of the process, with two threads wall-clock time. Wall-clock times of a first token were"""
)
RESTRICTED = """- our operators in C, torch and oneDNN restricted to {}; onnxruntime and llama.cpp have no such
  switch and use the processor's best"""
ARTIFACTS = """Ours: compiled from random weights with two random samples, weights rounded to nearest without clip
search, no training epochs, fixed candidate layers (tests/bench/cpu_prepare.py): the operators that run, and so the
times, are those of the preset; its accuracy is not. All decoder layers, the tower and the projector are quantized as
the recipe says. Sums are float32, the recipe's fast numerics ([numerics](../numerics.md)), which rows of an older run
may not have. ONNX: exports of the float32 artifacts."""


def page(rows: Sequence[Row], kind: str, instruction_set: str | None, new_tokens: int) -> str:
    """The Markdown page of one kind of processor."""
    ran = [row for row in rows if row.runs]
    command = "python tests/bench/cpu.py" + (f" --instruction-set {instruction_set}" if instruction_set else "")
    parts = [
        f"# Whole answers on one CPU core: {kind}",
        _filled(f"Written by `{command}`. {INTRODUCTION.format(new_tokens)}"),
        _filled(COLUMNS),
        _filled(f"{CLOCKS} {busyness(ran) or 1:.2f} times as long, since the machine was shared."),
        "\n".join(_machine(rows, instruction_set)),
        as_markdown(rows) + "\n## Targets\n\n" + targets_as_markdown(rows, TARGETS).rstrip(),
        "\n".join(_artifacts(ran)),
        "\n".join(_claims(f"cpu-{kind}.md")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(rows: Sequence[Row], instruction_set: str | None) -> Iterable[str]:
    """Processor, versions and bandwidth, a list item each."""
    ran = [row for row in rows if row.runs]
    versions = sorted({f"{name} {version}" for row in ran for name, version in row.loaded["versions"].items()})
    yield f"- {processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    yield f"- {', '.join(versions)}"
    if instruction_set:
        yield RESTRICTED.format(instruction_set)
    for count, cores in ((1, "one core"), (2, "two cores")):
        speeds = [row.loaded["read_gbps"] for row in ran if row.loaded.get("threads") == count]
        if speeds:
            yield f"- {cores}: {max(speeds):.1f} GB/s read (maximum over 1 GB of float32, best of passes)"
    runs = sorted({(row.shape, row.run) for row in ran})
    yield f"- runs: {', '.join(f'{shape} {run}' for shape, run in runs)}"


def _artifacts(ran: Sequence[Row]) -> Iterable[str]:
    """What every row loaded, and the recipes of our artifacts."""
    yield "## How the models were made"
    yield ""
    yield _filled(ARTIFACTS)
    yield ""
    for row in ran:
        if row.loaded.get("settings"):
            yield f"- {row.shape}, {row.peer}: {row.loaded['settings']}"
    texts = {row.loaded["recipe"]: f"{row.shape}, {row.peer}" for row in reversed(ran) if row.loaded.get("recipe")}
    for text, name in reversed(texts.items()):
        yield ""
        yield f"<details><summary>Recipe of {name}</summary>"
        yield ""
        yield f"```yaml\n{text.rstrip()}\n```"
        yield ""
        yield "</details>"


def _claims(name: str) -> Iterable[str]:
    """The paragraphs and list items of README that refer to this page."""
    paragraphs = re.split(r"\n\n|\n(?=- )", (ROOT / "README.md").read_text("utf-8"))
    found = [" ".join(each.split()) for each in paragraphs if name in each]
    yield "## Claims of README that rest on this page"
    yield ""
    yield from (f"> {LINK.sub(_from_here, each)}" for each in found)
    if not found:
        yield "None."


def _from_here(link: re.Match[str]) -> str:
    """A link of README as the results page has it."""
    return f"]({posixpath.relpath(link[1], 'docs/results')})"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
