"""Rows on Ray: any order gives the same tables, lost rows are asked for again, errors of ours stay ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from qpcompile.cli import main as cli
from qpcompile.errors import ArtifactError, InputError, OutputError, PlanError, WorkerError
from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.evaluate.run.evaluation import Exam, source_digest
from qpcompile.evaluate.run.examiner import Examiner
from qpcompile.evaluate.run.row_runner import Ask, InProcess, Outcome, RowRunner, Walk, all_rows, stored
from qpcompile.evaluate.run.rows import Row, RowFolder
from qpcompile.evaluate.search import search, table
from qpcompile.recipe.recipe import Recipe
from tests.evaluate.full_disk import contents
from tests.evaluate.ray_stand_in import StandIn, forget, ray

__all__ = ["ray"]
TESTBED = Path(__file__).resolve().parents[1] / "testbed"
MODEL, DATA = str(TESTBED / "llava"), TESTBED / "calibration" / "llava"
GIB = 2**30


def made(examiner: Examiner, name: str, recipe: Recipe | None) -> Row:
    """A row whose accuracy says which recipe it is of; half the tokens are refused, and a third has a full disk."""
    keep = 1.0 if recipe is None else recipe.tokens.keep
    if keep == 0.5:
        raise PlanError("half is refused", where="tokens.keep")
    if keep == 0.33:
        raise OutputError("the disk is full")
    return Row(
        id=examiner.id(recipe), name=name, model=examiner.source, data=examiner.exam.data, data_sha256="",
        recipe=None if recipe is None else recipe.to_dict(), seed=0, calibration_samples=0, calibration_sha256=None,
        scoring="choice", versions={}, source=source_digest(), questions=1, correct=1, accuracy=keep, right="1",
        answers=(), visual_tokens=1, mean_visual_tokens=keep, final_visual_tokens=1, flops=1, flops_share=1,
        weight_bytes=1, kv_bytes=1, compile_seconds=0, answer_seconds=0, plan={}, kept=(),
    )  # fmt: skip


@pytest.fixture
def rows(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """ray_rows over the stand-in, and examiners that compute nothing."""
    monkeypatch.setattr(Examiner, "compute", made)
    module = importlib.import_module("qpcompile.evaluate.run.ray_rows")
    monkeypatch.setattr(module.torch, "set_num_threads", lambda count: None)
    yield module
    module._examiner.cache_clear()


def asks(out: Path | None, *keeps: float | None, source: str = MODEL) -> list[Ask]:
    exam = Exam(str(DATA), read_data(DATA)[:1])
    examiner = Examiner(source, exam, DATA, None if out is None else RowFolder(out))
    recipe = Recipe.load("quota-30")
    return [
        Ask(examiner, f"row {keep}", None if keep is None else recipe.with_overrides([f"tokens.keep={keep}"]))
        for keep in keeps
    ]


def on_ray(rows: ModuleType, say: Callable[[str], None] = lambda text: None, **needs: Any) -> RowRunner:
    asked = {"cpus": 1, "gpus": 0, "memory_bytes": GIB} | needs
    return rows.OnRay(rows.Needs(**asked), say, may_grow=False)


def shown(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    return [(each.name, each.id) if isinstance(each, Row) else ("refused", str(each)) for each in outcomes]


def test_any_order_and_lost_rows_give_the_same_files(rows: ModuleType, ray: StandIn, tmp_path: Path) -> None:
    keeps = (None, 0.3, 0.5, 0.4, 0.3)
    expected = all_rows(asks(tmp_path / "here", *keeps), InProcess())
    ray.losses = {"row 0.3": 2, "row None": 1}
    said: list[str] = []
    found = all_rows(asks(tmp_path / "ray", *keeps), on_ray(rows, said.append))
    assert shown(found) == shown(expected) and shown(found)[2][0] == "refused"
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    assert ray.order[0] == "row 0.4", "the stand-in took the last row first"
    assert sorted(ray.order) == sorted(["row None"] * 2 + ["row 0.3"] * 3 + ["row 0.5", "row 0.4"])
    assert [text for text in said if "attempt 3 of 3" in text] == [
        "row 0.3: its worker was lost (WorkerCrashedError); asked for again, attempt 3 of 3"
    ]
    again = all_rows(asks(tmp_path / "ray", *keeps), on_ray(rows))
    assert shown(again) == shown(found) and ray.order[7:] == ["row 0.5"], "only what was refused is tried again"


def test_a_row_that_is_always_lost_ends_the_command_after_the_others(
    rows: ModuleType, ray: StandIn, tmp_path: Path
) -> None:
    ray.losses = {"row 0.3": 99}
    with pytest.raises(WorkerError, match="1 rows were lost") as caught:
        all_rows(asks(tmp_path, 0.4, 0.3, None), on_ray(rows))
    assert caught.value.where == "row 0.3" and "--row-memory" in str(caught.value.do)
    assert ray.order.count("row 0.3") == 3 and len(RowFolder(tmp_path).rows) == 2


def test_a_walk_may_ask_for_several_rows(rows: ModuleType, ray: StandIn) -> None:
    first, second, third = asks(None, 0.3, 0.4, 0.6)

    def walk(*asked: Ask) -> Walk[list[str]]:
        names = []
        for ask in asked:
            outcome = yield from stored(ask)
            assert isinstance(outcome, Row)
            names.append(outcome.name)
        return names

    ray.losses = {"row 0.4": 1}
    found = on_ray(rows).run([walk(first, second), walk(), walk(third)])
    assert found == InProcess().run([walk(first, second), walk(), walk(third)])
    assert found == [["row 0.3", "row 0.4"], [], ["row 0.6"]]


def test_a_search_finds_the_same(rows: ModuleType, ray: StandIn) -> None:
    examiner = asks(None, None)[0].examiner
    ray.losses = {"W4A4KV16 at 0.4": 1}
    expected, found = (
        table(search(examiner, Recipe.load("quota-30"), 0.97, lambda text: None, runner))
        for runner in (InProcess(), on_ray(rows))
    )
    assert found == expected and found.count("chosen") == 1
    assert ray.order[1].startswith("16 bit") and ray.order[-1].startswith("W4A4KV4 at"), "rungs go side by side"


def test_a_full_disk_ends_all_rows(rows: ModuleType, ray: StandIn) -> None:
    with pytest.raises(OutputError, match="the disk is full"):
        all_rows(asks(None, 0.3, 0.33), on_ray(rows))
    assert len(ray.cancelled) == 1


def test_a_ray_that_ends_is_an_error_of_ours(rows: ModuleType, ray: StandIn) -> None:
    ray.died = True
    with pytest.raises(WorkerError, match=r"LocalRayletDiedError: The task's local raylet died\.\n  where"):
        all_rows(asks(None, None, 0.3), on_ray(rows))


@pytest.mark.parametrize("address", ["", " "])
def test_an_empty_address_starts_no_ray(rows: ModuleType, address: str) -> None:
    with pytest.raises(WorkerError, match="address of Ray is empty"), rows.connected(address, print):
        pytest.fail("it was connected")


def test_what_a_row_needs(rows: ModuleType, ray: StandIn) -> None:
    on_ray(rows, cpus=4, memory_bytes=8 * GIB)
    needs = {key: ray.needs[key] for key in ("num_cpus", "num_gpus", "memory", "max_retries")}
    assert needs == {"num_cpus": 4, "num_gpus": 0, "memory": 8 * GIB, "max_retries": 0}
    # Each is there, on different machines.
    ray.machines[0]["GPU"] = 1
    with pytest.raises(WorkerError, match=r"a row needs 4 CPUs, 1 GPU, 8\.0 GiB, and no machine") as caught:
        on_ray(rows, cpus=4, gpus=1, memory_bytes=8 * GIB)
    assert "2 CPUs, 1 GPU, 4.0 GiB; 4 CPUs, 8.0 GiB" in caught.value.what
    said: list[str] = []
    rows.OnRay(rows.Needs(8, 0, GIB), said.append, may_grow=True)
    assert len(said) == 1 and "rows wait until one joins" in said[0]


def test_memory_of_a_row(rows: ModuleType) -> None:
    weights = sum(path.stat().st_size for path in Path(MODEL).glob("*.safetensors"))
    assert rows.row_memory(MODEL) == GIB + 3 * weights
    with pytest.raises(InputError, match="estimated from a model's folder"):
        rows.row_memory("org/name")


def test_a_worker_with_other_code_or_files_refuses(
    rows: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (ask,) = asks(None, 0.3)
    runner = on_ray(rows)
    with monkeypatch.context() as other:
        other.setattr(rows, "source_digest", lambda: "0123456789ab")
        with pytest.raises(ArtifactError, match=r"other code \(0123456789ab\)"):
            all_rows([ask], runner)
    with monkeypatch.context() as other:
        other.setattr(rows, "_examiner", lambda station: asks(None, 0.3, source=str(TESTBED / "gemma"))[0].examiner)
        with pytest.raises(ArtifactError, match="another model, other data or other versions") as caught:
            all_rows([ask], runner)
        assert "10.0.0.1" in str(caught.value.where)
    with pytest.raises(ArtifactError, match="no such folder"):
        rows._examiner(replace(rows.Station.of(ask.examiner), source=str(tmp_path / "gone")))


def test_workers_get_absolute_paths_and_rows_keep_the_given_ones(
    rows: ModuleType, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTBED)
    exam = Exam("calibration/llava", read_data(Path("calibration/llava"))[:1])
    examiner = Examiner("llava", exam, Path("calibration/llava"))
    station = rows.Station.of(examiner)
    assert station.source == MODEL and station.calibration == DATA and station.exam.questions[0].image.is_absolute()
    assert rows.Station.of(Examiner("org/name", exam, None)).source == "org/name"
    (row,) = all_rows([Ask(examiner, "full", None)], on_ray(rows))
    assert isinstance(row, Row) and (row.model, row.data) == ("llava", "calibration/llava")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--ray", "local"), 1, 'pip install "qpcompile[ray]"'),
        (("--row-cpus", "2"), 2, "belongs to --ray"),
        (("--ray", "local", "--row-memory", "inf"), 2, "inf is no number of GiB"),
    ],
)
def test_options_that_lead_nowhere(
    words: tuple[str, ...], code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    monkeypatch.setitem(sys.modules, "ray", None)
    base = ["eval", MODEL, "--data", str(DATA), "--limit", "1", "--recipe", "none", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(cli.app, [*base, *words])
    assert found.exit_code == code and told in " ".join(found.output.split())
