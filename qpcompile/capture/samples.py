"""Calibration samples: however they come, they can be walked over again, one in memory at a time."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qpcompile.capture.data_folder import Question, question_inputs, read_questions
from qpcompile.capture.sample import check_sample
from qpcompile.errors import CalibrationError, OutputError

Source = str | Path | Iterable[dict[str, Any]]


class Samples:
    """Up to `limit` samples from a data folder, a sequence or any iterable of model inputs.

    Folders and sequences are drawn from by `seed`, in their order; other iterables are taken from the start and kept
    on disk, since they may not be walked over twice. Each sample is checked when it is reached.
    """

    def __init__(self, source: Source, processor: Any, limit: int, seed: int) -> None:
        self.processor = processor
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        items: Sequence[Any]
        if isinstance(source, (str, Path)):
            if processor is None:
                raise CalibrationError("a data folder needs a processor", where=str(source), do="pass processor=...")
            items = read_questions(Path(source))
        elif isinstance(source, Sequence):
            items = source
        else:
            items = self._keep(source, limit)
        if not items:
            raise CalibrationError("there is no calibration sample", where="calibration", do="give at least one sample")
        chosen = sorted(random.Random(seed).sample(range(len(items)), min(limit, len(items))))
        self._items = [items[index] for index in chosen]
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        total = hashlib.sha256()
        for number, item in enumerate(self._items):
            sample = self._inputs(item)
            try:
                check_sample(sample)
            except CalibrationError as error:
                where = f"calibration sample {number}: {error.where}"
                raise CalibrationError(error.what, where=where, do=error.do) from None
            if self._digest is None:
                _add(total, sample)
            yield sample
        self._digest = self._digest or total.hexdigest()

    def digest(self) -> str:
        """SHA-256 over all tensors of all samples, in order; taken on the first walk over all of them."""
        for _ in self if self._digest is None else ():
            pass
        assert self._digest is not None
        return self._digest

    def _inputs(self, item: Any) -> dict[str, Any]:
        if isinstance(item, Question):
            return question_inputs(self.processor, [item])
        if isinstance(item, Path):
            return dict(load_file(item))
        return dict(item)

    def _keep(self, source: Iterable[dict[str, Any]], limit: int) -> list[Path]:
        self._spool = tempfile.TemporaryDirectory(prefix="qpcompile-samples-")
        try:
            pairs = zip(range(limit), source, strict=False)
            return [_written(Path(self._spool.name) / f"{number:06d}.safetensors", sample) for number, sample in pairs]
        except BaseException:
            self._spool.cleanup()
            raise


def _add(total: hashlib._Hash, sample: dict[str, Any]) -> None:
    """Take the tensors of a sample into a digest."""
    for key in sorted(sample):
        if isinstance(sample[key], torch.Tensor):
            total.update(key.encode())
            # By way of bytes: numpy has no bfloat16.
            total.update(sample[key].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _written(path: Path, sample: dict[str, Any]) -> Path:
    """Store the tensors of a sample."""
    tensors = {key: value.contiguous() for key, value in dict(sample).items() if isinstance(value, torch.Tensor)}
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"a calibration sample cannot be kept on disk: {error}",
            where=str(path),
            do="free some space there, or give the samples as a list or as a data folder",
        ) from error
    return path
