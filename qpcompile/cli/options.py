"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe; repeatable.")
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Name of a preset, or path of a YAML file.")]
Data = Annotated[
    Path | None, typer.Option("--data", "-d", help="Calibration folder: pictures and data.jsonl.", show_default=False)
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where to compute, as torch names it: cuda, cpu; by default the processor.",
        show_default=False,
    ),
]
Offload = Annotated[
    Path | None,
    typer.Option(
        "--offload",
        help="Folder for changed weights, as large as the model; by default they stay in memory.",
        show_default=False,
    ),
]
MODEL_HELP = "Folder or hub name of a transformers model."
ARTIFACT_HELP = "Folder written by `qpcompile compile`."
