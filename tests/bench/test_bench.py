"""The parts of the GPU benchmark that need no GPU: statistics, the table, and the refusal."""

import subprocess
import sys
from pathlib import Path

import gpu_answers
import pytest
import torch
from gemm_layers import LAYERS, Layer
from gemm_table import COLUMNS, Ceiling, Row, as_csv, as_markdown, floor
from gpu_answers import Row as Answered
from gpu_models import MODELS
from gpu_timing import Times, copies_beyond, summary

from qpcompile.kernels.linear_int.tuning import BUCKETS

LAYER = Layer("Model", "o", 1000, 500)
CEILING = Ceiling({"int8": 2e12, "bf16": 1e12}, bandwidth=1e9)


def row(tokens: int, kernel: str, kind: str, microseconds: float | None, size: int = 1000, note: str = "") -> Row:
    """One row on LAYER, with a spread of 10 % up and down."""
    seconds = None if microseconds is None else microseconds / 1e6
    times = None if seconds is None else Times(seconds, 0.9 * seconds, 1.1 * seconds)
    return Row(LAYER, tokens, kernel, kind, size, times, note)


ROWS = [
    row(1, "ours", "int8", 5.0),
    row(1, "base", "bf16", 20.0, 2000),
    row(64, "ours", "int8", 64.0),
    row(64, "base", "bf16", None, note="out of luck"),
]


def test_summary_is_the_median_and_a_tenth_from_either_end() -> None:
    assert summary([*range(20, 0, -1), 1000]) == Times(11, 3, 19)
    assert summary([7.0]) == Times(7.0, 7.0, 7.0)


def test_copies_are_twice_the_cache_and_at_least_two() -> None:
    assert [copies_beyond(60, size) for size in (1, 50, 60, 1000)] == [120, 3, 2, 2]


def test_floor_is_the_longer_of_products_and_bytes() -> None:
    # One token: 1e6 operations at 2e12 take 0.5 us, 1,000 bytes at 1e9 take 1 us; 64 tokens: 32 us against 1 us.
    assert [floor(each, CEILING) for each in ROWS[::2]] == pytest.approx([1e-6, 32e-6])


def test_csv() -> None:
    head, *lines = as_csv(ROWS, CEILING, "base").splitlines()
    assert head == ",".join(COLUMNS)
    assert lines[0] == "Model,o,1000,500,1,ours,5.00,4.50,5.50,0.20,0,0.20,4.00,"
    assert lines[1] == "Model,o,1000,500,1,base,20.00,18.00,22.00,0.05,0,0.10,1.00,"
    # Without the baseline there is no ratio; what did not run says why.
    assert lines[2] == "Model,o,1000,500,64,ours,64.00,57.60,70.40,1.00,0,0.50,,"
    assert lines[3] == "Model,o,1000,500,64,base,,,,,,,,out of luck"
    assert all(line.count(",") == len(COLUMNS) - 1 for line in lines)


def test_markdown() -> None:
    assert as_markdown(ROWS, "base").splitlines() == [
        "### Model o: 1000 x 500",
        "",
        "| us (times base) | 1 | 64 |",
        "| --- | --- | --- |",
        "| ours | 5.0 (4.00) | 64.0 |",
        "| base | 20.0 (1.00) | - |",
    ]


def test_layers_are_the_models() -> None:
    llava = sum(each.out_features * each.in_features for each in LAYERS if each.model == "LLaVA-1.5-7B")
    assert llava == 4096 * (4 * 4096 + 3 * 11008)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "gpu_answers.py", "gpu_session.py", "tune.py"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    pytest.importorskip("triton", reason="the extra `triton` is not installed")
    path = Path(__file__).with_name(script)
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "CUDA GPU" in ran.stderr and "Traceback" not in ran.stderr


def answered(peer: str, batch: int, first: float, decode: float) -> Answered:
    """A row of the benchmark of answers."""
    times = {"first_ms": first, "decode_ms": decode}
    return Answered("LLaVA-1.5-7B", peer, batch, {**dict.fromkeys(gpu_answers.FIELDS[:9], 7.0), **times})


def test_answers_are_compared_with_torch_compile() -> None:
    rows = [
        answered("torch:compile", 1, 50, 4),
        answered("ours:quota-30", 1, 20, 2),
        answered("torch:compile", 16, 400, 8),
        Answered("LLaVA-1.5-7B", "ours:quota-30", 16, note="exit 1: no memory"),
    ]
    head, *lines = (line.split(",") for line in gpu_answers.as_csv(rows).splitlines())
    assert [line[head.index("times_first")] for line in lines] == ["1.000", "2.500", "1.000", ""]
    assert [line[head.index("note")] for line in lines] == ["", "", "", "exit 1: no memory"]
    text = gpu_answers.as_markdown(rows)
    assert "| quota-30 | 20.0 | 2.50 | 2.00 | 2.00 | 500 | 7 | 7 | 7 |" in text
    assert "- LLaVA-1.5-7B, quota-30, batch 16: exit 1: no memory" in text
    assert "| LLaVA-1.5-7B | 1 | decode | 2.2 | 2.00 |" in text
    assert "| LLaVA-1.5-7B | 16 | first | 3.0 | not run |" in text


def test_the_seven_billion_are_the_models() -> None:
    for name, layer in (("LLaVA-1.5-7B", "qkv"), ("Qwen2.5-VL-7B", "qkv")):
        shape = MODELS[name]
        rows = shape.width + 2 * shape.width // shape.heads * shape.kv_heads
        sizes = {(each.out_features, each.in_features) for each in LAYERS if each.model == name and each.name == layer}
        assert sizes == {(rows, shape.width)}
        assert shape.visual_tokens + shape.text_tokens == 640


@pytest.mark.slow
def test_the_road_of_answers(tmp_path: Path) -> None:
    settings = ["--batches", "1", "2", "--new-tokens", "3", "--rounds", "1", "--out", str(tmp_path)]
    peers = ["--peers", "torch:eager", "ours:w4a4kv4"]
    assert gpu_answers.main(["--device", "cpu", "--models", "tiny-B", *peers, *settings]) == 0
    head, *lines = ((tmp_path / "answers-cpu.csv").read_text("utf-8")).splitlines()
    assert len(lines) == 4 and all(line.endswith(",") for line in lines)
    kv = [float(line.split(",")[head.split(",").index("kv_mb")]) for line in lines]
    assert kv[1] > kv[0] > kv[2] > 0


def test_tiles_that_matter_come_first_and_none_is_left_out() -> None:
    pytest.importorskip("triton", reason="the extra `triton` is not installed")
    from tune import by_weight, start_table

    places = by_weight()
    assert len(set(places)) == len(places) and set(places) == set(start_table("NVIDIA H200", 132).tiles)
    assert places[0][2] == 16 and places[0][0] == 37888 and places[len(places) // len(BUCKETS)][2] == 1024
