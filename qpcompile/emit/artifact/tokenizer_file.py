"""Static checks of tokenizer.json in artifacts and processors, by the rules that the ONNX runner has as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qpcompile.emit.artifact.folder import AGAIN, read_json
from qpcompile.emit.onnx.runner.tokenizer_rules import pattern_problem, tokenizer_problem
from qpcompile.errors import ArtifactError, ExportError

__all__ = ["check_tokenizer", "check_tokenizers", "pattern_problem", "tokenizer_problem"]

TOKENIZER = "tokenizer.json"


def check_tokenizers(folder: Path, files: list[str]) -> None:
    """Refuse tokenizers whose work is not bounded. Raises ArtifactError naming the file and the rule."""
    for path in files:
        if path.rpartition("/")[2] == TOKENIZER and (problem := tokenizer_problem(read_json(folder / path))):
            raise ArtifactError(f"the tokenizer cannot be used: {problem}", where=path, do=AGAIN)


def check_tokenizer(processor: Any) -> None:
    """Refuse a processor whose tokenizer no artifact may contain, before any work. Raises ExportError."""
    rules = getattr(getattr(processor, "tokenizer", None), "backend_tokenizer", None)
    if rules is not None and (problem := tokenizer_problem(json.loads(rules.to_str()))):
        raise ExportError(
            f"the tokenizer cannot be used: {problem}; no artifact may hold it",
            where=type(processor.tokenizer).__name__,
            do="give a processor whose tokenizer has simpler rules",
        )
