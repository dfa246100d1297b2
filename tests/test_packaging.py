"""Wheels are named after what is in them; the source distribution is the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "passes", "qpcompile")
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# A compiler that writes an empty file to what follows -o: the tag does not depend on what is in the library.
EMPTY = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
BROKEN = "#!/bin/sh\nexit 1\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources that a wheel is made of, without what was built in the repository."""
    made = tmp_path / "tree"
    made.mkdir()
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("_native*", "__pycache__")
        shutil.copytree(ROOT / name, made / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, made / name)
    return made


def build(tree: Path, *words: str, compiler: str = EMPTY) -> Path:
    """The one file that setup.py writes."""
    script = tree.parent / "compiler"
    script.write_text(compiler)
    script.chmod(0o755)
    environment = {**os.environ, "CC": str(script), "LDSHARED": str(script)}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "setup.py", "-q", *words, "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = (tree / "dist").iterdir()
    return made


def description(wheel: zipfile.ZipFile) -> str:
    """What a wheel says about itself."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
    return wheel.read(name).decode()


def test_wheel_with_kernels_is_for_a_platform_and_every_python(tree: Path) -> None:
    # Left over from a build for one interpreter; it would be found before the new one.
    stale = tree / "build" / f"lib.linux-x86_64-cpython-{sys.version_info[0]}{sys.version_info[1]}" / "qpcompile"
    stale.mkdir(parents=True)
    (stale / "_native.cpython-311-x86_64-linux-gnu.so").touch()
    wheel = build(tree, "bdist_wheel")
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none") and platform != "any"
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        assert [name for name in names if "_native" in name] == ["qpcompile/_native.so"]
        assert "Root-Is-Purelib: false" in description(opened)
    assert {"qpcompile/kernels/rope/op.py", "qpcompile/passes/calibrate.py", "qpcompile/py.typed"} <= {*names}
    assert not [name for name in names if name.endswith((".c", ".inc")) or name.startswith(("tests/", "kernels/"))]


def test_wheel_without_a_compiler_is_for_any_platform(tree: Path) -> None:
    wheel = build(tree, "bdist_wheel", compiler=BROKEN)
    assert wheel.stem.split("-")[2:] == ["py3", "none", "any"]
    with zipfile.ZipFile(wheel) as opened:
        assert not [name for name in opened.namelist() if "_native" in name]
        assert "Root-Is-Purelib: true" in description(opened)


def test_building_in_place_replaces_a_library_of_one_interpreter(tree: Path) -> None:
    stale = tree / "qpcompile" / "_native.cpython-311-x86_64-linux-gnu.so"
    stale.touch()
    script = tree.parent / "compiler"
    script.write_text(EMPTY)
    script.chmod(0o755)
    environment = {**os.environ, "CC": str(script), "LDSHARED": str(script)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=True)
    assert [path.name for path in (tree / "qpcompile").glob("_native*")] == ["_native.so"]


def test_source_distribution_is_the_repository(tree: Path) -> None:
    for name in ("tests", "docs", "demo", ".ci"):
        (tree / name).mkdir()
        (tree / name / "kept.txt").touch()
    (tree / "tests" / "testbed" / "llava").mkdir(parents=True)
    (tree / "tests" / "testbed" / "llava" / "model.safetensors").touch()
    (tree / "tests" / "__pycache__").mkdir()
    (tree / "tests" / "__pycache__" / "x.pyc").touch()
    (tree / "qpcompile" / "_native.so").touch()
    packed = build(tree, "sdist")
    with tarfile.open(packed) as opened:
        found = {member.name.partition("/")[2]: member for member in opened.getmembers()}
    assert {"tests/testbed/llava/model.safetensors", "kernels/native/native.c", "docs/kept.txt", ".ci/kept.txt"} <= {
        *found
    }
    for name in ("kernels", "passes"):
        assert found[f"qpcompile/{name}"].issym() and found[f"qpcompile/{name}"].linkname == f"../{name}"
        assert not [path for path in found if path.startswith(f"qpcompile/{name}/")]
    assert not [path for path in found if path.endswith((".so", ".pyc"))]
