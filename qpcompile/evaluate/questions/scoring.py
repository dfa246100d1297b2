"""Multiple choice: the most probable choice is the answer.

A question with choices is answered by the choice with the highest probability under the model:

    argmax over choices c of sum over its tokens t of log p(t | prompt, c before t)

c ends with the end token, unless all choices of a batch are one token long. Computed by constrained beam search in
`generate`: only tokens that continue a choice are allowed, and there are as many beams as choices, so no choice is
pruned. This works for every model with `generate`, including pruned caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qpcompile.capture.data_folder import Question, question_inputs
from qpcompile.runtime.model_inputs import after_prompt, new_tokens


def choose(generate: Callable[..., Any], processor: Any, questions: Sequence[Question]) -> list[str]:
    """The most probable choice of each question of a batch; every question has choices."""
    tokenizer = processor.tokenizer
    inputs = question_inputs(processor, questions)
    prompts = inputs["input_ids"].tolist()
    rows = [[tuple(tokenizer.encode(choice, add_special_tokens=False)) for choice in q.choices] for q in questions]
    short = all(len(tokens) == 1 for row in rows for tokens in row)
    end = () if short else (tokenizer.eos_token_id,)
    allowed = [[(*tokens, *end) for tokens in row] for row in rows]

    def continuations(row: int, ids: torch.Tensor) -> list[int]:
        past = tuple(after_prompt(prompts[row], ids.tolist()))
        following = {
            tokens[len(past)] for tokens in allowed[row] if tokens[: len(past)] == past and len(tokens) > len(past)
        }
        return sorted(following) or [tokenizer.eos_token_id]

    with torch.no_grad():
        tokens = generate(
            **inputs,
            max_new_tokens=max(len(choice) for row in allowed for choice in row),
            do_sample=False,
            num_beams=1 if short else max(len(row) for row in rows),
            length_penalty=0.0,
            prefix_allowed_tokens_fn=continuations,
        )
    return [
        question.choices[_index(row, new)]
        for question, row, new in zip(questions, allowed, new_tokens(inputs, tokens), strict=True)
    ]


def _index(choices: list[tuple[int, ...]], tokens: list[int]) -> int:
    """Which choice was generated; padding may follow."""
    return next(index for index, choice in enumerate(choices) if tuple(tokens[: len(choice)]) == choice)
