"""One model and one set of questions: computes rows, and knows which are stored (row_runner.py stores them)."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qpcompile.capture.data_folder import check_questions, read_questions
from qpcompile.compiled import CompiledVLM
from qpcompile.evaluate.questions.data_sets import questions_digest
from qpcompile.evaluate.run.evaluation import (
    Exam,
    Prompt,
    Subject,
    check_without_picture,
    evaluate,
    identity,
    model_digest,
    prompt_sizes,
)
from qpcompile.evaluate.run.flops import picture_flops
from qpcompile.evaluate.run.rows import Row, RowFolder
from qpcompile.evaluate.run.shared_features import SharedFeatures
from qpcompile.evaluate.run.workbench import Workbench
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine


class Examiner:
    """One model, one set of questions, many recipes. Nothing is loaded before it is needed.

    Args:
        source: folder or hub name of a transformers model.
        exam: the questions.
        calibration: folder that samples are drawn from, or None for recipes that need none.
        kept: the folder of stored rows; None: none are stored.
        device: where compiles compute; by default the processor.
    """

    def __init__(
        self,
        source: str,
        exam: Exam,
        calibration: Path | None,
        kept: RowFolder | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.source, self.exam, self.calibration, self.kept, self.device = source, exam, calibration, kept, device
        self.features = SharedFeatures()
        self._digest = None if calibration is None else questions_digest(read_questions(calibration))

    def id(self, recipe: Recipe | None) -> str:
        """The id of a recipe's row; None is full precision."""
        return identity(self._model, recipe, self.exam, self._digest)

    def known(self, recipe: Recipe | None) -> Row | None:
        """The stored row, if there is one."""
        return None if self.kept is None else self.kept.get(self.id(recipe))

    def compute(self, name: str, recipe: Recipe | None) -> Row:
        """Compute the row of a recipe; of the model itself where it is None. Stores nothing."""
        # First, since a compile is long: this asks whether the model takes the questions.
        bench, prompts, started = self.bench, self.prompts, time.monotonic()
        if recipe is None:
            subject = Subject.full_precision(bench.model, bench.processor)
        else:
            compiled = bench.compile(recipe)
            self.features.serve(compiled)
            subject = Subject.compiled(compiled, bench.processor)
        seconds = time.monotonic() - started
        return evaluate(
            subject,
            self.exam,
            prompts,
            name=name,
            model=self.source,
            id=self.id(recipe),
            compile_seconds=seconds if recipe is not None else 0.0,
        )

    @cached_property
    def _model(self) -> str:
        return model_digest(self.source)

    @cached_property
    def bench(self) -> Workbench:
        """The model, loaded and ready to be compiled."""
        return Workbench(self.source, self.calibration, self.device)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Sizes of all prompts, measured on the captured graphs. Raises CalibrationError for questions that the model,
        or its graphs, do not take.
        """
        model: Any = self.bench.model
        processor, questions = self.bench.processor, self.exam.questions
        check_questions(processor, questions)
        check_without_picture(model.generate, processor, questions)
        program, _ = self.bench.captured(Recipe())
        with Machine(program) as machine:
            check_without_picture(machine.generate, processor, questions)
        token = model.config.image_token_id
        return prompt_sizes(self.exam, processor, token, lambda inputs: picture_flops(program, inputs))


def artifact_row(source: str, compiled: CompiledVLM, processor: object, exam: Exam, kept: RowFolder | None) -> Row:
    """The row of a compiled folder."""
    id = identity(model_digest(source), compiled.recipe, exam, None)
    if kept is not None and (found := kept.get(id)):
        return found
    check_questions(processor, exam.questions)
    check_without_picture(compiled.generate, processor, exam.questions)
    token = compiled.config.image_token_id
    # Counting binds the host to another machine; rebind it to the model's afterwards.
    prompts = prompt_sizes(exam, processor, token, lambda inputs: picture_flops(compiled.program, inputs))
    subject = Subject.compiled(CompiledVLM(compiled.program, processor), processor)
    row = evaluate(subject, exam, prompts, name=Path(source).name, model=source, id=id)
    if kept is not None:
        kept.add(row)
    return row
