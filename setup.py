"""Everything is in pyproject.toml but for the CPU kernels in C, an extension that may fail to build.

Without a compiler the package installs all the same and the operators run on torch; `qpcompile doctor` says which.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

SOURCE = "kernels/native/native.c"
PARTS = [SOURCE, *sorted(str(path) for path in Path("kernels").rglob("*.inc"))]
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def sources_digest() -> str:
    """What kernels/native/library.py compares the library with, so that one made of other sources is not used."""
    total = hashlib.sha256()
    for part in PARTS:
        total.update(Path(part).read_bytes())
    return total.hexdigest()


class BuildWithThreads(build_ext):
    """With OpenMP where the compiler has it, on one thread otherwise."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, twice if the first fails."""
        plain = list(ext.extra_compile_args), list(ext.extra_link_args)
        ext.extra_compile_args.append("-fopenmp")
        ext.extra_link_args.append("-fopenmp")
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args, ext.extra_link_args = plain
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildWithThreads},
    ext_modules=[
        Extension(
            "qpcompile._native",
            [SOURCE],
            depends=PARTS[1:],
            define_macros=[("QP_SOURCES", f'"{sources_digest()}"')],
            extra_compile_args=FLAGS,
            libraries=["m"],
            optional=True,
        )
    ],
)
