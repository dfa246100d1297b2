"""Tested versions of dependencies, and a warning if the installed ones are newer.

`pyproject.toml` declares the same ranges (tests/test_versions.py compares the two). A range starts at the oldest tested
version. It ends before the next minor version for packages whose minor versions break us, such as torch and
transformers; otherwise it is open, and a newer version is reported, not refused.
"""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Tested:
    """One package: the oldest and the newest version that the tests were run with.

    below: the first version excluded from installation; empty: none. extra: the extra that requires the package; empty:
    it is mandatory. answers: whether answers depend on it, so that a newer version is worth a warning.
    """

    oldest: str
    newest: str
    below: str = ""
    extra: str = ""
    answers: bool = False

    @property
    def declared(self) -> str:
        """The range in the notation of pyproject.toml."""
        return f">={_short(self.oldest)}" + (f",<{self.below}" if self.below else "")

    def __str__(self) -> str:
        low, high = (".".join(map(str, minor(each))) for each in (self.oldest, self.newest))
        return low if low == high else f"{low} to {high}"


TESTED: dict[str, Tested] = {
    "torch": Tested("2.13.0", "2.13.0", below="2.14", answers=True),
    "transformers": Tested("5.23.0", "5.24.0", below="5.25", answers=True),
    "safetensors": Tested("0.8.0", "0.8.0", answers=True),
    "numpy": Tested("2.0.0", "2.4.6", answers=True),
    "pillow": Tested("10.3.0", "13.0.0", answers=True),
    "pydantic": Tested("2.11.0", "2.14.4"),
    "pyyaml": Tested("6.0.1", "6.0.4"),
    "typer": Tested("0.19.0", "0.29.2"),
    "rich": Tested("13.0.0", "15.0.0"),
    "matplotlib": Tested("3.8.4", "3.11.2"),
    "psutil": Tested("5.9.0", "7.2.2"),
    "jinja2": Tested("3.1.6", "3.1.6"),
    "onnx": Tested("1.23.0", "1.23.2", extra="onnx", answers=True),
    "onnxscript": Tested("0.7.0", "0.7.2", extra="onnx", answers=True),
    "onnx-ir": Tested("1.0.0", "1.1.0", extra="onnx", answers=True),
    "onnxruntime": Tested("1.31.0", "1.32.0", extra="onnx", answers=True),
    "onnxruntime-genai": Tested("0.18.0", "0.18.0", extra="genai", answers=True),
    "fastapi": Tested("0.165.0", "0.165.0", extra="serve"),
    "uvicorn": Tested("0.54.0", "0.54.0", extra="serve"),
    "prometheus-client": Tested("0.26.0", "0.26.0", extra="serve"),
    "ray": Tested("2.60.0", "2.60.0", extra="ray"),
    "compressed-tensors": Tested("0.15.0", "0.20.1", extra="compressed"),
    "triton": Tested("3.7.1", "3.9.0", extra="triton", answers=True),
}
# Packages whose versions are recorded in artifacts and result rows.
RECORDED = ("qpcompile", "torch", "transformers", "safetensors")


def minor(version: str) -> tuple[int, ...]:
    """Major and minor number of a version; patch releases count as tested."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_versions(names: tuple[str, ...] = RECORDED[:3]) -> dict[str, str]:
    """Versions of the dependencies of a compile; "source" for a package that runs without being installed."""
    return {name: installed(name) or "source" for name in names}


def verdict(name: str, version: str | None) -> str:
    """Compare a package version with the tested ones."""
    tested = TESTED[name]
    if version is None:
        return "not installed (optional)" if tested.extra else "missing"
    if minor(version) < minor(tested.oldest):
        return "older than tested"
    return "newer than tested" if minor(version) > minor(tested.newest) else "tested"


def newer_than_tested() -> str:
    """One line naming every installed package, among those that affect answers, newer than tested; or empty."""
    found = {name: installed(name) for name, tested in TESTED.items() if tested.answers}
    newer = [
        f"{name} {version} (tested: {TESTED[name]})"
        for name, version in found.items()
        if verdict(name, version) == "newer than tested"
    ]
    return f"newer than any version tested: {', '.join(newer)}; answers may be wrong" if newer else ""


@functools.cache
def tell_newer() -> None:
    """Log `newer_than_tested` through the logger `qpcompile`, once per process."""
    if line := newer_than_tested():
        logging.getLogger("qpcompile").warning(line)


def _short(version: str) -> str:
    """5.23.0 as 5.23, 6.0.1 unchanged."""
    return version.removesuffix(".0") if version.count(".") > 1 else version
