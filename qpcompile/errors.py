"""Exception classes, one per kind of user mistake; every message states what happened, where, and what to do."""

from collections.abc import Sequence


class QPCompileError(Exception):
    """Root of all errors of this package.

    what: what is wrong, with the value that was given. where: file, recipe key, layer, graph node or source line.
    do: the next step for the user. Only `what` is positional, so that pickling (pytest-xdist) works unchanged.
    """

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.do = do

    def __str__(self) -> str:
        return describe(self.what, where=self.where, do=self.do)


class RecipeError(QPCompileError):
    """A recipe that cannot be read, has an unknown key, or asks for something impossible."""


class ModelError(QPCompileError):
    """A model that is not a vision-language model, or cannot be loaded."""


class CaptureError(QPCompileError):
    """A component of the model could not be traced into a graph."""


class CalibrationError(QPCompileError):
    """Calibration samples are missing, empty, without a picture, or do not fit the model."""


class PlanError(QPCompileError):
    """No plan satisfies the recipe on this model, or a stored plan contradicts itself."""


class QualityError(QPCompileError):
    """A compiled model agrees less with full precision than the recipe demands."""


class InputError(QPCompileError):
    """An argument of `generate` is refused: an unsupported setting, or inputs that do not fit the model."""


class KernelError(QPCompileError):
    """An operator got unsupported arguments, or a kernel cannot run on this machine."""


class ArtifactError(QPCompileError):
    """A saved folder is incomplete, modified, of another version, or contains something that must not be loaded."""


class ExportError(QPCompileError):
    """A compiled model could not be written in another format."""


class OutputError(QPCompileError):
    """The output cannot be written: the folder exists, the disk is full, permission is missing."""


class WorkerError(QPCompileError):
    """Rows cannot be computed on Ray: none is reached, no machine is large enough, or workers are lost repeatedly."""


class RankError(QPCompileError):
    """The processes that share a compile cannot begin, do not agree, or one of them has ended."""


class InvariantError(QPCompileError):
    """A pass violated an invariant of its stage: a defect of the compiler, not of the input.

    ran: the pass that has just run (`capture` when none has). before: the passes that ran before it, in order.
    """

    def __init__(
        self,
        what: str,
        *,
        ran: str = "capture",
        before: Sequence[str] = (),
        where: str | None = None,
        do: str | None = None,
    ) -> None:
        super().__init__(what, where=where, do=do)
        self.ran = ran
        self.before = tuple(before)

    def __str__(self) -> str:
        history = f"after {self.ran} (before it: {', '.join(self.before) or 'nothing'})"
        where = history if self.where is None else f"{self.where}, {history}"
        return describe(self.what, where=where, do=self.do)


def describe(what: str, *, where: str | None = None, do: str | None = None) -> str:
    """One message: `what`, then a line each for `where` and `do` when known; later lines of each are indented."""
    lines = [what]
    lines += [f"  {label}: {text.replace(chr(10), chr(10) + '    ')}" for label, text in _known(where, do)]
    return "\n".join(lines)


def _known(where: str | None, do: str | None) -> list[tuple[str, str]]:
    """The labelled parts of a message that are given."""
    return [(label, text) for label, text in (("where", where), ("what to do", do)) if text]
