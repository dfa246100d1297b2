"""The declared ranges are the tested ones, and newer versions are reported once."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qpcompile import versions
from qpcompile.versions import TESTED

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared() -> dict[str, tuple[Requirement, str]]:
    """Package -> its range in pyproject.toml, and the extra that declares it."""
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    # What only developers install is not imported by the package.
    del groups["dev"], groups["site"]
    found = [(Requirement(text), extra) for extra, lines in groups.items() for text in lines]
    return {each.name: (each, extra) for each, extra in found}


def test_the_declared_ranges_are_those_tested() -> None:
    found = declared()
    assert found.keys() == TESTED.keys()
    for name, tested in TESTED.items():
        requirement, extra = found[name]
        assert (requirement.specifier, extra) == (SpecifierSet(tested.declared), tested.extra), name
        assert Version(tested.oldest) in requirement.specifier and Version(tested.newest) in requirement.specifier
        assert not tested.below or Version(tested.below) not in requirement.specifier


def test_the_pinned_versions_are_within_what_was_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    for name in TESTED.keys() & pinned.keys():
        assert versions.verdict(name, pinned[name]) == "tested", name


def test_the_lowest_pinned_versions_are_the_lowest_declared() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert sorted(pinned) == sorted(f"{name}=={tested.oldest}" for name, tested in TESTED.items())


@pytest.fixture
def anew() -> None:
    """As if nothing had been reported in this process."""
    versions.tell_newer.cache_clear()


@pytest.mark.usefixtures("anew")
def test_a_newer_library_is_told_on_one_line_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newer = {"transformers": "5.25.0", "torch": "3.0.0+cpu", "rich": "99.0", "numpy": "2.0.1", "onnx": None}
    monkeypatch.setattr(versions, "installed", lambda name: newer.get(name, TESTED[name].newest))
    with caplog.at_level(logging.WARNING, logger="qpcompile"):
        versions.tell_newer()
        versions.tell_newer()
    assert [record.getMessage() for record in caplog.records] == [
        "newer than any version tested: torch 3.0.0+cpu (tested: 2.13), transformers 5.25.0 (tested: 5.23 to 5.24); "
        "answers may be wrong"
    ]


@pytest.mark.usefixtures("anew")
def test_tested_libraries_are_not_worth_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: f"{TESTED[name].newest}.post1")
    versions.tell_newer()
    assert not caplog.records


def test_a_package_that_is_not_installed_has_the_version_source() -> None:
    assert versions.package_versions(("no such package", "torch"))["no such package"] == "source"
