"""Tokenizers of real models pass, and rules whose work grows without bound are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoProcessor

import qpcompile
from qpcompile.emit.artifact.tokenizer_file import check_tokenizer, check_tokenizers, pattern_problem, tokenizer_problem
from qpcompile.errors import ArtifactError, ExportError
from tests.families import llava

TESTBEDS = Path(__file__).resolve().parents[1] / "testbed"
# The patterns by which byte-level tokenizers split words, numbers, punctuation and spaces.
REAL = [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|(?<=\p{N})(?=(\p{N}{3})+)|[^\r\n\p{L}]?[\p{L}\p{M}]+",
    "[?.,!]",
    " {2,}",
]
WRONG = {
    r"(a+)+$": "repeats what has repeats",
    r"(?:a|b*)*c": "repeats what has repeats",
    r"((a{2,})b){2000}": "repeats what has repeats",
    r"(?:(?:a*b)?)+": "repeats what has repeats",
    r"\s*\s*\s*\s*x": "after one another",
    r"(?:a*){2}b*c*": "after one another",
    r"(?:a|aa)+$": "repeats what has repeats or choices",
    r"(aa?)+$": "repeats what has repeats or choices",
    r"(?:a|aa){60}$": "repeats what has repeats or choices",
    r"(a*)\1": "refers back",
    r"(?<x>a)\k<x>": "refers back",
    "a" * 5000: "characters",
}


@pytest.mark.parametrize("expression", REAL)
def test_expressions_of_real_tokenizers(expression: str) -> None:
    assert pattern_problem(expression) == ""


@pytest.mark.parametrize(("expression", "said"), WRONG.items())
def test_expressions_without_a_bound(expression: str, said: str) -> None:
    assert said in pattern_problem(expression)


def test_rules_without_a_bound() -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    many = {"normalizer": {"type": "Sequence", "normalizers": [double] * 60}}
    assert "times as long" in tokenizer_problem(many)
    wide = {"padding": {"strategy": {"Fixed": 10**12}, "pad_id": 0}}
    assert "pads to" in tokenizer_problem(wide)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}}
    deep = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [split]}]}}
    assert "pre_tokenizer: the expression" in tokenizer_problem(deep)
    spaces: dict[str, Any] = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}}
    assert tokenizer_problem(spaces) == ""


def test_files_are_read_wherever_they_lie(tmp_path: Path) -> None:
    for bed in ("llava", "qwen2_5_vl"):
        check_tokenizers(TESTBEDS / bed, ["tokenizer.json"])
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "tokenizer.json").write_text(json.dumps({"padding": {"pad_to_multiple_of": 2**40}}))
    with pytest.raises(ArtifactError, match="pads to") as caught:
        check_tokenizers(tmp_path, ["config.json", "part/tokenizer.json"])
    assert caught.value.where == "part/tokenizer.json" and caught.value.do


def test_compile_refuses_an_unbounded_tokenizer_before_it_begins() -> None:
    processor = AutoProcessor.from_pretrained(TESTBEDS / "llava")
    check_tokenizer(processor)
    processor.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    model, cases = llava()
    with pytest.raises(ExportError, match="repeats what has repeats") as caught:
        qpcompile.compile(model, "none", processor=processor, calibration=[cases["one"]])
    assert caught.value.where and caught.value.do
