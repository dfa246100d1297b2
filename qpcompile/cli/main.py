"""The command `qpcompile`: compile, run, chat, serve, report, export, inspect, eval, sweep, search, doctor, families.

Exit codes: 0 done, 1 an error of ours (what, where, what to do), 2 wrong usage, 128 + the signal that stopped it: 130
for Ctrl-C, 143 for SIGTERM, 129 if the terminal was closed.

torch and transformers take seconds to import: commands import them after validating their arguments.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from qpcompile.capture.chat import about_picture, chat_inputs, need_processor
from qpcompile.capture.data_folder import question_inputs, read_questions
from qpcompile.claims import claimed, refuse_places
from qpcompile.cli import checkpoint, compare, talk, terminal
from qpcompile.cli.checkpoint import COMPRESSED, Target
from qpcompile.cli.launched import ended_at_once, refuse_several
from qpcompile.cli.models import checked_device, compile_told, is_artifact, load_artifact
from qpcompile.cli.options import ARTIFACT_HELP, MODEL_HELP, Data, Debug, Device, Offload, Overrides, RecipeName
from qpcompile.cli.report import report_command, write_report
from qpcompile.cli.terminal import note, quiet_libraries, told_as_text
from qpcompile.emit.artifact.folder_kind import is_onnx_folder
from qpcompile.emit.onnx.runtimes import fast_form
from qpcompile.picture import read_picture
from qpcompile.recipe.recipe import Recipe
from qpcompile.write_errors import shown

# Questions of a data folder that an export asks of both sides.
CHECKED = 8

app = typer.Typer(
    help="Compile vision-language models: 4-bit weights, activations and KV cache, and the visual tokens to keep.",
    epilog="Start with: qpcompile doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def print_version(asked: bool) -> None:
    """`--version`: the installed version and nothing else."""
    if asked:
        typer.echo(metadata.version("qpcompile"))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Options before a command."""
    with told_as_text(debug=False):
        refuse_several(context.invoked_subcommand)


@app.command(
    "compile",
    epilog="Examples:\n\n"
    "qpcompile compile MODEL --recipe quota-30 --data photos/ --output out/ --report report.html\n\n"
    "qpcompile compile MODEL --recipe w4a4kv4 --set quantize.weights.solver=rtn --data photos/ --output out/\n\n"
    "qpcompile compile MODEL --recipe quota-30 --data photos/ --dry-run",
)
def compile_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    recipe: RecipeName = "quota-30",
    overrides: Overrides = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder for the compiled model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of passes; loads no weights.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="New HTML file with the report.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Checkpoint folder: an interrupted compile resumes from it.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Least share of answers equal to full precision's (quality.min_agreement).")
    ] = None,
    device: Device = None,
    offload: Offload = None,
    debug: Debug = False,
) -> None:
    """Compile a model by a recipe and write it to a new folder."""
    with told_as_text(debug):
        demanded = [] if min_agreement is None else [f"quality.min_agreement={min_agreement}"]
        asked = Recipe.load(recipe).with_overrides([*(overrides or []), *demanded])
        if output is None and not dry_run:
            raise typer.BadParameter(
                "name a folder for the compiled model, or ask for --dry-run", param_hint="--output"
            )
        refuse_places({"output": output, "report": report}, {"resume": resume, "offload": offload})
        quiet_libraries()
        from qpcompile.cli.doctor import recipe_warning
        from qpcompile.cli.dry_run import forecast
        from qpcompile.torchrun import joined, local_device

        with joined() as ranks:
            terminal.quiet_rank(ranks)
            device = local_device(device)
            checked_device(device)
            expected = forecast(model, asked, data)
            if not ranks.leads:
                if not dry_run:
                    compile_told(model, asked, data, resume, device, offload, ranks)
                return
            if warning := recipe_warning(asked):
                note(f"note: {warning}")
            if dry_run:
                terminal.show_forecast(expected)
                return
            assert output is not None
            with (
                claimed(output, "folder") as folder,
                nullcontext() if report is None else claimed(report, "file") as page,
            ):
                compiled = compile_told(model, asked, data, resume, device, offload, ranks)
                compiled.save_pretrained(folder)
                note(f"wrote {shown(output)}, {compiled.weight_bytes() / 1e6:.2f} MB of weights")
                terminal.show_quality(compiled.plan)
                if page is not None:
                    write_report(compiled, page, data)


@app.command(
    "run",
    epilog='Examples:\n\nqpcompile run out/ --image photo.png --question "what color is the star?"\n\n'
    'qpcompile run out-onnx/ --image photo.png --question "what color is the star?"',
)
def run_command(
    folder: Annotated[
        Path, typer.Argument(help="Folder written by `qpcompile compile` or `export`.", show_default=False)
    ],
    image: Annotated[Path, typer.Option("--image", "-i", help="Picture.", exists=True, dir_okay=False)],
    question: Annotated[str, typer.Option("--question", "-q", help="Question about the picture.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    debug: Debug = False,
) -> None:
    """Answer one question about one picture."""
    with told_as_text(debug):
        picture = read_picture(image, where="--image")
        if is_onnx_folder(folder):
            from qpcompile.cli.onnx_folder import stream_answer

            stream_answer(folder, picture, question, max_new_tokens)
            return
        compiled = load_artifact(folder)
        processor = need_processor(compiled.processor, folder)
        from qpcompile.runtime.model_inputs import new_tokens

        inputs = chat_inputs(processor, [about_picture(picture, question)], [f"--image {image}, --question"])
        tokens = compiled.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        typer.echo(processor.batch_decode(new_tokens(inputs, tokens), skip_special_tokens=True)[0].strip())


app.command("chat", epilog="Example:\n\nqpcompile chat out/ --image photo.png")(talk.chat_command)
app.command("serve", epilog="Example:\n\nqpcompile serve out/ --port 8000")(talk.serve_command)
app.command(
    "report",
    epilog="Example:\n\nqpcompile report out/ --output report.html --data unseen/ --original MODEL",
)(report_command)


@app.command(
    "export",
    epilog="Examples:\n\nqpcompile export out/ --output out-onnx/\n\n"
    "qpcompile export MODEL --recipe quota-30 --data photos/ --output out-onnx/\n\n"
    "qpcompile export out/ --for genai --output out-genai/\n\n"
    "qpcompile export MODEL --recipe w4a16 --data photos/ --for compressed-tensors --output out-ct/",
)
def export_command(
    source: Annotated[
        str, typer.Argument(metavar="ARTIFACT_OR_MODEL", help="Compiled folder, or a model to compile first.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for graphs and runner.")],
    recipe: RecipeName = "none",
    overrides: Overrides = None,
    data: Data = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Use onnxruntime's own operators: faster, different numerics.")
    ] = False,
    target: Target = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Write graphs for onnxruntime, with a runner that needs no torch; or a checkpoint for other runtimes.

    Recipe and calibration apply to a model only: a compiled folder has its own. The first questions of the data are
    asked of both sides; a family whose tower is written for fixed sizes takes pictures of their sizes.
    """
    with told_as_text(debug):
        if target == COMPRESSED:
            checkpoint.export(source, output, Recipe.load(recipe).with_overrides(overrides or []), data, device, fast)
            return
        fast_form(fast, target)
        with claimed(output, "folder") as folder:
            if is_artifact(source):
                compiled = load_artifact(source)
            else:
                checked_device(device)
                asked = Recipe.load(recipe).with_overrides(overrides or [])
                compiled = compile_told(source, asked, data, device=device)
            # Some families need a vision graph for each size of picture: that of the first questions.
            checked = []
            if data is not None:
                processor = need_processor(compiled.processor, source)
                first = read_questions(data)[:CHECKED]
                # One at a time, and two at once: some families encode a picture by those before it.
                checked = [question_inputs(processor, each) for each in (*([one] for one in first), first[:2])]
            compiled.export_onnx(folder, check=checked, fast=fast, target=target)
        note(f"wrote {shown(output)}; how to ask it: {shown(output)}/README.md")


@app.command(
    "inspect",
    epilog="Examples:\n\nqpcompile inspect out/\n\nqpcompile inspect out/ --graph prefill | less\n\n"
    "qpcompile inspect out/ --data photos/ --report report.html",
)
def inspect_command(
    artifact: Annotated[Path, typer.Argument(help=ARTIFACT_HELP, show_default=False)],
    graph: Annotated[str | None, typer.Option("--graph", "-g", help="Print this graph: prefill, decode, ...")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write the report to this new HTML file.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Folder of pictures that the report draws kept tokens on.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show the plan, the quantized sites and the graphs."""
    with told_as_text(debug), nullcontext() if report is None else claimed(report, "file") as page:
        compiled = load_artifact(artifact)
        if page is not None:
            write_report(compiled, page, data)
        if graph is not None:
            typer.echo(compiled.graph_text(graph), nl=False)
        elif page is None:
            terminal.show_model(compiled)


app.command("eval", epilog=compare.EVAL_EXAMPLES)(compare.eval_command)
app.command("sweep", epilog=compare.SWEEP_EXAMPLES)(compare.sweep_command)
app.command("search", epilog=compare.SEARCH_EXAMPLES)(compare.search_command)


@app.command("doctor", epilog="Example:\n\nqpcompile doctor")
def doctor_command(debug: Debug = False) -> None:
    """Show what can run on this machine, and why the rest cannot."""
    with told_as_text(debug):
        quiet_libraries()
        from qpcompile.cli.doctor import examine

        terminal.show_diagnosis(examine())


@app.command("families", epilog="Examples:\n\nqpcompile families\n\nqpcompile families --run llava")
def families_command(
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="Take this family through every step now.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show which model families are captured, pruned, quantized and exported; found with tiny random models."""
    with told_as_text(debug):
        from qpcompile.cli import families

        if run is not None:
            quiet_libraries()
        for line in families.lines(families.shipped()) if run is None else families.run(run):
            typer.echo(line)


def main() -> None:
    """The console script."""
    with ended_at_once(), terminal.standing_streams(), terminal.stopped_by_signals():
        app()
