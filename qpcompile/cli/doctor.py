"""Diagnostics: what can run on this machine, and why the rest cannot: processor, packages, operators, presets.

Operators are tested, not guessed: each runs once on small tensors, and exact ones are compared with the reference.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from qpcompile.cli.probes import PROBES, probe
from qpcompile.ir.operators import SPECS
from qpcompile.kernels.native import library as native
from qpcompile.pruning.pruner import Operators
from qpcompile.pruning.risk import RISK_OPERATORS
from qpcompile.pruning.table import PRUNERS
from qpcompile.recipe.recipe import Recipe, preset_names
from qpcompile.versions import TESTED, installed, verdict

CPU_INFO = Path("/proc/cpuinfo")
# Instructions for 8-bit integer products with 32-bit accumulation, by their Linux names (x86, then Arm).
INTEGER = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Speed = Literal["fast", "slow", "not at all"]


@dataclass(frozen=True)
class Package:
    """A dependency; version None: not installed."""

    name: str
    version: str | None
    tested: str
    verdict: str


@dataclass(frozen=True)
class Backend:
    """One back end of an operator; `note`: why it does not run, or remarks."""

    runs: bool
    note: str = ""


@dataclass(frozen=True)
class OperatorState:
    """Every back end of one operator: reference, CPU, Triton, ONNX."""

    name: str
    backends: dict[str, Backend]


@dataclass(frozen=True)
class PresetState:
    """How well a recipe would run on this machine's processor."""

    name: str
    speed: Speed
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `qpcompile doctor` prints."""

    machine: dict[str, str]
    instructions: tuple[str, ...]
    packages: tuple[Package, ...]
    operators: tuple[OperatorState, ...]
    presets: tuple[PresetState, ...]


def examine() -> Diagnosis:
    """Examine this machine."""
    instructions = integer_instructions()
    packages = tuple(package_state(name, installed(name)) for name in TESTED)
    operators = tuple(operator_state(name, packages) for name in PROBES)
    presets = tuple(recipe_state(name, Recipe.load(name), instructions, operators) for name in preset_names())
    return Diagnosis(machine(instructions), instructions, packages, operators, presets)


def machine(instructions: tuple[str, ...]) -> dict[str, str]:
    """Label -> description of this machine's hardware."""
    gpu = "none that torch sees"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    return {
        "processor": f"{platform.machine()}, {psutil.cpu_count(logical=True)} logical cores",
        "integer instructions": ", ".join(instructions) or "none known",
        "operators in C": native_state(native.library()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPU": gpu,
        "python": platform.python_version(),
    }


def native_state(loaded: native.Library) -> str:
    """Whether the compiled CPU operators are in use, and why not."""
    if loaded.path is None:
        return f"none, torch's are used: {loaded.problem}"
    parts = [f"compiled, {native.LEVELS[loaded.level]}"]
    parts += ["AMX tiles"] if loaded.amx else []
    parts += [] if loaded.threads else ["on one thread: built without OpenMP"]
    return ", ".join(parts)


def integer_instructions(cpuinfo: str | None = None) -> tuple[str, ...]:
    """Those of INTEGER that the processor supports; `cpuinfo`: the text of /proc/cpuinfo, read if None."""
    if cpuinfo is None:
        cpuinfo = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.is_file() else ""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return tuple(name for name in INTEGER if name in flags)


def package_state(name: str, version: str | None) -> Package:
    """A package version compared with its tested range."""
    return Package(name, version, str(TESTED[name]), verdict(name, version))


def operator_state(name: str, packages: tuple[Package, ...]) -> OperatorState:
    """Test an operator on all of its back ends."""
    versions = {package.name: package.version for package in packages}
    failure = probe(name, torch.device("cpu"))
    own_path = _has_file(name, "cpu")
    backends = {
        "reference": Backend(True),
        "cpu": Backend(not failure, failure or ("" if own_path else "runs the reference")),
        "triton": _triton(name, versions["triton"]),
        "onnx": _onnx(name, [package for package in ONNX_PACKAGES if versions[package] is None]),
    }
    return OperatorState(name, backends)


def recipe_state(
    name: str, recipe: Recipe, instructions: tuple[str, ...], operators: tuple[OperatorState, ...]
) -> PresetState:
    """How a recipe would run on the processor, from the states of its operators."""
    states = {state.name: state.backends["cpu"] for state in operators}
    needed = needed_operators(recipe)
    if broken := [operator for operator in needed if not states[operator].runs]:
        return PresetState(name, "not at all", f"{broken[0]}: {states[broken[0]].note}")
    scheme = recipe.quantize
    if scheme is None or scheme.weights.bits == 16:
        return PresetState(name, "fast", "float products, as the model itself runs them")
    if scheme.activations.bits == 16:
        why = "weights are unpacked and multiplied as floats on every call: saves memory, not time"
        return PresetState(name, "slow", why)
    if not instructions:
        return PresetState(name, "slow", f"the processor has none of {', '.join(INTEGER)}: 8-bit products are emulated")
    if problem := native.library().problem:
        return PresetState(name, "slow", f"operators run on torch, without kernels in C: {problem}")
    return PresetState(name, "fast", f"integer products on {instructions[0]}")


def needed_operators(recipe: Recipe) -> list[str]:
    """Operators that graphs of this recipe may contain."""
    needed = ["rmsnorm", "rope"]
    if recipe.tokens.method != "none":
        needed += [*_names(PRUNERS[recipe.tokens.method].operators), "select_tokens"]
    if recipe.tokens.risk.fuse:
        needed += _names(RISK_OPERATORS)
    scheme = recipe.quantize
    if scheme is None:
        return needed
    if scheme.kv_cache.bits != 16:
        needed += ["kv_write", "kv_read", "attention_kv", "rope_kv_write", "rope_kv_append"]
    if scheme.transform != "none":
        needed.append("hadamard" if scheme.transform == "hadamard" else "kronecker")
    if scheme.activations.bits != 16:
        needed += ["quantize_dynamic", "transform_quantize", "rmsnorm_quantize", "layernorm_quantize"]
        needed += ["activation_quantize", "linear_int"]
    elif scheme.weights.bits == 4:
        needed.append("linear_w4a16")
    eight = scheme.weights.bits == 8 or scheme.mean_bits.weights is not None
    if scheme.head_bits == 8 or (eight and scheme.activations.bits == 16):
        needed.append("linear_w8a16")
    return needed


def _names(operators: Operators) -> list[str]:
    return [spec.name for operator in operators for spec in SPECS if spec.overload is operator]


def recipe_warning(recipe: Recipe) -> str | None:
    """The warning before a compile whose result would be slow here, or not run; None if it runs fast."""
    packages = tuple(package_state(name, installed(name)) for name in TESTED)
    operators = tuple(operator_state(name, packages) for name in needed_operators(recipe))
    state = recipe_state("this recipe", recipe, integer_instructions(), operators)
    return None if state.speed == "fast" else f"this recipe runs {state.speed} on this machine: {state.why}"


def _has_file(operator: str, name: str) -> bool:
    return importlib.util.find_spec(f"qpcompile.kernels.{operator}.{name}") is not None


def _triton(operator: str, version: str | None) -> Backend:
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: _has_file(operator, "triton"), "no kernel of its own: torch's operators on a GPU"),
        (lambda: version is not None, "triton is not installed: pip install qpcompile[triton]"),
        (torch.cuda.is_available, "torch sees no CUDA device"),
    ]
    for check, reason in checks:
        if not check():
            return Backend(False, reason)
    failure = probe(operator, torch.device("cuda"))
    return Backend(not failure, failure)


def _onnx(operator: str, missing: list[str]) -> Backend:
    if not _has_file(operator, "onnx"):
        return Backend(False, "never left in a finished graph")
    if missing:
        return Backend(False, f"{', '.join(missing)} not installed: pip install qpcompile[onnx]")
    return Backend(True)
