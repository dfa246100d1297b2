"""Calibration samples from any source, re-iterable, with one in memory at a time."""

from __future__ import annotations

import copy
import hashlib
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qpcompile.capture.data_folder import Question, check_questions, question_inputs, read_questions
from qpcompile.capture.sample import check_sample
from qpcompile.errors import CalibrationError, OutputError

Source = str | PathLike[str] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class _Spooled:
    """A sample stored on disk."""

    path: Path


class Samples:
    """Up to `limit` samples from a data folder, a sequence or any iterable of model inputs.

    Folders and sequences are sampled by `seed`, preserving order; other iterables are consumed from the start and
    spooled to disk, since they may not be re-iterable. Each sample is validated when it is reached; for a folder, texts
    and picture headers are validated up front. Up to `spare` more are set aside for `held_out`.

    Raises CalibrationError for an invalid source, and, with the sample's number, for errors of its iterator.
    """

    def __init__(self, source: Source, processor: Any, limit: int, seed: int, spare: int = 0) -> None:
        self.processor = processor
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        items: Sequence[Any]
        if isinstance(source, (str, PathLike)):
            if processor is None:
                raise CalibrationError("a data folder needs a processor", where=str(source), do="pass processor=...")
            items = read_questions(Path(source))
        elif isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise CalibrationError(
                f"calibration is one {type(source).__name__}, not several samples",
                where="calibration",
                do="give a list of samples ([inputs] for a single one), or the path of a data folder",
            )
        elif isinstance(source, Sequence):
            items = source
        else:
            items = self._keep(source, limit + spare)
        if not items:
            raise CalibrationError("there is no calibration sample", where="calibration", do="give at least one sample")
        drawn = range(limit) if self._spool else random.Random(seed).sample(range(len(items)), min(limit, len(items)))
        chosen = [index for index in sorted(drawn) if index < len(items)]
        others = sorted(set(range(len(items))) - set(chosen))
        spared = sorted(random.Random(seed).sample(others, min(spare, len(others))))
        self._example, self._items = items[0], [items[index] for index in chosen]
        self._spared = [items[index] for index in spared]
        named = [items[index] for index in sorted({0, *chosen, *spared})]
        check_questions(processor, [item for item in named if isinstance(item, Question)])
        self._digest: str | None = None
        # Samples are of one kind: if one has a prompt, the others have one too.
        self._prompts = False

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        total = hashlib.sha256()
        for number, item in enumerate(self._items):
            sample = self._inputs(item, number)
            if self._digest is None:
                _add(total, sample)
            yield sample
        self._digest = self._digest or total.hexdigest()

    def held_out(self, count: int) -> tuple[Samples, bool]:
        """Up to `count` samples to measure on, and whether they are apart from these: the spare ones, or else every
        fifth of these.
        """
        found = copy.copy(self)
        found._items = self._spared[:count] or self._items[::5][:count]
        found._spared, found._digest = [], None
        return found, bool(self._spared)

    def digest(self) -> str:
        """SHA-256 over all tensors of all samples, in order; computed during the first complete iteration."""
        for _ in self if self._digest is None else ():
            pass
        assert self._digest is not None
        return self._digest

    def example(self) -> dict[str, Any]:
        """The first sample of the source, drawn or not: models are traced with it, so that all draws share a trace."""
        return self._inputs(self._example, 0)

    def _inputs(self, item: Any, number: int) -> dict[str, Any]:
        if isinstance(item, Question):
            sample = question_inputs(self.processor, [item])
        else:
            sample = dict(load_file(item.path)) if isinstance(item, _Spooled) else _inputs_of(item, number)
        try:
            check_sample(sample, prompt=self._prompts)
        except CalibrationError as error:
            where = f"calibration sample {number}: {error.where}"
            raise CalibrationError(error.what, where=where, do=error.do) from None
        self._prompts = self._prompts or "input_ids" in sample
        return sample

    def _keep(self, source: Iterable[Mapping[str, Any]], limit: int) -> list[_Spooled]:
        self._spool = tempfile.TemporaryDirectory(prefix="qpcompile-samples-")
        try:
            return [self._spooled(sample, number) for number, sample in enumerate(_taken(source, limit))]
        except BaseException:
            self._spool.cleanup()
            raise

    def _spooled(self, sample: Any, number: int) -> _Spooled:
        assert self._spool is not None
        return _Spooled(
            _written(Path(self._spool.name) / f"{number:06d}.safetensors", _inputs_of(sample, number), number)
        )


def _taken(source: Iterable[Any], limit: int) -> Iterator[Any]:
    """The first `limit` items; errors of the iterable are reported with the item's number."""
    number = 0
    try:
        items = iter(source)
        while number < limit:
            yield next(items)
            number += 1
    except StopIteration:
        return
    except Exception as error:  # a user's iterable raises arbitrary exceptions
        raise CalibrationError(
            f"the iterable of samples raised {type(error).__name__}: {error}",
            where=f"calibration sample {number}",
            do="see that the iterable can be walked over by itself: list(calibration)",
        ) from error


def _inputs_of(sample: Any, number: int) -> dict[str, Any]:
    """A user's sample as a dict."""
    if not isinstance(sample, Mapping):
        raise CalibrationError(
            f"a sample is {type(sample).__name__}, not a dict of model inputs",
            where=f"calibration sample {number}",
            do='build samples with processor.apply_chat_template(..., return_dict=True, return_tensors="pt")',
        )
    return dict(sample)


def _add(total: hashlib._Hash, sample: dict[str, Any]) -> None:
    """Add the tensors of a sample to a digest."""
    for key in sorted(sample):
        if isinstance(sample[key], torch.Tensor):
            total.update(key.encode())
            # Through bytes: numpy has no bfloat16.
            total.update(sample[key].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _written(path: Path, sample: dict[str, Any], number: int) -> Path:
    """Store a sample, which may hold tensors only."""
    for key, value in sample.items():
        if not isinstance(value, torch.Tensor):
            raise CalibrationError(
                f"{key} is {type(value).__name__}, not a tensor: it cannot be kept on disk",
                where=f"calibration sample {number}",
                do='make tensors of it (return_tensors="pt"), or give the samples as a list, which stays in memory',
            )
    # Clones: two entries may share memory, which the file format cannot represent.
    tensors = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in sample.items()}
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"a calibration sample cannot be kept on disk: {error}",
            where=str(path),
            do="free some space there, or give the samples as a list or as a data folder",
        ) from error
    return path
