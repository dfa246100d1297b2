"""Evaluate one row: a model under a recipe answers all questions; accuracy and cost are measured."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from qpcompile.capture.data_folder import Question, check_questions, question_inputs
from qpcompile.capture.right_answers import right_answers
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.artifact.weights import stored_tensors
from qpcompile.errors import CalibrationError, QPCompileError
from qpcompile.evaluate.questions.data_sets import folder_digest, questions_digest
from qpcompile.evaluate.questions.scienceqa import COLUMNS
from qpcompile.evaluate.questions.scoring import choose
from qpcompile.evaluate.run.accuracy import Generate, answer
from qpcompile.evaluate.run.flops import Decoder
from qpcompile.evaluate.run.footprint import cache_footprint
from qpcompile.evaluate.run.rows import GroupScore, Row, Scoring, row_id
from qpcompile.progress import track
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.versions import package_versions

# Number of questions asked one at a time to measure the cache, and of those whose kept tokens are recorded.
CACHES_MEASURED, KEPT_NOTED = 8, 4


@dataclass(frozen=True)
class Exam:
    """The questions and how they are asked and scored."""

    data: str
    questions: Sequence[Question]
    scoring: Scoring = "choice"
    batch_size: int = 16
    max_new_tokens: int = 16

    @cached_property
    def digest(self) -> str:
        """Hash of the questions."""
        return questions_digest(self.questions)

    @property
    def sized(self) -> list[int]:
        """Places of the questions that sizes are means over: those with a picture; all where none has one."""
        places = range(len(self.questions))
        return [place for place in places if self.questions[place].image is not None] or list(places)


@dataclass(frozen=True)
class Prompt:
    """Sizes of one question's prompt: tokens, and operations of tower and projector."""

    visual: int
    text: int
    picture_flops: int


@dataclass(frozen=True)
class Subject:
    """A model under evaluation. `plan` is None for a transformers model in full precision."""

    generate: Generate
    processor: Any
    config: Any
    plan: Plan | None
    weight_bytes: int
    cache_bytes: Callable[[dict[str, Any], int], int]
    kept: Callable[[dict[str, Any]], Mapping[int, torch.Tensor]] = field(default=lambda inputs: {})

    @classmethod
    def full_precision(cls, model: Any, processor: Any) -> Subject:
        """A transformers model; its bytes are counted as fp16."""

        def cache_bytes(inputs: dict[str, Any], tokens: int) -> int:
            return cache_footprint(model.generate, inputs, tokens).fp16

        weights = sum(2 * parameter.numel() for parameter in model.parameters())
        return cls(model.generate, processor, model.config, None, weights, cache_bytes)

    @classmethod
    def compiled(cls, compiled: CompiledVLM, processor: Any) -> Subject:
        """A compiled model; codes and scales count as stored, floating-point tensors as fp16."""

        def cache_bytes(inputs: dict[str, Any], tokens: int) -> int:
            compiled.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            assert compiled.machine.last is not None
            tensors = compiled.machine.last.tensors
            return sum(_bytes(tensor, name.endswith((".key", ".value"))) for name, tensor in tensors.items())

        stored = stored_tensors(compiled.program).tensors
        weights = sum(_bytes(tensor, not name.endswith("_scale")) for name, tensor in stored.items())

        def kept(inputs: dict[str, Any]) -> Mapping[int, torch.Tensor]:
            of_prompt = compiled.plan.cuts and compiled.plan.cuts[0].states is None
            return compiled.kept_tokens(**inputs) if of_prompt else {}

        return cls(compiled.generate, processor, compiled.config, compiled.plan, weights, cache_bytes, kept)


def model_digest(source: str) -> str:
    """Hash of a model's folder; of a hub name, the name."""
    folder = Path(source)
    return folder_digest(folder) if folder.is_dir() else source


def identity(model: str, recipe: Recipe | None, exam: Exam, calibration: str | None) -> str:
    """The id of a row; its seed is the recipe's.

    Args:
        model: the result of `model_digest`.
        calibration: hash of the questions that samples are drawn from.
    """
    return row_id(
        {
            "model": model,
            "recipe": None if recipe is None else recipe.to_yaml(),
            "calibration": None if recipe is None else calibration,
            "data": exam.digest,
            "scoring": exam.scoring,
            "max_new_tokens": exam.max_new_tokens,
            "versions": package_versions(),
        }
    )


def evaluate(
    subject: Subject,
    exam: Exam,
    prompts: Sequence[Prompt],
    *,
    name: str,
    model: str,
    id: str,
    compile_seconds: float = 0.0,
) -> Row:
    """Ask all questions and measure. `prompts` holds the sizes of every question's prompt, in order."""
    started = time.monotonic()
    answers = ask(subject.generate, subject.processor, exam, name)
    seconds = time.monotonic() - started
    right = right_answers(exam.questions, answers)
    sized = exam.sized
    asked, prompts = [exam.questions[place] for place in sized], [prompts[place] for place in sized]
    plan = subject.plan
    layers = subject.config.get_text_config().num_hidden_layers
    seen = [plan.visual_tokens(prompt.visual, prompt.text) if plan else (prompt.visual,) * layers for prompt in prompts]
    decoder = Decoder.of(subject.config)
    flops = [p.picture_flops + decoder.prompt(counts, p.text) for p, counts in zip(prompts, seen, strict=True)]
    whole = [p.picture_flops + decoder.prompt((p.visual,) * layers, p.text) for p in prompts]
    some = [question_inputs(subject.processor, [question]) for question in asked[:CACHES_MEASURED]]
    return Row(
        id=id,
        name=name,
        model=model,
        data=exam.data,
        data_sha256=exam.digest,
        recipe=plan.recipe.to_dict() if plan else None,
        seed=plan.recipe.calibration.seed if plan and plan.calibration.samples else None,
        calibration_samples=plan.calibration.samples if plan else 0,
        calibration_sha256=plan.calibration.sha256 if plan else None,
        scoring=exam.scoring,
        versions=package_versions(),
        source=source_digest(),
        questions=len(right),
        correct=sum(right),
        accuracy=sum(right) / len(right),
        right="".join("1" if mark else "0" for mark in right),
        answers=tuple(answers),
        groups=group_scores(exam.questions, right),
        visual_tokens=_mean([prompt.visual for prompt in prompts]),
        mean_visual_tokens=_mean([sum(counts) / len(counts) for counts in seen]),
        final_visual_tokens=_mean([counts[-1] for counts in seen]),
        flops=_mean(flops),
        flops_share=sum(flops) / sum(whole),
        weight_bytes=subject.weight_bytes,
        kv_bytes=_mean([subject.cache_bytes(inputs, exam.max_new_tokens) for inputs in some]),
        compile_seconds=compile_seconds,
        answer_seconds=seconds,
        plan=_plan(plan),
        kept=tuple(_kept(subject, inputs) for inputs in some[:KEPT_NOTED]),
    )


def prompt_sizes(
    exam: Exam, processor: Any, image_token: int, picture_flops: Callable[[dict[str, Any]], int]
) -> list[Prompt]:
    """Sizes of every question's prompt. `picture_flops` is called once per picture size, and once without a picture."""
    known: dict[str, int] = {}
    sizes = []
    with track("prompt sizes", len(exam.questions)) as step:
        for question in exam.questions:
            inputs = question_inputs(processor, [question])
            key = str(
                {k: tuple(v.shape) for k, v in inputs.items() if "pixel" in k} | {"grid": inputs.get("image_grid_thw")}
            )
            if key not in known:
                known[key] = picture_flops(inputs)
            visual = int((inputs["input_ids"] == image_token).sum())
            sizes.append(Prompt(visual, inputs["input_ids"].numel() - visual, known[key]))
            step()
    return sizes


def source_digest() -> str:
    """Hash of the package's Python files, 12 hex digits."""
    total = hashlib.sha256()
    root = Path(str(resources.files("qpcompile")))
    for folder in (root, root / "passes", root / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()[:12]


def ask(generate: Generate, processor: Any, exam: Exam, name: str) -> list[str]:
    """One answer per question, in order, asked in batches; `name` is the title of the progress bar."""
    check_questions(processor, exam.questions)
    check_without_picture(generate, processor, exam.questions)
    answers: dict[int, str] = {}
    with track(name, len(exam.questions)) as step:
        for places in _batches(exam):
            batch = [exam.questions[place] for place in places]
            if exam.scoring == "choice" and batch[0].choices:
                given = choose(generate, processor, batch)
            else:
                given = answer(generate, processor, batch, exam.max_new_tokens)
            answers |= zip(places, given, strict=True)
            for _ in batch:
                step()
    return [answers[place] for place in range(len(exam.questions))]


def check_without_picture(generate: Generate, processor: Any, questions: Sequence[Question]) -> None:
    """Ask the first question that has no picture for one token. Raises CalibrationError if the model takes none."""
    question = next((each for each in questions if each.image is None), None)
    if question is None:
        return
    try:
        inputs = question_inputs(processor, [question])
        with torch.no_grad():
            generate(**inputs, max_new_tokens=1, do_sample=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model that needs pictures says so in its own way
        cause = error.what if isinstance(error, QPCompileError) else f"{type(error).__name__}: {error}"
        raise CalibrationError(
            f"the model takes no question without a picture: {cause}",
            where=question.where,
            do="take another model, or leave the questions without a picture out: of ScienceQA, their numbers in "
            "pid_splits.json",
        ) from error


def _batches(exam: Exam) -> list[list[int]]:
    """Places of the questions of each batch: of one kind of scoring, all with a picture or none.

    A prompt without a picture is short: beside one with a picture most of its row would be padding.
    """
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for place, question in enumerate(exam.questions):
        kinds.setdefault((bool(question.choices), question.image is None), []).append(place)
    size = exam.batch_size
    return [places[first : first + size] for places in kinds.values() for first in range(0, len(places), size)]


def group_scores(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, GroupScore]:
    """The score of each group that questions count in: ScienceQA's columns, then others as they come."""
    marks: dict[str, list[bool]] = {}
    for question, mark in zip(questions, right, strict=True):
        for name in question.groups:
            marks.setdefault(name, []).append(mark)
    names = [*(name for name in COLUMNS if name in marks), *(name for name in marks if name not in COLUMNS)]
    return {name: GroupScore(right=sum(marks[name]), questions=len(marks[name])) for name in names}


def _kept(subject: Subject, inputs: dict[str, Any]) -> dict[str, list[int]]:
    """Layer -> raster indices of the visual tokens kept by its cut."""
    visual = (inputs["input_ids"][0] == subject.config.image_token_id).nonzero()[:, 0].tolist()
    raster = {position: index for index, position in enumerate(visual)}
    return {
        str(layer): [raster[position] for position in positions[0].tolist() if position in raster]
        for layer, positions in subject.kept(inputs).items()
    }


def _plan(plan: Plan | None) -> dict[str, Any]:
    """The token decisions and measurements of a plan."""
    if plan is None:
        return {}
    whole = plan.to_dict()
    return {key: whole[key] for key in ("candidate_layers", "facts", "sensitivity", "cuts")}


def _bytes(tensor: torch.Tensor, as_half: bool) -> int:
    """Bytes as stored, or two bytes per element for floating point."""
    return 2 * tensor.numel() if as_half and tensor.is_floating_point() else tensor.nbytes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
