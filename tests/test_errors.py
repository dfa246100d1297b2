"""Every error has what, where and what to do."""

import inspect
import pickle

import pytest

from qpcompile import errors
from qpcompile.errors import InvariantError, ModelError, QPCompileError, describe

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, QPCompileError)]


def test_message_has_what_where_and_do() -> None:
    error = ModelError("no vision tower", where="config.json: model_type llama", do="give a vision-language model")
    assert str(error) == (
        "no vision tower\n  where: config.json: model_type llama\n  what to do: give a vision-language model"
    )
    assert (error.what, error.where, error.do) == (
        "no vision tower",
        "config.json: model_type llama",
        "give a vision-language model",
    )


def test_parts_that_are_unknown_are_left_out() -> None:
    assert describe("x") == "x"
    assert describe("x", do="y") == "x\n  what to do: y"
    assert describe("x", where="") == "x"


def test_later_lines_of_a_part_are_indented() -> None:
    assert describe("x", where="a.py:3\nreturn y") == "x\n  where: a.py:3\n    return y"


def test_invariant_error_names_the_passes() -> None:
    error = InvariantError(
        "two outputs", ran="insert-token-cuts", before=["canonicalize", "calibrate"], where="prefill"
    )
    assert str(error) == "two outputs\n  where: prefill, after insert-token-cuts (before it: canonicalize, calibrate)"
    assert "after capture (before it: nothing)" in str(InvariantError("x"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_documented_and_survives_pickling(kind: type[QPCompileError]) -> None:
    error = kind("what", where="there", do="this")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    assert inspect.getdoc(kind)


def test_one_root() -> None:
    assert {kind.__name__ for kind in KINDS} == {
        "QPCompileError",
        "RecipeError",
        "ModelError",
        "CaptureError",
        "CalibrationError",
        "PlanError",
        "QualityError",
        "RankError",
        "InputError",
        "KernelError",
        "ArtifactError",
        "ExportError",
        "OutputError",
        "InvariantError",
        "WorkerError",
    }
