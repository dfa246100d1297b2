"""Bad input is refused with a QPCompileError: what, where and what to do, and no file half-written.

Elsewhere: a model that is not a VLM and a capture that fails (capture/test_capture_errors.py), keys of a recipe
(test_recipe.py), defects of an artifact (emit/test_artifact.py), full disks while writing (test_files.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import IMAGE, llava
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import qpcompile
from qpcompile import pipeline
from qpcompile.calibration.collect import run_sample
from qpcompile.capture.capture import capture
from qpcompile.capture.data_folder import read_questions
from qpcompile.capture.samples import Samples
from qpcompile.cli import main as cli
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    ModelError,
    OutputError,
    PlanError,
    RecipeError,
)
from qpcompile.files import staged_folder
from qpcompile.ir.edit import clone
from qpcompile.ir.measurements import Measurements
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine

TESTBED = Path(__file__).resolve().parent / "testbed"
MODEL, DATA = TESTBED / "llava", TESTBED / "calibration" / "llava"
# Cheap to compile up to the error: no second moments, given layers.
QUICK = ["quantize.weights.solver=rtn", "quantize.smooth=null", "tokens.candidate_layers=[0, 1]"]
Tiny = tuple[Any, dict[str, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    """A random model and its prompts by name."""
    return llava()


@pytest.fixture(scope="module")
def program(tiny: Tiny) -> Program:
    """The same model captured and canonical, once for all tests here."""
    model, cases = tiny
    program = capture(model, cases["one"], Recipe.load("none"))
    run_passes(program, [Canonicalize()])
    return program


@pytest.fixture
def captured(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` uses copies of that capture."""

    def instead(model: Any, sample: Any, recipe: Recipe, others: Any) -> Program:
        plan = Plan(recipe=recipe, layers=program.plan.layers)
        graphs = {name: clone(graph) for name, graph in program.graphs.items()}
        return replace(program, graphs=graphs, recipe=recipe, plan=plan, measured=Measurements(), history=[])

    monkeypatch.setattr(pipeline, "capture", instead)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that must still be empty afterwards."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    assert [path.name for path in folder.rglob("*")] == []


def told(error: pytest.ExceptionInfo[qpcompile.QPCompileError]) -> None:
    """Check that the error has what, where and what to do."""
    assert error.value.what and error.value.where and error.value.do


# Models


def test_text_model_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not load as an image-text-to-text model") as error:
        qpcompile.compile(tmp_path, "none")
    told(error)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        qpcompile.compile(tmp_path, "none")
    told(error)


# Calibration


def test_missing_calibration_names_what_needs_it(tiny: Tiny) -> None:
    with pytest.raises(CalibrationError, match=r"gptq[\s\S]*smooth[\s\S]*candidate_layers auto") as error:
        qpcompile.compile(tiny[0], "quota-30")
    told(error)


@pytest.mark.parametrize("empty", [[], iter(())], ids=["list", "iterator"])
def test_empty_calibration(tiny: Tiny, empty: Any) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration sample") as error:
        qpcompile.compile(tiny[0], "quota-30", calibration=empty)
    told(error)


@pytest.mark.parametrize("position", [0, 1])
def test_sample_without_a_picture_is_named(tiny: Tiny, captured: None, position: int) -> None:
    one = tiny[1]["one"]
    samples = [one, one]
    samples[position] = {key: value for key, value in one.items() if key != "pixel_values"}
    with pytest.raises(CalibrationError, match="no picture") as error:
        qpcompile.compile(tiny[0], "quota-30", calibration=samples)
    told(error)
    assert f"calibration sample {position}" in str(error.value)


def test_sample_that_is_no_model_input(tiny: Tiny) -> None:
    with pytest.raises(CalibrationError, match="no input_ids") as error:
        qpcompile.compile(tiny[0], "quota-30", calibration=[{"pixel_values": torch.zeros(1)}])
    told(error)


def disagreeing(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A prompt with one image token less than its picture has."""
    ids = case["input_ids"].clone()
    row, column = (ids == IMAGE).nonzero()[0].tolist()
    ids[row, column] = 5
    return case | {"input_ids": ids}


def test_picture_and_text_disagree_in_the_first_sample(tiny: Tiny) -> None:
    with pytest.raises(CaptureError, match="generate failed on the sample") as error:
        qpcompile.compile(tiny[0], "quota-30", calibration=[disagreeing(tiny[1]["one"])])
    told(error)


def test_picture_and_text_disagree_in_a_later_sample(tiny: Tiny, program: Program) -> None:
    with pytest.raises(CalibrationError, match="does not take this sample") as error:
        run_sample(Machine(program), disagreeing(tiny[1]["one"]), 7)
    told(error)
    assert "calibration sample 7" in str(error.value)


def write_lines(*lines: str) -> Callable[[Path], Any]:
    """Write data.jsonl with these lines."""
    return lambda folder: (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")


GOOD = json.dumps({"image": "00000.png", "question": "what?", "answer": "red"})
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "there is no data.jsonl"),
    "no data.jsonl": (lambda folder: None, "there is no data.jsonl"),
    "no line": (write_lines(""), "there is no calibration sample"),
    "no JSON": (write_lines(GOOD, "{"), "line 2"),
    "no question": (write_lines('{"image": "00000.png", "answer": "red"}'), "line 1"),
    "no object": (write_lines("[1]"), "line 1"),
    "missing picture": (
        write_lines(GOOD, '{"image": "no.png", "question": "?", "answer": "red"}'),
        "no.png is missing",
    ),
    "no text": (lambda folder: (folder / "data.jsonl").write_bytes(b"\xff\xfe"), "not UTF-8"),
    "folder for a picture": (write_lines('{"image": ".", "question": "?", "answer": "red"}'), "is missing"),
}


@pytest.mark.parametrize(("damage", "message"), FOLDERS.values(), ids=list(FOLDERS))
def test_defect_of_a_data_folder_is_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(DATA / "00000.png", folder)
    damage(folder)
    with pytest.raises(CalibrationError, match=message) as error:
        Samples(folder, AutoProcessor.from_pretrained(MODEL), 4, 0)
    told(error)


def test_file_that_is_no_picture(tmp_path: Path) -> None:
    write_lines('{"image": "data.jsonl", "question": "what?", "answer": "red"}')(tmp_path)
    with pytest.raises(CalibrationError, match="not a picture that can be read") as error:
        Samples(tmp_path, AutoProcessor.from_pretrained(MODEL), 4, 0)
    told(error)


def test_data_folder_without_a_processor(tiny: Tiny) -> None:
    with pytest.raises(CalibrationError, match="needs a processor"):
        qpcompile.compile(tiny[0], "quota-30", calibration=DATA)


# Recipes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tokens.keeep=0.5", "unknown key; did you mean keep"),
        ("tokens.keep=0", "tokens.keep: given 0"),
        ("tokens.keep=1.5", "tokens.keep: given 1.5"),
        ("tokens.candidate_layers=[-1]", "tokens.candidate_layers: given"),
        ("tokens.candidate_layers=[2, 7]", "tokens cannot be cut after layer 7: this model's last layer is 7"),
        ("quantize.weights.bits=3", "quantize.weights.bits: given 3"),
    ],
)
def test_impossible_settings_stop_the_command(place: Path, setting: str, message: str) -> None:
    arguments = ["compile", str(MODEL), "--recipe", "quota-30", "--data", str(DATA), "--output", str(place / "out")]
    result = CliRunner().invoke(cli.app, [*arguments, "--set", setting])
    assert result.exit_code == 1 and message in result.output and "what to do:" in result.output


def test_layers_out_of_range_in_the_model(tiny: Tiny, captured: None) -> None:
    recipe = Recipe.load("quota-30").with_overrides([*QUICK, "quantize=null", "tokens.candidate_layers=[0, 2]"])
    with pytest.raises(PlanError, match="tokens cannot be cut after layer 2: this model's last layer is 2") as error:
        qpcompile.compile(tiny[0], recipe, calibration=[tiny[1]["one"]], after=lambda *_: pytest.fail("a pass ran"))
    told(error)


def test_ignore_pattern_that_matches_nothing(tiny: Tiny, captured: None) -> None:
    recipe = Recipe.load("w4a4kv4").with_overrides([*QUICK[:2], 'quantize.ignore=["lm_head", "re:.*no_such"]'])
    with pytest.raises(RecipeError, match=r"'re:\.\*no_such' matches no linear of this model") as error:
        qpcompile.compile(tiny[0], recipe, calibration=[tiny[1]["one"]])
    told(error)


# Outputs


def refused(*args: Any, **options: Any) -> Any:
    pytest.fail("a compile was started")


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_existing_output_is_refused_before_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("qpcompile.pipeline.compile", refused)
    kept = tmp_path / "kept"
    kept.write_text("mine")
    arguments = {"--output": str(tmp_path / "out"), "--report": str(tmp_path / "report.html")} | {option: str(kept)}
    words = [word for pair in arguments.items() for word in pair]
    result = CliRunner().invoke(cli.app, ["compile", str(MODEL), "--recipe", "none", *words])
    assert result.exit_code == 1 and "exists already" in result.output and str(kept) in result.output
    assert kept.read_text() == "mine" and list(tmp_path.iterdir()) == [kept]


def test_full_disk_while_samples_are_taken(tiny: Tiny, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setattr("qpcompile.capture.samples.save_file", full)
    with pytest.raises(OutputError, match=r"sample cannot be kept on disk[\s\S]*No space left") as error:
        qpcompile.compile(tiny[0], "quota-30", calibration=iter([tiny[1]["one"]]))
    told(error)


class FullDisk:
    """A compiled model for which every write meets a full disk."""

    def save_pretrained(self, folder: Path) -> None:
        with staged_folder(folder) as aside:
            (aside / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    def export_onnx(self, folder: Path, check: Any, fast: bool, target: str | None) -> None:
        self.save_pretrained(folder)


@pytest.mark.parametrize("command", ["compile", "export"])
def test_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr("qpcompile.pipeline.compile", lambda *args, **options: FullDisk())
    result = CliRunner().invoke(cli.app, [command, str(MODEL), "--recipe", "none", "--output", str(place / "out")])
    assert result.exit_code == 1 and "the disk is full" in result.output and "what to do:" in result.output


def test_save_into_an_existing_folder(program: Program, tmp_path: Path) -> None:
    for write in (CompiledVLM(program).save_pretrained, CompiledVLM(program).export_onnx):
        with pytest.raises(OutputError, match="exists already") as error:
            write(tmp_path)
        told(error)
    assert list(tmp_path.iterdir()) == []


# Artifacts, by the command line


def test_artifact_errors_reach_the_user(tmp_path: Path, program: Program) -> None:
    folder = tmp_path / "out"
    CompiledVLM(program).save_pretrained(folder)
    data = bytearray((folder / "graph" / "head.txt").read_bytes())
    data[3] ^= 1
    (folder / "graph" / "head.txt").write_bytes(bytes(data))
    for arguments in (["inspect", str(folder)], ["export", str(folder), "--output", str(tmp_path / "onnx")]):
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 1 and "head.txt is not the file that was saved" in result.output
    assert not (tmp_path / "onnx").exists()


def test_artifact_without_its_manifest_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    result = CliRunner().invoke(cli.app, ["export", str(tmp_path), "--output", str(tmp_path / "onnx")])
    assert result.exit_code == 1 and "has no manifest.json" in result.output


def test_onnx_folder_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "prefill.onnx").write_bytes(b"")
    for take in (cli.is_artifact, cli.load_artifact, qpcompile.load):
        with pytest.raises(ArtifactError, match="this is an ONNX folder, not a compiled model") as error:
            take(tmp_path)
        told(error)


# Ctrl-C


class Interrupted(Mapping[str, torch.Tensor]):
    """A sample; Ctrl-C arrives when it is read, which calibration does first."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs
        self.reads = 0

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.inputs[key]

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[str]:
        self.reads += 1
        raise KeyboardInterrupt


def test_interrupt_during_calibration(tiny: Tiny, captured: None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = Interrupted(tiny[1]["one"])
    ran: list[str] = []
    real = qpcompile.compile

    def compile_tiny(model: str, recipe: Recipe, **options: Any) -> CompiledVLM:
        samples: Any = [tiny[1]["one"], last]
        return real(tiny[0], recipe, calibration=samples, after=lambda step, _: ran.append(step.name))

    monkeypatch.setattr("qpcompile.pipeline.compile", compile_tiny)
    words = ["compile", str(MODEL), "--data", str(DATA), "--output", str(place / "out"), "--recipe", "w4a4kv4"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 130 and "interrupted" in result.output
    assert ran == ["canonicalize", "insert_quant_stubs"] and last.reads == 1


def test_interrupt_while_samples_are_taken_leaves_no_file(
    tiny: Tiny, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(place))

    def samples() -> Iterator[dict[str, torch.Tensor]]:
        yield tiny[1]["one"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qpcompile.compile(tiny[0], "quota-30", calibration=samples())


def test_pictures_of_the_testbed_are_all_there() -> None:
    """The shipped folders themselves are valid."""
    assert len(read_questions(DATA)) == 128
