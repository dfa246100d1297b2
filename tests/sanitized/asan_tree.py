"""The package with its C under AddressSanitizer and UBSan, in build/asan: links to the sources, a separate library.

run.py imports `qpcompile` from that folder; the library beside the sources is not touched.
"""

import ast
import os
import subprocess
import sysconfig
from pathlib import Path

from qpcompile.kernels.native.library import sources_digest

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "asan"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
COMPILER = os.environ.get("CC", "gcc")


def build() -> Path:
    """Make the folder, and compile if the sources differ from those of the library there."""
    package = TREE / "qpcompile"
    package.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "qpcompile").iterdir():
        link = package / source.name
        if not source.name.startswith(("_native", "__pycache__")) and not link.is_symlink():
            link.symlink_to(source)
    library = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    digest, stamp = sources_digest(), TREE / "digest"
    if not library.exists() or not stamp.exists() or stamp.read_text("utf-8") != digest:
        made = library.with_suffix(".new")
        command = [COMPILER, *_flags(), *SANITIZERS, "-Wall", "-Wextra", "-Werror", "-fopenmp", "-fPIC", "-shared"]
        source = ROOT / "kernels" / "native" / "native.c"
        subprocess.run([*command, f'-DQP_SOURCES="{digest}"', "-o", str(made), str(source), "-lm"], check=True)
        made.replace(library)
        stamp.write_text(digest, "utf-8")
    return TREE


def environment() -> dict[str, str]:
    """The environment of a process that imports that package: the sanitizer is preloaded; errors are fatal."""
    # With the C++ library, whose exception functions the sanitizer looks up before torch loads it.
    preload = " ".join(_library(name) for name in ("libasan.so", "libstdc++.so.6"))
    options = {
        # Python and torch do not free memory at exit; a failed allocation must be our error, not an abort.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return {
        **os.environ,
        **options,
        "LD_PRELOAD": preload,
        "PYTHONPATH": str(TREE),
        "OMP_NUM_THREADS": "1",
    }


def _library(name: str) -> str:
    """The path of one of the compiler's own libraries."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def _flags() -> list[str]:
    """The flags of setup.py with less optimization: sanitizer instrumentation compiles slowly."""
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS":
            return [flag.replace("-O3", "-O1") for flag in ast.literal_eval(node.value)]
    raise AssertionError("setup.py names no FLAGS")
