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
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS|local",
        help="Compute rows as tasks of this Ray; local: one on this machine. By default in this process.",
        show_default=False,
    ),
]
RowCpus = Annotated[
    int | None, typer.Option("--row-cpus", min=1, help="With --ray: cores and threads of a row; 1.", show_default=False)
]
RowMemory = Annotated[
    float | None,
    typer.Option(
        "--row-memory",
        metavar="GIB",
        min=0.001,
        help="With --ray: memory of a row; by default 1 GiB and three times the weights.",
        show_default=False,
    ),
]
MODEL_HELP = "Folder or hub name of a transformers model."
ARTIFACT_HELP = "Folder written by `qpcompile compile`."
