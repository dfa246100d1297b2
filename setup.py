"""Everything is in pyproject.toml but for the CPU kernels in C, an extension that may fail to build.

Without a compiler the package installs all the same and the operators run on torch; `qpcompile doctor` says which.
The library calls nothing of Python and is loaded with ctypes: one wheel per platform serves every Python, and a wheel
without it is a wheel for any platform.
"""

import hashlib
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, LinkError

SOURCE = "kernels/native/native.c"
PARTS = [SOURCE, *sorted(str(path) for path in Path("kernels").rglob("*.inc"))]
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# Folders at the top that are links below qpcompile/.
LINKED = ("kernels", "passes")


def sources_digest() -> str:
    """What kernels/native/library.py compares the library with, so that one made of other sources is not used."""
    total = hashlib.sha256()
    for part in PARTS:
        total.update(Path(part).read_bytes())
    return total.hexdigest()


class BuildWithThreads(build_ext):
    """With OpenMP where the compiler has it, on one thread otherwise."""

    def run(self) -> None:
        """Build, and remove libraries that are named after an interpreter: they would be found first."""
        super().run()
        for folder in (self.build_lib, *(["."] if self.inplace else [])):
            for old in Path(folder, "qpcompile").glob("_native.*.*"):
                old.unlink()

    def get_ext_filename(self, fullname: str) -> str:
        """`qpcompile/_native.so`: without the name of an interpreter."""
        return str(Path(*fullname.split(".")).with_suffix(Path(super().get_ext_filename(fullname)).suffix))

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


class WheelForEveryPython(bdist_wheel):
    """`py3-none-PLATFORM` with the kernels in C, `py3-none-any` if they could not be built."""

    def get_tag(self) -> tuple[str, str, str]:
        """Asked for when everything is built: what is in the wheel is known."""
        self.root_is_pure = not list(Path(self.bdist_dir, "qpcompile").glob("_native*"))
        return "py3", "none", super().get_tag()[2]


class SourcesWithLinks(sdist):
    """Links stay links, so that the tree is the repository's; setuptools copies what they lead to."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """The tree that is packed."""
        super().make_release_tree(base_dir, files)
        for name in LINKED:
            link = Path(base_dir, "qpcompile", name)
            shutil.rmtree(link, ignore_errors=True)
            link.symlink_to(Path("..", name))


setup(
    cmdclass={"build_ext": BuildWithThreads, "bdist_wheel": WheelForEveryPython, "sdist": SourcesWithLinks},
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
