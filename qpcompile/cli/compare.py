"""`qpcompile eval`, `sweep` and `search`: recipes compared on questions, in this process or on Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpcompile.claims import held_folder
from qpcompile.cli import terminal
from qpcompile.cli.models import checked_device, is_artifact, open_model
from qpcompile.cli.options import MODEL_HELP, Debug, Device, Overrides, Ray, RecipeName, RowCpus, RowMemory
from qpcompile.cli.terminal import note, quiet_libraries, told_as_text
from qpcompile.errors import InputError
from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.evaluate.run.rows import RowFolder, Scoring
from qpcompile.evaluate.sweep.plan import SweepPlan
from qpcompile.recipe.recipe import Recipe
from qpcompile.write_errors import shown

if TYPE_CHECKING:
    import torch

    from qpcompile.evaluate.run.evaluation import Exam
    from qpcompile.evaluate.run.row_runner import RowRunner

EVAL_EXAMPLES = (
    "Examples:\n\nqpcompile eval out/ --data unseen/ --batch-size 16\n\n"
    "qpcompile eval MODEL --data unseen/ --recipe w4a4kv4 --recipe quota-30 --calibration photos/ --out rows/\n\n"
    "qpcompile eval MODEL --data scienceqa/ --split test --recipe quota-30 --seed 0 --seed 1 --calibration photos/ "
    "--set calibration.samples=64 --out rows/"
)
SWEEP_EXAMPLES = (
    "Examples:\n\nqpcompile sweep docs/results/llava.yaml --out build/sweep/\n\n"
    "qpcompile sweep docs/results/llava.yaml --out build/sweep/ --ray local"
)
SEARCH_EXAMPLES = (
    "Example:\n\n"
    "qpcompile search MODEL --accuracy 0.97 --recipe quota-30 --data heldout/ --calibration photos/ --out found/"
)


@contextmanager
def where_rows_run(
    ray: str | None, cpus: int | None, memory_gib: float | None, models: list[str], device: torch.device | None
) -> Iterator[RowRunner]:
    """In this process, or on the Ray that `--ray` names.

    models: those that rows are of; the largest decides about the memory of a row.
    """
    if memory_gib is not None and not math.isfinite(memory_gib):
        raise typer.BadParameter(f"{memory_gib} is no number of GiB", param_hint="--row-memory")
    if ray is None:
        if cpus is not None or memory_gib is not None:
            raise typer.BadParameter("it belongs to --ray", param_hint="--row-cpus, --row-memory")
        from qpcompile.evaluate.run.row_runner import InProcess

        yield InProcess()
        return
    try:
        from qpcompile.evaluate.run import ray_rows
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InputError(
            "the package ray is not installed", where="--ray", do='install the extra: pip install "qpcompile[ray]"'
        ) from error
    asked = max(map(ray_rows.row_memory, models)) if memory_gib is None else int(memory_gib * ray_rows.GIB)
    gpus = int(device is not None and device.type == "cuda")
    with ray_rows.connected(ray, note):
        yield ray_rows.OnRay(ray_rows.Needs(cpus or 1, gpus, asked), note, ray != ray_rows.LOCAL)


def device_of_rows(device: str | None, ray: str | None) -> torch.device | None:
    """The device that rows compute on; of rows on Ray the workers check it."""
    if ray is None or device is None:
        return checked_device(device)
    import torch

    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{device!r} is no device: {error}", where="--device", do="name one as torch does") from error


def eval_command(
    source: Annotated[str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="Compiled folder, or a model.")],
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder with data.jsonl, or ScienceQA's layout.")],
    recipes: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="Compile by this preset or file; repeatable.")
    ] = None,
    overrides: Overrides = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", min=0, help="Calibration draw; repeatable.")] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Folder that samples are drawn from.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for rows; existing ones are kept.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    scoring: Annotated[
        Scoring, typer.Option(help="Questions with choices: the most probable choice, or the one the text names.")
    ] = "choice",
    split: Annotated[str, typer.Option(help="ScienceQA: which split.")] = "test",
    device: Device = None,
    ray: Ray = None,
    row_cpus: RowCpus = None,
    row_memory: RowMemory = None,
    debug: Debug = False,
) -> None:
    """Accuracy on questions: of a model, an artifact, or many recipes."""
    with told_as_text(debug):
        questions = read_data(data, split)[:limit]
        quiet_libraries()
        from qpcompile.cli.evaluate import recipe_rows
        from qpcompile.evaluate.run.evaluation import Exam
        from qpcompile.evaluate.run.examiner import Examiner, artifact_row

        exam = Exam(str(data), questions, scoring, batch_size, max_new_tokens)
        if not recipes and out is None:
            if ray is not None:
                raise typer.BadParameter("rows go to a folder: add --recipe or --out", param_hint="--ray")
            ask_once(source, exam)
            return
        with nullcontext() if out is None else held_folder(out) as folder:
            kept = None if folder is None else RowFolder(folder)
            if is_artifact(source):
                if recipes:
                    raise typer.BadParameter("a compiled folder has its own recipe", param_hint="--recipe")
                if ray is not None:
                    raise typer.BadParameter(
                        "a compiled folder is one row: there is nothing to spread", param_hint="--ray"
                    )
                rows = [artifact_row(source, *open_model(source), exam, kept)]
            else:
                computes = device_of_rows(device, ray)
                asked = Examiner(source, exam, calibration, kept, computes)
                with where_rows_run(ray, row_cpus, row_memory, [source], computes) as runner:
                    rows = recipe_rows(asked, recipes or [], overrides or [], seeds or [], runner)
            if kept is not None:
                kept.write_tables()
        terminal.show_rows(rows)
        if out is not None:
            note(f"rows are in {shown(out)}: rows.csv, rows.json, rows/")


def ask_once(source: str, exam: Exam) -> None:
    """Ask all questions and print the accuracy."""
    from qpcompile.capture.right_answers import right_answers
    from qpcompile.evaluate.run.evaluation import ask, group_scores

    model, processor = open_model(source)
    started = time.monotonic()
    answers = ask(model.generate, processor, exam, "answer")
    right = right_answers(exam.questions, answers)
    correct, asked = sum(right), len(right)
    note(f"{time.monotonic() - started:.1f} s, batches of {exam.batch_size}")
    typer.echo(f"accuracy {correct / asked:.4f} ({correct} of {asked})")
    terminal.show_groups([(Path(source).name, group_scores(exam.questions, right), correct / asked)], asked)


def sweep_command(
    plan: Annotated[Path, typer.Argument(help="YAML file: testbeds, quantizers, pruners, shares, ablations.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for rows, tables, figures; existing rows are kept.")],
    device: Device = None,
    ray: Ray = None,
    row_cpus: RowCpus = None,
    row_memory: RowMemory = None,
    debug: Debug = False,
) -> None:
    """Every pruner with every quantizer at matched visual tokens: rows, tables, figures. Resumable."""
    with told_as_text(debug):
        asked = SweepPlan.load(plan)
        quiet_libraries()
        from qpcompile.evaluate.report.sweep_report import write_sweep
        from qpcompile.evaluate.sweep.sweep import sweep

        computes = device_of_rows(device, ray)
        models = [bed.model for bed in asked.beds]
        with held_folder(out), where_rows_run(ray, row_cpus, row_memory, models, computes) as runner:
            results = sweep(asked, out, note, computes, runner)
            write_sweep(asked, results, out, f"qpcompile sweep {shown(plan)} --out {shown(out)}")
        note(f"wrote {shown(out)}: tables.md, tables.csv, figures/, rows.csv, rows.json, rows/")


def search_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    accuracy: Annotated[float, typer.Option(min=0, max=1, help="Share of full precision's accuracy to keep.")],
    data: Annotated[Path, typer.Option("--data", "-d", help="Questions for the selection; report on others.")],
    calibration: Annotated[Path, typer.Option("--calibration", help="Folder that samples are drawn from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for rows, recipe and plot; existing rows are kept.")],
    recipe: RecipeName = "quota-30",
    overrides: Overrides = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    device: Device = None,
    ray: Ray = None,
    row_cpus: RowCpus = None,
    row_memory: RowMemory = None,
    debug: Debug = False,
) -> None:
    """Find the recipe with the fewest tokens and bits that keeps a given accuracy."""
    with told_as_text(debug):
        asked = Recipe.load(recipe).with_overrides(overrides or [])
        questions = read_data(data)[:limit]
        quiet_libraries()
        from qpcompile.evaluate.run.evaluation import Exam
        from qpcompile.evaluate.run.examiner import Examiner
        from qpcompile.evaluate.search import search, write_search

        computes = device_of_rows(device, ray)
        exam = Exam(str(data), questions, "choice", batch_size, max_new_tokens)
        with held_folder(out), where_rows_run(ray, row_cpus, row_memory, [model], computes) as runner:
            kept = RowFolder(out)
            found = search(Examiner(model, exam, calibration, kept, computes), asked, accuracy, note, runner)
            kept.write_tables()
            write_search(found, out)
        best = found.best
        typer.echo(f"{shown(out / 'recipe.yaml')}: {best.bits}, {best.row.mean_visual_tokens:.1f} mean tokens, "
                   f"{100 * best.kept.estimate:.1f} % of full precision")  # fmt: skip
