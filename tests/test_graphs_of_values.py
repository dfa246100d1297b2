"""A model whose tower has graphs of some values only: answered, quantized, saved and loaded as others are."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llava
from programs import changed_recipe

import qpcompile
from qpcompile.capture import capture as capturing
from qpcompile.capture.samples import Samples
from qpcompile.emit.artifact.weights import stored_tensors, total_bytes
from qpcompile.errors import ArtifactError, CaptureError, ExportError
from qpcompile.ir.edit import calls
from qpcompile.ir.operators import LINEAR_INT
from qpcompile.ir.program import PROJECTOR, VISION, Graph
from qpcompile.pipeline import compile_captured
from qpcompile.runtime.fixed_values import VALUES
from qpcompile.runtime.machine import Machine

SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
W4A8 = ("quantize.scope=[vision, language]", "quality.samples=0")


def refused(graph: Graph) -> None:
    if graph.name == VISION:
        raise CaptureError("its code reads sizes", where="tower", do="report it")


def test_a_tower_of_two_sets_of_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, cases = llava()
    monkeypatch.setattr(capturing, "check_sizes", refused)
    program = capturing.capture(model, cases["one"], changed_recipe("w4a8kv4", *W4A8), [cases["pictures"]])
    towers = [graph for graph in program.graphs.values() if graph.name.startswith(VISION)]
    assert [graph.name for graph in towers] == [VISION, "vision.1"] and VALUES not in program.graphs[
        PROJECTOR
    ].constants
    (left,) = program.plan.left_out
    assert "its code reads sizes" in left.reason and "pixel_values [1, 3," in left.reason

    ran: list[str] = []
    with Machine(program, lambda graph, feeds: ran.append(graph.name) or graph(feeds)) as machine:
        for case in ("one", "pictures"):
            expected = model.generate(**cases[case], **SETTINGS)  # type: ignore[operator]
            with torch.no_grad():
                assert torch.equal(machine.generate(**cases[case], **SETTINGS), expected)
        assert {VISION, "vision.1"} < set(ran) and not machine.noted
        # Another number of pictures is answered by the model's own code, and said once.
        ran.clear()
        more = {key: torch.cat([value] * 3) for key, value in cases["one"].items()}
        with caplog.at_level(logging.WARNING, logger="qpcompile"), torch.no_grad():
            answers = [machine.generate(**more, **SETTINGS) for _ in range(2)]
        assert torch.equal(answers[0], model.generate(**more, **SETTINGS))  # type: ignore[operator]
        assert not any(name.startswith(VISION) for name in ran)
        assert caplog.text.count("vision has no graph of") == 1

    compiled = compile_captured(program, None, Samples([cases["one"], cases["pictures"]], None, 2, 0))
    first, second = (compiled.program.graphs[name] for name in (VISION, "vision.1"))
    packed = [[node.args[2] for node in calls(graph, LINEAR_INT)] for graph in (first, second)]
    assert len(packed[0]) == len(packed[1]) > 0
    stored = stored_tensors(compiled.program)
    assert stored.graphs[VISION].items() >= {
        (name, key) for name, key in stored.graphs["vision.1"].items() if "packed" in key
    }
    assert total_bytes(stored, "vision.1") <= total_bytes(stored, VISION)
    with pytest.raises(ExportError, match=r"a vision graph of .* only"):
        compiled.export_onnx(tmp_path / "onnx")
    # Of sizes that samples have, each traced through the graph of its values.
    compiled.export_onnx(tmp_path / "onnx", check=[cases["one"]])
    told = json.loads((tmp_path / "onnx" / "check.json").read_text(encoding="utf-8"))
    assert told["alike"] == told["answers"], told

    compiled.save_pretrained(tmp_path / "out")
    loaded = qpcompile.load(tmp_path / "out")
    for prompt in (cases["one"], cases["pictures"], more):
        assert torch.equal(loaded.generate(**prompt, **SETTINGS), compiled.generate(**prompt, **SETTINGS))
    owner = compiled.program.host.get_submodule(first.owner)
    next(owner.parameters()).data = torch.empty(0)
    compiled.save_pretrained(tmp_path / "less")
    with pytest.raises(ArtifactError, match="of some values only"):
        qpcompile.load(tmp_path / "less")
