"""The functions that lmms-eval requires of a task: the picture, the text, and whether an answer is right."""

from __future__ import annotations

from typing import Any

from PIL import Image


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question; `image` is an absolute path."""
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc: dict[str, Any], **_: Any) -> str:
    """The question."""
    return doc["question"]


def results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Exact match."""
    return {"exact": float(answers[0].strip() == doc["answer"])}
