"""The CPU benchmark end to end with peers of a few lines, its table, and its prompts."""

import json
from pathlib import Path

import cpu
import cpu_page
import cpu_peers
import cpu_processor
import cpu_profile
import numpy as np
import pytest
import torch
from cpu_models import build, model_inputs
from cpu_peers import MAKES, PEERS, Make, Peer
from cpu_processor import kind
from cpu_shapes import BEFORE, SHAPES, asked_inputs, inputs
from cpu_table import BEST_PEER, COLUMNS, READING, Row, Target, as_csv, as_markdown, busyness, targets_as_markdown

import qpcompile

STORE = f"rows-{kind()}.json"
# A peer that takes its milliseconds from its arguments, and how it is built.
WORKER = """
import sys
from cpu_worker import serve

def load():
    if sys.argv[5] == "broken":
        raise RuntimeError("no such engine")
    def ask(question):
        if sys.argv[5] == "tired" and question["prompt"]:
            raise MemoryError("too much")
        first = float(sys.argv[5]) if sys.argv[5] != "tired" else 1.0
        times = {f"first_{kind}_ms": first + question["prompt"] for kind in ("core", "wall")}
        return {**times, "decode_core_ms": 2 * first, "decode_wall_ms": 4 * first, "tokens": int(sys.argv[3])}
    return ask, {"weights_mb": 1.5, "step_mb": 2.0}

serve(load)
"""
MAKER = "import pathlib, sys; pathlib.Path(sys.argv[2]).mkdir(); print('made', sys.argv[1])"


def runs(*seconds: float) -> list[dict[str, float]]:
    """Answers whose tokens take a tenth of the first one, on a machine that is busy half of the time."""
    times = [{"first_core_ms": s, "first_wall_ms": 2 * s, "decode_core_ms": s / 10} for s in seconds]
    return [{**each, "decode_wall_ms": s / 5, "peak_mb": 100 + s} for each, s in zip(times, seconds, strict=True)]


ROWS = [
    Row("A", "torch fp32", "one", {"weights_mb": 900.0}, runs(100, 120, 110)),
    Row("A", "ours quota-30", "one", {"weights_mb": 300.0}, runs(55)),
    Row("A", "ORT int4", "one", note="not installed"),
    Row("B", "ours quota-30", "two", {"weights_mb": 300.0}, runs(55)),
]


def test_csv_has_medians_spread_and_ratios_of_the_same_run() -> None:
    head, *lines = as_csv(ROWS).splitlines()
    assert head == ",".join(COLUMNS)
    times = "110.00,100.00,120.00,220.00,11.00,10.00,12.00,22.00"
    assert lines[0].startswith(f"A,torch fp32,one,3,{times},1.000,1.000,90.91,,,,220.00,900.00,")
    assert ",0.500,0.500,181.82,,,,155.00,300.00," in lines[1]
    assert lines[2] == "A,ORT int4,one,0" + "," * 19 + "not installed"
    # The baseline of shape A is not a baseline for B.
    assert ",5.50,5.50,5.50,11.00,,," in lines[3]


def test_markdown_and_targets() -> None:
    text = as_markdown(ROWS)
    assert "| torch fp32 | 110 (100..120) | 1.00 | 11.0 (10.0..12.0) | 1.00 |  | 220 | 900 |" in text
    assert "- ORT int4: not installed" in text
    targets = [
        Target("A", "first_ms", "ours quota-30", "torch fp32", 0.6),
        Target("A", "peak_mb", "ours quota-30", "torch fp32", 0.5),
        Target("A", "first_ms", "ours quota-30", "ORT int4", 1.0),
    ]
    lines = targets_as_markdown(ROWS, targets).splitlines()[2:]
    assert lines == [
        "| A | first_ms | ours quota-30 | torch fp32 | 0.50 | 0.6 | yes |",
        "| A | peak_mb | ours quota-30 | torch fp32 | 0.70 | 0.5 | no |",
        "| A | first_ms | ours quota-30 | ORT int4 | not run | 1.0 |  |",
    ]
    assert busyness(ROWS) == 2 and busyness([]) is None


def test_targets_against_the_best_peer_two_threads_a_batch_and_the_bandwidth() -> None:
    known = {"weights_mb": 1.0, "step_mb": 30.0, "read_gbps": 10.0}
    rows = [
        Row("A", "torch fp32", "one", known, runs(100)),
        Row("A", "llama.cpp Q4_0", "one", known, runs(40)),
        Row("A", "llama.cpp Q4_0", "two", known, runs(1)),
        Row("A", "ours", "one", known, [{**each, "kv_mb": 10.0} for each in runs(20)]),
        Row("A", "ours, 2 threads", "one", {**known, "threads": 2}, runs(10)),
        Row("A", "ours, batch 8", "one", {**known, "batch": 8}, runs(30)),
    ]
    targets = [
        # 20 ms over the 40 of the fastest other runtime in the same run.
        Target("A", "first_ms", "ours", BEST_PEER, 0.5),
        # 2 ms for 40 MB, which take 4 ms at 10 GB/s.
        Target("A", "decode_ms", "ours", READING, 1.43),
        # By the wall clock: 20 ms over 40.
        Target("A", "first_wall_ms", "ours, 2 threads", "ours", 0.56),
        Target("A", "first_ms", "ours, 2 threads", "ours", 1.0),
        # 3 ms over 2 for eight tokens instead of one.
        Target("A", "decode_ms", "ours, batch 8", "ours", 1.0),
        Target("A", "tokens_per_s", "ours", "ours, batch 8", 1.0),
    ]
    lines = targets_as_markdown(rows, targets).splitlines()[2:]
    assert [line.split(" | ")[4] for line in lines] == ["0.50", "0.50", "0.50", "1.00", "1.50", "0.19"]
    assert "A,ours,one,1," in as_csv(rows) and ",500.00,30.00,10.00,2.000," in as_csv(rows)


def test_a_page_says_machine_artifacts_targets_and_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "One.\n\nFast: see [it](docs/results/cpu-avx2.md), [x](SECURITY.md).\n\nTwo.", "utf-8"
    )
    monkeypatch.setattr(cpu_page, "ROOT", tmp_path)
    known = {"versions": {"torch": "2"}, "read_gbps": 9.0, "threads": 1, "settings": "all", "recipe": "version: 1\n"}
    text = cpu_page.page([Row("A", "ours w4a4kv4", "one", known, runs(5))], "avx2", "avx2", 32)
    assert text.startswith("# Whole answers on one CPU core: avx2\n") and "--instruction-set avx2" in text
    assert "- one core: 9.0 GB/s" in text and "- A, ours w4a4kv4: all" in text and "```yaml\nversion: 1\n```" in text
    assert "> Fast: see [it](cpu-avx2.md), [x](../../SECURITY.md)." in text and "One." not in text
    assert all(len(line) <= cpu_page.WIDTH or line.startswith(("|", "-", ">")) for line in text.splitlines())


@pytest.mark.parametrize(
    ("flags", "name"),
    [("avx2 avx512f avx512_vnni amx_int8", "amx"), ("avx2 avx512f avx512_vnni", "avx512-vnni"), ("avx2", "avx2")],
)
def test_a_page_is_named_after_the_best_instruction_set(flags: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_processor, "flags", flags.split)
    assert kind() == name and kind("portable") == f"portable-on-{name}"


@pytest.mark.parametrize("name", ["tiny-A", "tiny-B", "A", "B", "growth-8", "testbed"])
def test_prompts_hold_the_picture_and_the_text(name: str) -> None:
    shape = SHAPES[name]
    found = inputs(shape, seed=3)
    ids = found["input_ids"]
    assert ids.shape == (1, shape.visual_tokens + shape.text_tokens) and ids.max() < shape.vocabulary
    assert (ids[0, BEFORE : BEFORE + shape.visual_tokens] == shape.image_token).all()
    assert (ids == shape.image_token).sum() == shape.visual_tokens
    again, other = inputs(shape, seed=3), inputs(shape, seed=4)
    assert all(np.array_equal(found[key], again[key]) for key in found)
    assert not np.array_equal(found["pixel_values"], other["pixel_values"])
    twice = asked_inputs(shape.changed(text_tokens=BEFORE + 2), {"prompt": 0, "batch": 2})
    assert twice["input_ids"].shape == (2, shape.visual_tokens + BEFORE + 2)


def test_the_two_shapes_are_those_of_the_issue() -> None:
    assert SHAPES["A"].visual_tokens == SHAPES["B"].visual_tokens == 576
    assert (SHAPES["B"].side // SHAPES["B"].patch) ** 2 == 2304


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four toy peers instead of the real ones; the scripts are in a separate folder."""
    for name, text in (("worker.py", WORKER), ("maker.py", MAKER)):
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setattr(cpu, "HERE", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(cpu_peers.HERE))
    monkeypatch.setattr(cpu, "environment", lambda *_: {"PYTHONPATH": str(cpu_peers.HERE)})
    monkeypatch.setattr(cpu, "bandwidth", lambda cores: 10.0 * len(cores))
    monkeypatch.setattr(cpu_peers, "MAKES", MAKES)
    monkeypatch.setitem(MAKES, "toy", Make("toy", "maker.py", depends=()))
    monkeypatch.setitem(MAKES, "elsewhere", Make("elsewhere", "maker.py", python="nowhere", depends=()))
    toy = {
        "torch fp32": Peer("torch fp32", "worker.py", "toy", "", ("10",)),
        "fast": Peer("fast", "worker.py", "toy", "", ("5",)),
        "broken": Peer("broken", "worker.py", "toy", "", ("broken",)),
        "tired": Peer("tired", "worker.py", "toy", "", ("tired",)),
        "absent": Peer("absent", "worker.py", "elsewhere", "", ("1",)),
    }
    for name in [*PEERS]:
        monkeypatch.delitem(PEERS, name)
    for name, peer in toy.items():
        monkeypatch.setitem(PEERS, name, peer)
    return tmp_path


def test_the_road_with_toy_peers(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All answer in turns; a peer that fails to load or to answer, or is not installed, gets a line with the reason."""
    out = toys / "results" / "cpu"
    arguments = ["--shapes", "tiny-A", "--rounds", "3", "--new-tokens", "7", "--build", str(toys / "build")]
    assert cpu.main([*arguments, "--out", str(out)]) == 0
    rows = {row["peer"]: row for row in json.loads((toys / "build" / STORE).read_text("utf-8"))}
    # Round 0 does not count.
    assert [run["first_core_ms"] for run in rows["fast"]["runs"]] == [6.0, 7.0, 8.0]
    assert rows["fast"]["runs"][0]["tokens"] == 7 and rows["fast"]["runs"][0]["peak_mb"] > 1
    assert "no such engine" in rows["broken"]["note"] and not rows["broken"]["runs"]
    assert "MemoryError: too much" in rows["tired"]["note"] and not rows["tired"]["runs"]
    assert rows["absent"]["note"].startswith("not installed: python tests/bench/cpu.py --install-nowhere")
    page = out.with_suffix(".md").read_text("utf-8")
    assert "| fast | 7.0 (6.0..8.0) | 0.58 |" in page and "- absent: not installed" in page
    order = [line for line in capsys.readouterr().err.splitlines() if "round 2" in line]
    assert [line.split(": ")[2] for line in order] == ["torch fp32", "fast"]


def test_rows_of_other_peers_stay(toys: Path) -> None:
    """A second run of some peers replaces only their rows, and existing folders are not rebuilt."""
    arguments = ["--shapes", "tiny-A", "--rounds", "1", "--new-tokens", "2", "--build", str(toys / "build")]
    assert cpu.main([*arguments, "--out", str(toys / "cpu")]) == 0
    (toys / "maker.py").write_text("raise SystemExit(1)", "utf-8")
    assert cpu.main([*arguments, "--out", str(toys / "cpu"), "--peers", "torch"]) == 0
    rows = {row["peer"]: row for row in json.loads((toys / "build" / STORE).read_text("utf-8"))}
    assert set(rows) == {"torch fp32", "fast", "broken", "tired", "absent"}
    assert rows["torch fp32"]["runs"] and rows["fast"]["runs"]


def test_a_folder_is_made_again_when_its_sources_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests" / "bench").mkdir(parents=True)
    monkeypatch.setattr(cpu_peers, "ROOT", tmp_path)
    make = Make("x", "maker.py", depends=("one.py",))
    (tmp_path / "one.py").write_text("1", "utf-8")
    before = make.key()
    assert make.key() == before
    (tmp_path / "one.py").write_text("2", "utf-8")
    changed = make.key()
    (tmp_path / "tests" / "bench" / "maker.py").write_text("3", "utf-8")
    assert len({before, changed, make.key()}) == 3


def test_every_folder_depends_on_files_that_exist() -> None:
    for make in MAKES.values():
        found = [[*cpu_peers.ROOT.glob(pattern)] for pattern in (*make.depends, f"tests/bench/{make.script}")]
        assert all(paths and all(path.is_file() for path in paths) for paths in found), make.folder
        assert make.key() == make.key()


@pytest.mark.slow
def test_profile_names_graphs_operators_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = SHAPES["tiny-A"]
    sample = model_inputs(shape, {"prompt": 1})
    qpcompile.compile(build(shape), "none", calibration=[sample]).save_pretrained(tmp_path / "model")
    threads = torch.get_num_threads()
    cpu_profile.main("tiny-A", str(tmp_path / "model"), "1")
    torch.set_num_threads(threads)
    head, _, *table = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in table[2:]]
    assert {"vision", "prefill"} <= {row[0] for row in rows}
    assert [float(row[4]) for row in rows] == sorted((float(row[4]) for row in rows), reverse=True)
    attended = next(row for row in rows if row[:2] == ["prefill", "attend"])
    tokens = shape.visual_tokens + shape.text_tokens
    assert attended[2] == str([1, shape.heads, tokens, shape.width // shape.heads]) and int(attended[3]) == shape.layers
    assert float(head.split(" ms")[0]) > 0
