"""A model that counts up from the number in its prompt, one letter a token, with a pause after each."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch

END = 0


class CountingProcessor:
    """Letters are tokens: a is 1. A prompt is the last text of its conversation."""

    chat_template = "letters"

    def apply_chat_template(self, conversations: list[Any], **_: Any) -> dict[str, torch.Tensor]:
        """i64[B, longest], left-padded with 0."""
        texts = [conversation[-1]["content"][-1]["text"] for conversation in conversations]
        if "?" in "".join(texts):
            raise ValueError("a question mark")
        rows = [[ord(letter) - 96 for letter in text] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """Letters, beginning again after z."""
        assert skip_special_tokens
        return ["".join(chr(96 + (token - 1) % 26 + 1) for token in row) for row in rows]


class CountingModel:
    """Ends a row whose prompt begins with e at once, and every other one never."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=END)

    def __init__(self, pause: float = 0.01) -> None:
        self.pause, self.steps = pause, list[int]()
        self.seeds = list[int]()

    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int, streamer: Any, stopping_criteria: Any, **settings: Any
    ) -> None:
        """transformers' loop in short."""
        self.seeds.append(torch.initial_seed())
        streamer.put(input_ids)
        last = input_ids[:, -1]
        ends = input_ids[:, -1] == ord("e") - 96
        for _ in range(max_new_tokens):
            time.sleep(self.pause)
            self.steps.append(len(input_ids))
            last = torch.where(ends, END, last + 1)
            streamer.put(last)
            if bool((stopping_criteria(input_ids, None) | ends).all()):
                break
        streamer.end()
