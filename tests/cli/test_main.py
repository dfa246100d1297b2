"""The command line: what each command passes on, what it prints, its exit codes; and one end-to-end run."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoProcessor
from typer.testing import CliRunner, Result

from qpcompile.capture.data_folder import read_questions
from qpcompile.cli import main as cli
from qpcompile.cli.dry_run import EXPECT, NOTHING
from qpcompile.cli.report import DRAWN
from qpcompile.errors import CaptureError
from qpcompile.pass_list import passes
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
MODEL, DATA = str(TESTBED / "llava"), TESTBED / "calibration" / "llava"
PICTURE = str(DATA / "00000.png")
COMPILE = "qpcompile.pipeline.compile"
COMMANDS = ("compile", "run", "report", "export", "inspect", "eval", "sweep", "search", "doctor")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


class Recorder:
    """A compiled model that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.drawn: Any = ()
        self.measured: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self.processor: Any = None
        self.plan = Plan(recipe=Recipe())

    def compile(self, model: str, recipe: Any, **options: Any) -> Recorder:
        self.asked = {"model": model, "recipe": recipe, **options}
        return self

    def save_pretrained(self, folder: Path) -> None:
        self.calls.append(("save", Path(folder).name))

    def report(self, path: Path, samples: Any, **measured: Any) -> None:
        self.drawn, self.measured = samples, measured
        self.calls.append(("report", Path(path).name))

    def export_onnx(self, folder: Path, check: Any, fast: bool = False, target: str | None = None) -> None:
        self.calls.append(("onnx", Path(folder).name))
        self.checked = [inputs["input_ids"].shape[0] for inputs in check]

    def graph_text(self, stage: str) -> str:
        return f"graph {stage}\n"

    def weight_bytes(self) -> int:
        return 1_500_000

    def generate(self, **inputs: Any) -> torch.Tensor:
        self.asked = inputs
        ids = inputs["input_ids"]
        answer = self.processor.tokenizer.encode("blue", add_special_tokens=False)
        return torch.cat([ids, torch.tensor([answer])], dim=1)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(COMPILE, made.compile)
    monkeypatch.setattr("qpcompile.compiled.load", lambda folder: made)
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"qpcompile {command}", result.output) and "Example" in result.output
    assert "trust" not in result.output


def test_help_names_every_command() -> None:
    output = invoke("--help").output
    assert all(command in output for command in COMMANDS) and "qpcompile doctor" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile",),
        ("compile", MODEL, "--recipe", "none"),
        ("compile", MODEL, "--trust-remote-code"),
        ("run", "out", "--question", "what?"),
        ("run", "out", "--image", "no-such.png", "--question", "what?"),
        ("report", "out", "--output", "page.html", "--original", MODEL),
        ("eval", MODEL),
        ("eval", MODEL, "--data", DATA, "--batch-size", "0"),
        ("fly",),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[object, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--help",), 0, "Compile vision-language models"),
        (("--version",), 0, metadata.version("qpcompile")),
        (("compile", "--help"), 0, "Compile a model by a recipe"),
        (("eval", "--help"), 0, "choice"),
        (("fly",), 2, "fly"),
        (("compile", MODEL, "--recipe", "quota-3", "--output", "out"), 1, "did you mean quota-30"),
        (("compile", MODEL, "--set", "tokens.keeep=1", "--output", "out"), 1, "did you mean keep"),
        (("inspect", "no-such-folder", "--report", str(TESTBED)), 1, "exists already"),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments: tuple[str, ...], code: int, said: str) -> None:
    """In a separate process: here torch has been imported already."""
    asks = "import atexit, sys\natexit.register(lambda: print('slow:', *{'torch', 'transformers'} & {*sys.modules}))\n"
    program = asks + "from qpcompile.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "slow:"


def test_compile_hands_everything_on(recorder: Recorder, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.html"
    words = ("--recipe", "quota-30", "--set", "tokens.keep=0.4", "--set", "calibration.samples=3")
    words += ("--min-agreement", "0.97", "--device", "cpu", "--offload", str(tmp_path / "new"))
    result = invoke("compile", MODEL, *words, "--data", DATA, "--output", out, "--report", report)
    assert result.exit_code == 0, result.output
    assert recorder.asked["device"] == "cpu" and recorder.asked["offload"] == tmp_path / "new"
    assert recorder.asked["model"] == MODEL and recorder.asked["calibration"] == DATA
    recipe = recorder.asked["recipe"]
    assert (recipe.tokens.keep, recipe.calibration.samples, recipe.quantize.weights.bits) == (0.4, 3, 4)
    assert recipe.quality.min_agreement == 0.97
    assert recorder.calls == [("save", "out"), ("report", "report.html")]
    assert len({picture for picture, _ in recorder.drawn}) == len(recorder.drawn) == DRAWN
    assert "1.50 MB of weights" in result.output


def test_report_asks_both_models(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpcompile.capture.load.load_model", lambda source: (f"loaded {source}", None))
    words = ("--data", DATA, "--original", MODEL, "--limit", 7)
    result = invoke("report", "out", "--output", tmp_path / "page.html", *words)
    assert result.exit_code == 0 and "page.html" in result.output, result.output
    assert recorder.measured == {"data": DATA, "limit": 7, "original": f"loaded {MODEL}"}
    assert len(recorder.drawn) == DRAWN


def test_a_device_that_is_not_there_is_refused_before_the_compile(recorder: Recorder, tmp_path: Path) -> None:
    for command, options in (("compile", ()), ("export", ("--recipe", "none"))):
        result = invoke(command, MODEL, *options, "--output", tmp_path / "out", "--device", "nonsense")
        assert result.exit_code == 1 and "cannot compute on nonsense" in result.output
    assert not recorder.asked and not (tmp_path / "out").exists()


def test_slow_recipe_is_announced_before_the_compile(recorder: Recorder, tmp_path: Path) -> None:
    result = invoke("compile", MODEL, "--recipe", "w4a16", "--data", DATA, "--output", tmp_path / "out")
    assert result.exit_code == 0 and "note: this recipe runs slow on this machine" in result.output


def test_dry_run_prints_every_pass_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*args: Any, **options: Any) -> Any:
        pytest.fail("a dry run loaded a model")

    monkeypatch.setattr(COMPILE, loads)
    monkeypatch.setattr("qpcompile.capture.load.mapped_model", loads)
    result = invoke("compile", MODEL, "--recipe", "quota-30", "--data", DATA, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "LlavaForConditionalGeneration, 8 decoder layers" in result.output
    assert "calibration samples: 128" in result.output
    positions = [result.output.index(item.name) for item in passes((), 0)]
    assert positions == sorted(positions)
    assert "int4 by gptq" in result.output and "keep 0.3 of the visual tokens" in result.output


def test_dry_run_of_the_empty_recipe_has_nothing_to_do() -> None:
    result = invoke("compile", MODEL, "--recipe", "none", "--dry-run")
    assert result.exit_code == 0 and result.output.count(NOTHING) == len(EXPECT) - 1


def test_words_for_the_dry_run_are_of_passes() -> None:
    assert set(EXPECT) <= {item.name for item in passes((), 0)}


def test_dry_run_misses_calibration() -> None:
    result = invoke("compile", MODEL, "--recipe", "quota-30", "--dry-run")
    assert result.exit_code == 1 and "gptq" in result.output and "where: --data" in result.output


def test_errors_are_text_and_tracebacks_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise CaptureError("prefill cannot be traced", where="model.py, line 7", do="report this family")

    monkeypatch.setattr(COMPILE, fails)
    words = ("compile", MODEL, "--recipe", "none", "--output", tmp_path / "out")
    result = invoke(*words)
    assert result.exit_code == 1 and "Traceback" not in result.output
    expected = "error: prefill cannot be traced\n  where: model.py, line 7\n  what to do: report this family\n"
    assert expected in result.output
    debugged = invoke(*words, "--debug")
    assert debugged.exit_code == 1 and "Traceback" in debugged.output and expected.strip() in debugged.output


def test_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stops(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMPILE, stops)
    result = invoke("compile", MODEL, "--recipe", "none", "--output", tmp_path / "out")
    assert result.exit_code == 130 and "Traceback" not in result.output and list(tmp_path.iterdir()) == []


def test_run_prints_the_answer_alone(recorder: Recorder) -> None:
    recorder.processor = AutoProcessor.from_pretrained(MODEL)
    words = ("--image", PICTURE, "--question", "what color is the star?")
    result = CliRunner().invoke(cli.app, ["run", "out", *words, "--max-new-tokens", "5"])
    assert result.exit_code == 0 and result.stdout == "blue\n"
    assert recorder.asked["max_new_tokens"] == 5 and recorder.asked["do_sample"] is False
    text = recorder.processor.decode(recorder.asked["input_ids"][0])
    assert "what color is the star" in text


def test_run_shows_the_picture_upright(recorder: Recorder, tmp_path: Path) -> None:
    recorder.processor = AutoProcessor.from_pretrained(MODEL)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(PICTURE) as scene:
        scene.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    seen = []
    for picture in (PICTURE, tmp_path / "phone.png"):
        assert invoke("run", "out", "--image", picture, "--question", "what color is the star?").exit_code == 0
        seen.append(recorder.asked["pixel_values"])
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("picture", "question", "words"),
    [
        (PICTURE, "what is <image>?", "the text holds '<image>'"),
        (DATA / "data.jsonl", "what?", "data.jsonl is not a picture that can be read"),
    ],
)
def test_run_refuses_what_is_no_input(recorder: Recorder, picture: Any, question: str, words: str) -> None:
    recorder.processor = AutoProcessor.from_pretrained(MODEL)
    result = CliRunner().invoke(cli.app, ["run", "out", "--image", str(picture), "--question", question])
    assert result.exit_code == 1 and words in result.output and "what to do:" in result.output
    assert "--image" in result.output and recorder.asked == {}


def test_run_without_a_processor(recorder: Recorder) -> None:
    result = invoke("run", "out", "--image", PICTURE, "--question", "what?")
    assert result.exit_code == 1 and "has no processor" in result.output


def test_export_of_a_compiled_folder(recorder: Recorder, tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    (folder / "graph").mkdir(parents=True)
    result = invoke("export", folder, "--output", tmp_path / "onnx")
    assert result.exit_code == 0 and recorder.calls == [("onnx", "onnx")] and recorder.asked == {}
    assert recorder.checked == []


def test_export_checks_the_first_questions(recorder: Recorder, tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    (folder / "graph").mkdir(parents=True)
    refused = invoke("export", folder, "--data", DATA, "--output", tmp_path / "onnx")
    assert refused.exit_code == 1 and "has no processor" in refused.output and recorder.calls == []
    recorder.processor = AutoProcessor.from_pretrained(MODEL)
    assert invoke("export", folder, "--data", DATA, "--output", tmp_path / "onnx").exit_code == 0
    assert recorder.checked == [1] * 8 + [2]


def test_export_of_a_model_compiles_it_first(recorder: Recorder, tmp_path: Path) -> None:
    recorder.processor = AutoProcessor.from_pretrained(MODEL)
    result = invoke("export", MODEL, "--recipe", "prune-30", "--data", DATA, "--output", tmp_path / "onnx")
    assert result.exit_code == 0 and recorder.calls == [("onnx", "onnx")]
    assert recorder.asked["recipe"].tokens.keep == 0.3 and recorder.asked["calibration"] == DATA


def test_inspect_prints_one_graph_or_writes_the_report(recorder: Recorder, tmp_path: Path) -> None:
    assert invoke("inspect", "out", "--graph", "decode").output == "graph decode\n"
    result = invoke("inspect", "out", "--report", tmp_path / "report.html")
    assert result.exit_code == 0 and recorder.calls == [("report", "report.html")] and not recorder.drawn
    question = read_questions(DATA)[0]
    assert invoke("inspect", "out", "--data", DATA, "--report", tmp_path / "drawn.html").exit_code == 0
    assert recorder.drawn[0] == (question.image, question.question)


def test_eval_prints_the_share_of_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answers(generate: Any, processor: Any, exam: Any, name: str) -> list[str]:
        asked.extend([generate, processor, len(exam.questions), exam.batch_size, exam.max_new_tokens])
        return [question.answer for question in exam.questions[:3]] + ["wrong"]

    monkeypatch.setattr("qpcompile.capture.load.load_model", lambda source: (SimpleNamespace(generate="G"), "P"))
    monkeypatch.setattr("qpcompile.evaluate.run.evaluation.ask", answers)
    result = invoke("eval", MODEL, "--data", DATA, "--limit", "4", "--batch-size", "2", "--max-new-tokens", "8")
    assert result.exit_code == 0 and "accuracy 0.7500 (3 of 4)" in result.output
    assert asked == ["G", "P", 4, 2, 8]


def test_doctor_prints_every_table() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for word in ("integer instructions", "transformers", "linear_int", "quota-30", "tested"):
        assert word in result.output


@pytest.mark.slow
def test_the_whole_road_on_the_testbed(tmp_path: Path) -> None:
    """Compile, inspect, run and evaluate, with the commands a user types."""
    out = tmp_path / "out"
    settings = ("calibration.samples=2", "quantize.weights.solver=rtn")
    words = [word for setting in settings for word in ("--set", setting)]
    compiled = invoke("compile", MODEL, "--recipe", "quota-30", *words, "--data", DATA, "--output", out)
    assert compiled.exit_code == 0, compiled.output
    assert (out / "manifest.json").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]

    seen = invoke("inspect", out)
    assert seen.exit_code == 0, seen.output
    for word in ("LlavaForConditionalGeneration", "W4A4", "KV4", "cut after layer"):
        assert word in seen.output
    graph = invoke("inspect", out, "--graph", "prefill")
    assert graph.output.startswith("graph prefill") and "qpcompile::select_tokens" in graph.output

    question = read_questions(DATA)[0]
    answer = invoke("run", out, "--image", question.image, "--question", question.question, "--max-new-tokens", "4")
    assert answer.exit_code == 0 and len(answer.stdout.split()) >= 1, answer.output
    score = invoke("eval", out, "--data", DATA, "--limit", "4", "--batch-size", "4", "--max-new-tokens", "4")
    assert score.exit_code == 0 and re.search(r"accuracy [01]\.\d{4} \(\d of 4\)", score.output), score.output


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "qpcompile", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == metadata.version("qpcompile")
