"""The doctor lists what runs, and the reason for everything that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qpcompile.cli import doctor, probes
from qpcompile.cli.doctor import Backend, OperatorState
from qpcompile.kernels.native.library import Library
from qpcompile.recipe.recipe import Recipe, preset_names

X86 = "processor\t: 0\nflags\t\t: fpu sse avx2 avx512f avx512_vnni amx_tile amx_int8\nbugs\t\t: spectre_v1 avx_vnni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"
KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.fixture(scope="module")
def diagnosis() -> doctor.Diagnosis:
    return doctor.examine()


@pytest.mark.parametrize(
    ("text", "found"), [(X86, ("amx_int8", "avx512_vnni")), (ARM, ("i8mm", "asimddp")), ("", ()), ("flags : sse", ())]
)
def test_integer_instructions(text: str, found: tuple[str, ...]) -> None:
    assert doctor.integer_instructions(text) == found


@pytest.mark.parametrize(
    ("name", "version", "verdict"),
    [
        ("torch", "2.12.1", "older than tested"),
        ("transformers", "5.24.3", "tested"),
        ("torch", "2.13.0+cpu", "tested"),
        ("torch", "2.14.0.dev20261101", "newer than tested"),
        ("torch", "3.0", "newer than tested"),
        ("torch", None, "missing"),
        ("triton", None, "not installed (optional)"),
    ],
)
def test_package_against_tested_range(name: str, version: str | None, verdict: str) -> None:
    assert doctor.package_state(name, version).verdict == verdict


def test_every_operator_has_a_probe() -> None:
    assert sorted(probes.PROBES) == sorted(path.parent.name for path in KERNELS.glob("*/op.py"))


def test_every_operator_runs_on_this_processor(diagnosis: doctor.Diagnosis) -> None:
    assert [state.name for state in diagnosis.operators] == list(probes.PROBES)
    for state in diagnosis.operators:
        assert state.backends["cpu"].runs, f"{state.name}: {state.backends['cpu'].note}"
        assert list(state.backends) == ["reference", "cpu", "triton", "onnx"]


def test_what_does_not_run_has_a_reason(diagnosis: doctor.Diagnosis) -> None:
    for state in diagnosis.operators:
        for name, backend in state.backends.items():
            assert backend.runs or backend.note, f"{state.name} on {name}"


def test_every_preset_gets_a_verdict(diagnosis: doctor.Diagnosis) -> None:
    assert [state.name for state in diagnosis.presets] == preset_names()
    assert all(state.why for state in diagnosis.presets)
    assert {state.name: state.speed for state in diagnosis.presets}["none"] == "fast"


def states(**broken: str) -> tuple[OperatorState, ...]:
    """All operators running except the named ones, with their errors."""
    return tuple(
        OperatorState(name, {"cpu": Backend(name not in broken, broken.get(name, ""))}) for name in probes.PROBES
    )


@pytest.mark.parametrize(
    ("preset", "instructions", "speed", "why"),
    [
        ("w4a4kv4", ("avx512_vnni",), "fast", "integer products on avx512_vnni"),
        ("w4a4kv4", (), "slow", "emulated"),
        ("w4a16", ("avx512_vnni",), "slow", "saves memory, not time"),
        ("none", (), "fast", "float products"),
        ("prune-30", (), "fast", "float products"),
    ],
)
def test_speed_of_a_recipe(preset: str, instructions: tuple[str, ...], speed: str, why: str) -> None:
    state = doctor.recipe_state(preset, Recipe.load(preset), instructions, states())
    assert state.speed == speed and why in state.why


def test_recipe_with_a_broken_operator_does_not_run() -> None:
    broken = states(linear_int="RuntimeError: no such instruction")
    state = doctor.recipe_state("w4a4kv4", Recipe.load("w4a4kv4"), ("avx512_vnni",), broken)
    assert (state.speed, state.why) == ("not at all", "linear_int: RuntimeError: no such instruction")
    assert doctor.recipe_state("none", Recipe.load("none"), (), broken).speed == "fast"


def test_a_wheel_without_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.native, "library", lambda: Library(None, "none is here", 0, False, False, {}))
    state = doctor.recipe_state("w4a4kv4", Recipe.load("w4a4kv4"), ("avx512_vnni",), states())
    assert state.speed == "slow" and state.why.endswith("without kernels in C: none is here")
    assert doctor.recipe_state("none", Recipe.load("none"), (), states()).speed == "fast"


def test_warning_before_a_slow_compile() -> None:
    assert doctor.recipe_warning(Recipe.load("none")) is None
    assert "saves memory, not time" in (doctor.recipe_warning(Recipe.load("w4a16")) or "")


def test_failing_and_wrong_operators_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(probes.PROBES, "hadamard", fails)
    assert probes.probe("hadamard", torch.device("cpu")) == "RuntimeError: no kernel image"
    monkeypatch.setitem(probes.PROBES, "hadamard", lambda device: (torch.zeros(1), torch.ones(1)))
    assert "differs from the reference" in probes.probe("hadamard", torch.device("cpu"))


def test_missing_packages_are_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tuple(doctor.package_state(name, None) for name in doctor.TESTED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = doctor.operator_state("quantize_dynamic", packages)
    assert state.backends["triton"] == Backend(False, "triton is not installed: pip install qpcompile[triton]")
    assert "pip install qpcompile[onnx]" in state.backends["onnx"].note
