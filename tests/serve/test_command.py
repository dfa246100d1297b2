"""`qpcompile serve` as a process that a signal stops, and `qpcompile chat` on a terminal."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from serve.conftest import BEDS, as_uri, text_of
from typer.testing import CliRunner

from qpcompile.capture.chat import chat_inputs
from qpcompile.capture.data_folder import question_inputs, read_questions
from qpcompile.cli import main, talk
from qpcompile.compiled import CompiledVLM
from qpcompile.picture import read_picture

QUESTION = read_questions(BEDS / "calibration" / "llava")[0]


def test_a_signal_stops_it_after_the_answers_that_are_asked_for(model: CompiledVLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out")
    command = [sys.executable, "-m", "qpcompile", "serve", str(tmp_path / "out"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = iter(server.stderr)
        port = next(found.group(1) for line in lines if (found := re.search(r"running on http://[\d.]+:(\d+)", line)))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        picture = {"type": "image_url", "image_url": {"url": as_uri(QUESTION.picture)}}
        messages: Any = [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION.question}]}]
        stream = client.chat.completions.create(model="out", messages=messages, stream=True)
        server.send_signal(signal.SIGTERM)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text.strip() == text_of(model, question_inputs(model.processor, [QUESTION]), 64)
        assert server.wait(60) == 128 + signal.SIGTERM


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = CliRunner().invoke(main.app, ["serve", "out"])
    assert found.exit_code == 1 and 'pip install "qpcompile[serve]"' in found.output


def test_a_conversation_of_several_turns(model: CompiledVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk, "load_artifact", lambda folder: model)
    lines = [
        "what is this?",
        "/image /none.png",
        "and <image>?",
        "and that?",
        "/new",
        "/help",
        "hello",
        "/quit",
        "lost",
    ]
    command = ["chat", "out", "--image", str(QUESTION.picture), "--max-new-tokens", "4"]
    found = CliRunner().invoke(main.app, command, input="\n".join(lines))
    assert found.exit_code == 0, found.output
    told: list[dict[str, Any]] = []
    expected = []
    for text in ("what is this?", "and that?", None, "hello"):
        if text is None:
            told = []
            continue
        picture = [] if told or text == "hello" else [{"type": "image", "image": read_picture(QUESTION.picture)}]
        told = [*told, {"role": "user", "content": [*picture, {"type": "text", "text": text}]}]
        answer = text_of(model, chat_inputs(model.processor, [told], ["a test"]), 4)
        told = [*told, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        expected.append(answer)
    assert [line.strip() for line in found.stdout.splitlines()] == expected
    assert "/none.png is missing" in found.stderr and "which is a token of the model" in found.stderr
    assert found.stderr.count(talk.HELP) == 2
