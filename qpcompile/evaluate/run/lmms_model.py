"""A compiled model, or one to compile first, as a model of lmms-eval.

    lmms-eval eval --model qpcompile --model_args pretrained=out/ --tasks mmbench_en_dev
    lmms-eval eval --model qpcompile --model_args pretrained=MODEL,recipe=quota-30,calibration=photos/ --tasks mme

Generation tasks are supported; tasks that need the likelihood of given text are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from qpcompile.capture.chat import Conversation, chat_inputs
from qpcompile.capture.load import load_model
from qpcompile.compiled import load
from qpcompile.errors import CalibrationError, ModelError
from qpcompile.picture import read_picture
from qpcompile.pipeline import compile
from qpcompile.progress import track
from qpcompile.runtime.model_inputs import new_tokens

MAX_NEW_TOKENS = 1024
# Settings with the same name in lmms-eval's tasks and transformers' generate.
SETTINGS = ("max_new_tokens", "temperature", "top_p", "num_beams")


class LmmsModel(lmms):
    """See the module's docstring.

    Args:
        pretrained: a folder written by `qpcompile compile`, or the folder or hub name of a transformers model.
        recipe: preset or file to compile the model by; without one the model runs in full precision.
        calibration: data folder for the compile.
        batch_size: prompts answered at once.
        device: a torch device that the model moves to; without one it stays on the CPU.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        recipe: str | None = None,
        calibration: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval always gives it
        if unknown:
            raise ModelError(
                f"unknown model_args: {', '.join(sorted(unknown))}",
                where="lmms-eval --model_args",
                do="give pretrained, recipe, calibration and batch_size only",
            )
        self.batch_size = int(batch_size)
        self.model, self.processor = _open(pretrained, recipe, calibration)
        if device is not None:
            self.model.to(device)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One answer per request, in order; consecutive ones with equal settings and one picture each share a batch."""
        answers: list[str] = []
        with track("lmms-eval", len(requests)) as step:
            for batch in self._batches(requests):
                answers += self._answer(batch)
                for _ in batch:
                    step()
        return answers

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported: a compiled model takes the whole prompt at once."""
        raise ModelError("a compiled model takes the whole prompt at once", do="choose a task of one round")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported: answers are generated."""
        raise ModelError("answers are generated, not scored", do="choose a task with output_type generate_until")

    def _batches(self, requests: Sequence[Instance]) -> list[list[Instance]]:
        batches: list[list[Instance]] = []
        for request in requests:
            if not batches or len(batches[-1]) == self.batch_size or batches[-1][0].args[2] != request.args[2]:
                batches.append([])
            batches[-1].append(request)
        return batches

    def _answer(self, batch: Sequence[Instance]) -> list[str]:
        places = [f"task {request.args[4]}, {request.args[5]}, {request.args[3]}" for request in batch]
        conversations = [self._conversation(request, place) for request, place in zip(batch, places, strict=True)]
        made = chat_inputs(self.processor, conversations, places)
        device = self.model.device
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in made.items()}
        with torch.no_grad():
            tokens = self.model.generate(**inputs, **_settings(batch[0].args[2]))
        texts = self.processor.batch_decode(new_tokens(inputs, tokens), skip_special_tokens=True)
        return [_until(text, batch[0].args[2].get("until") or []) for text in texts]

    def _conversation(self, request: Instance, place: str) -> Conversation:
        """The messages of a request, every picture read as the command line reads it."""
        _, doc_to_messages, _, number, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
        _, videos, sounds = messages.extract_media()
        if videos or sounds:
            raise CalibrationError("only pictures can be shown", where=place, do="choose another task")
        conversation: Conversation = messages.to_hf_messages()
        for message in conversation:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = read_picture(part["image"], where=place)
        return conversation


def _open(pretrained: str, recipe: str | None, calibration: str | None) -> tuple[Any, Any]:
    if (Path(pretrained) / "manifest.json").is_file():
        compiled = load(pretrained)
        return compiled, compiled.processor
    model, processor = load_model(pretrained)
    if recipe is None:
        return model, processor
    return compile(model, recipe, processor=processor, calibration=calibration), processor


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    """Generation settings of a task as transformers takes them; temperature 0 means greedy."""
    found = {key: asked[key] for key in SETTINGS if asked.get(key) is not None}
    found.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    do_sample = bool(asked.get("do_sample") or found.get("temperature"))
    if not do_sample:
        found = {key: found[key] for key in found if key not in ("temperature", "top_p")}
    return {**found, "do_sample": do_sample}


def _until(text: str, ends: str | Sequence[str]) -> str:
    """The text before the first stop string, stripped."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()
