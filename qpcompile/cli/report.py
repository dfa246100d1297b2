"""`qpcompile report`: a verdict on a compiled model, beside its original if that is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpcompile.capture.data_folder import first_pictures
from qpcompile.claims import Claim, claimed
from qpcompile.cli.models import load_artifact
from qpcompile.cli.options import ARTIFACT_HELP, Debug
from qpcompile.cli.terminal import note, told_as_text
from qpcompile.write_errors import shown

if TYPE_CHECKING:
    from qpcompile.compiled import CompiledVLM

DRAWN = 4  # number of pictures of a data folder for which a report draws kept tokens
ASKED = 100


def report_command(
    artifact: Annotated[Path, typer.Argument(help=ARTIFACT_HELP, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New HTML file.")],
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Questions with right answers, which calibration did not see.")
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="Model it was compiled from, to be asked the same.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Ask only the first N questions.")] = ASKED,
    debug: Debug = False,
) -> None:
    """Write a report: agreement, accuracy, speed and memory first, then tokens, bits and kernels."""
    with told_as_text(debug):
        if original is not None and data is None:
            raise typer.BadParameter("it needs questions: --data", param_hint="--original")
        with claimed(output, "file") as page:
            compiled = load_artifact(artifact)
            before = None
            if original is not None:
                from qpcompile.capture.load import load_model

                before = load_model(original)[0]
            drawn = None if data is None else first_pictures(data, DRAWN)
            compiled.report(page, drawn, data=data, limit=limit, original=before)
            note(f"wrote {shown(page)}")


def write_report(compiled: CompiledVLM, page: Claim, data: Path | None) -> None:
    """Write the report of a compiled model, with kept tokens drawn on the first pictures of a data folder."""
    compiled.report(page, first_pictures(data, DRAWN) if data else None)
    note(f"wrote {shown(page)}")
