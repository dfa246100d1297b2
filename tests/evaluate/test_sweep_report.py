"""Tables and figures of a sweep, from rows whose numbers are known."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qpcompile.errors import OutputError, PlanError
from qpcompile.evaluate.report import tables
from qpcompile.evaluate.report.figures import ablation_figure, figure_bytes, profile_figure, profiles, retention_figure
from qpcompile.evaluate.report.groups import full_precision, groups
from qpcompile.evaluate.report.question_groups import group_table
from qpcompile.evaluate.report.sweep_report import write_sweep
from qpcompile.evaluate.run.row_runner import Ask, InProcess, all_rows
from qpcompile.evaluate.run.rows import GroupScore, Row, RowFolder
from qpcompile.evaluate.sweep.plan import BASE, SweepPlan, cells
from qpcompile.evaluate.sweep.sweep import CellResult, _result
from tests.evaluate.full_disk import contents, fill

PLAN = """
version: 1
beds: [{name: one, model: m, data: DATA, calibration: c}]
seeds: [0, 1]
shares: [0.5, 0.25]
reference: quota
quantizers: {low: {recipe: w4a4kv4}}
pruners: {none: {}, quota: {set: [tokens.method=quota]}, vtw: {set: [tokens.method=vtw], seeds: [0]}}
ablations: {score: {quantizer: low, pruner: quota, share: 0.5, variants: {rank: [tokens.normalize=rank]}}}
"""
# Right answers of the ten questions by pruner, share and seed.
RIGHT = {
    ("none", 1.0): ("1111111100", "1111111100"),
    ("quota", 0.5): ("1111111000", "1111110000"),
    ("quota", 0.25): ("1111100000", "1111000000"),
    ("vtw", 0.5): ("1111000000",),
}
TOKENS = {1.0: 100.0, 0.5: 50.0, 0.25: 25.0}


def row(name: str, right: str, tokens: float, low: bool) -> Row:
    """A row with these scores."""
    facts = [{"layer": layer, "mass_median": 0.5, "mass_iqr": 0.1, "cosine": 0.2} for layer in range(3)]
    numbers = {"flops": 1e6 * tokens, "flops_share": tokens / 100, "weight_bytes": 1000, "kv_bytes": 10 * tokens}
    return Row(
        id=name, name=name, model="m", data="d", data_sha256="", recipe={"numerics": "fast"} if low else None, seed=0,
        calibration_samples=1, calibration_sha256=None, scoring="choice", versions={}, source="", questions=len(right),
        correct=right.count("1"), accuracy=right.count("1") / len(right), right=right, answers=(), visual_tokens=100,
        mean_visual_tokens=tokens, final_visual_tokens=tokens, compile_seconds=1, answer_seconds=1,
        plan={"facts": facts, "candidate_layers": [1]} if low and tokens < 100 else {}, kept=(), **numbers,
    )  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("DATA", str(Path(__file__).resolve().parents[1] / "testbed/calibration/llava")))
    return SweepPlan.load(path)


@pytest.fixture
def results(plan: SweepPlan) -> list[CellResult]:
    """Full precision has nine of ten right; the variant `rank` equals the smaller share; vtw refuses a quarter."""
    made = []
    for number, cell in enumerate(cells(plan)):
        if cell.recipe is None:
            made.append(CellResult(cell, row("full", "1111111110", 100, low=False)))
        elif (cell.pruner, cell.share) not in RIGHT:
            made.append(CellResult(cell, None, "too few tokens"))
        else:
            share = 0.25 if cell.variant == "rank" else cell.share
            made.append(
                CellResult(cell, row(str(number), RIGHT[cell.pruner, share][cell.seed], TOKENS[cell.share], True))
            )
    return made


def test_numbers_of_a_table(plan: SweepPlan, results: list[CellResult]) -> None:
    made = tables.bed_tables(plan, groups(results), "one")
    assert list(made) == ["one: low", "one: ablation score"]
    lines = {(line["quantizer"], line["pruner"], line["share"]): line for line in made["one: low"]}
    full, quota = lines["full precision", "", 1.0], lines["low", "quota", 0.5]
    assert (full["accuracy"], full["seeds"]) == (90, 1) and "retention" not in full
    assert quota["accuracy"] == pytest.approx(65) and quota["accuracy_spread"] == pytest.approx(7.0711, abs=1e-3)
    assert quota["retention"] == pytest.approx(100 * 6.5 / 9) and quota["seeds"] == 2
    assert float(quota["retention_low"]) < float(quota["retention"]) < float(quota["retention_high"])
    assert "against" not in quota and quota["mean_visual_tokens"] == 50 and quota["flops_share"] == 50
    # Compared with the reference at the same share; without such a row, with nothing.
    assert lines["low", "vtw", 0.5]["against"] == pytest.approx(40 - 65)
    assert "against" not in lines["low", "none", 1.0]
    assert lines["low", "vtw", 0.25]["accuracy"] == "not possible: too few tokens"
    (_, base, rank) = made["one: ablation score"]
    assert (base["variant"], rank["variant"]) == (BASE, "rank") and rank["against"] == pytest.approx(45 - 65)


def test_text_for_people_and_for_machines(plan: SweepPlan, results: list[CellResult]) -> None:
    made = tables.bed_tables(plan, groups(results), "one")
    shown = tables.markdown("one: low", made["one: low"]).splitlines()
    assert shown[0] == "## one: low" and shown[2].startswith("| quantizer | pruner | share | numerics | seeds |")
    assert len({line.count("|") for line in shown[2:]}) == 1
    assert any("| low | quota | 0.5 | fast | 2 | 65.00 ± 7.07 | 72.2 [" in line for line in shown)
    read = list(csv.DictReader(io.StringIO(tables.csv_text(made))))
    assert len(read) == sum(map(len, made.values()))
    quota = next(line for line in read if line["pruner"] == "quota")
    assert float(quota["accuracy"]) == pytest.approx(65)


def test_figures_show_the_same_numbers(plan: SweepPlan, results: list[CellResult]) -> None:
    found = groups(results)
    figure = retention_figure(found, "one", "low")
    assert figure is not None
    axes = figure.axes[0]
    labels = [str(text.get_text()) for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["quota", "vtw"]
    drawn = axes.containers[0].lines[0].get_xydata()  # type: ignore[attr-defined]
    assert drawn.tolist() == [[25.0, pytest.approx(50)], [50.0, pytest.approx(100 * 6.5 / 9)]]
    assert any("all tokens 88.9" in text.get_text() for text in axes.texts)
    gained = ablation_figure(found, "one", "score")
    assert gained is not None and [text.get_text() for text in gained.axes[0].texts] == ["+0.0", "-20.0"]
    measured = profile_figure("one", profiles(found, "one"))
    assert measured is not None and len(measured.axes) == 2
    assert retention_figure(found, "one", "fp16") is None and ablation_figure(found, "one", "no such") is None
    assert profile_figure("one", []) is None
    assert figure_bytes(figure, "png").startswith(b"\x89PNG") and b"</svg>" in figure_bytes(figure, "svg")


def test_a_sweep_leaves_files(plan: SweepPlan, results: list[CellResult], tmp_path: Path) -> None:
    for _ in range(2):
        write_sweep(plan, results, tmp_path / "out", "qpcompile sweep plan.yaml --out out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "Made by `qpcompile sweep plan.yaml --out out`." in text and text.count("## one: low") == 1
    linked = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"figures/one-retention-low.png", "figures/one-ablation-score.png", "figures/one-profile.png"} <= set(linked)
    for name in linked:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / name).with_suffix(".svg").is_file()


def test_table_of_groups_of_questions(plan: SweepPlan, results: list[CellResult], tmp_path: Path) -> None:
    """The first four and the last six questions are groups; cells are means over seeds, refused rows are left out."""

    def grouped(found: Row) -> Row:
        scores = {"A|B": GroupScore(right=found.right[:4].count("1"), questions=4)}
        scores["C"] = GroupScore(right=found.right[4:].count("1"), questions=6)
        return found.model_copy(update={"groups": scores})

    made = [replace(result, row=result.row and grouped(result.row)) for result in results]
    write_sweep(plan, made, tmp_path / "out", "a command")
    text = (tmp_path / "out" / "tables.md").read_text()
    shown = text.split("## one: accuracy in % by group of questions\n\n")[1].split("\n\n")[0].splitlines()
    assert shown[:4] == [
        r"| quantizer | pruner | share | variant | A\|B | C | avg |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| questions |  |  |  | 4 | 6 | 10 |",
        "| full precision |  | 1 |  | 100.00 | 83.33 | 90.00 |",
    ]
    # Seeds with three and with two of six right.
    assert "| low | quota | 0.5 |  | 100.00 | 41.67 | 65.00 |" in shown
    assert "| low | quota | 0.5 | rank | 100.00 | 8.33 | 45.00 |" in shown
    assert not any("| vtw | 0.25 |" in line for line in shown)
    write_sweep(plan, results, tmp_path / "none", "a command")
    assert "by group of questions" not in (tmp_path / "none" / "tables.md").read_text()
    assert group_table("of refused rows", [group for group in groups(made) if not group.rows]) == ""


def test_full_precision_is_the_models_own(results: list[CellResult]) -> None:
    assert full_precision(groups(results), "one").rows[0].name == "full"


@pytest.mark.parametrize("after", [0, 7])
def test_full_disk_leaves_whole_files(
    plan: SweepPlan, results: list[CellResult], after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(plan, results, tmp_path / "whole", "a command")
    with monkeypatch.context() as full, pytest.raises(OutputError, match="disk is full"):
        fill(full, after)
        write_sweep(plan, results, tmp_path / "out", "a command")
    whole, left = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert left == {name: whole[name] for name in left} and len(left) == after < len(whole)


class _Stub:
    """An examiner that fails."""

    kept = None

    def __init__(self, error: Exception) -> None:
        self.error = error

    def id(self, recipe: object) -> str:
        return "one"

    def known(self, recipe: object) -> None:
        return None

    def compute(self, name: str, recipe: object) -> Row:
        raise self.error


def test_full_disk_says_nothing_of_a_recipe(plan: SweepPlan) -> None:
    cell = next(iter(cells(plan)))
    few, full = _Stub(PlanError("too few")), _Stub(OutputError("the disk is full"))
    (outcome,) = all_rows([Ask(few, "a", None)], InProcess())  # type: ignore[arg-type]
    assert _result(cell, outcome).error == "too few"
    with pytest.raises(OutputError, match="full"):
        all_rows([Ask(full, "a", None)], InProcess())  # type: ignore[arg-type]


@pytest.mark.parametrize("after", range(3))
def test_full_disk_loses_no_row(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = row("1", "1" * 10, 100, low=False), row("2", "1" * 10, 50, low=True)
    RowFolder(tmp_path).add(first)
    with monkeypatch.context() as full, pytest.raises(OutputError, match="disk is full"):
        fill(full, after)
        RowFolder(tmp_path).add(second)
    again = RowFolder(tmp_path)
    assert list(again.rows) == ["1", "2"][: 1 + (after > 0)]
    if "2" not in again.rows:
        again.add(second)
    # A resumed sweep that finds every row computed.
    again.write_tables()
    assert [line["id"] for line in json.loads((tmp_path / "rows.json").read_text())] == ["1", "2"]
    assert sorted(contents(tmp_path)) == ["rows.csv", "rows.json", "rows/1.json", "rows/2.json"]
