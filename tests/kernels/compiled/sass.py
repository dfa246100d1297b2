"""Ahead-of-time compilation of Triton kernels, and inspection of their machine code: no GPU is needed.

    code = compiled(kernel, {"x_ptr": "*bf16", "rows": "i32", "N": "i32:16"}, {"BLOCK": 1024}, arch=90, warps=4)
    code.count("IGMMA"), code.loop_count("PRMT"), code.spills, code.registers, code.shared

Triton ships ptxas, nvdisasm and cuobjdump. Each compile takes 1 to 4 seconds.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PRODUCTS = ("IGMMA", "HGMMA", "QGMMA", "IMMA", "HMMA", "QMMA", "UTCIMMA", "UTCHMMA", "UTCQMMA")
"""The opcodes of tensor cores on sm_80, sm_90 and sm_100."""


@dataclass(frozen=True)
class Compiled:
    """One kernel's code for one architecture: `ptx`, the machine code and its resources.

    `instructions` are the lines of the disassembly without addresses and predicates ("IGMMA.64x16x32.S8.S8 R24, ...").
    `loop` is the innermost loop with the most products of tensor cores; without any, the longest innermost loop.
    `shared` is in bytes, `registers` and `local` (bytes of stack and spills) are per thread.
    """

    # Not in repr: pytest would print thousands of lines, slowly.
    ptx: str = field(repr=False)
    instructions: tuple[str, ...] = field(repr=False)
    loop: tuple[str, ...] = field(repr=False)
    shared: int
    registers: int
    local: int

    def count(self, opcode: str) -> int:
        """How many instructions have `opcode`, with any suffix: count("LDG") counts LDG.E.128 too."""
        return _count(self.instructions, opcode)

    def loop_count(self, opcode: str) -> int:
        """How many of them are in the loop."""
        return _count(self.loop, opcode)

    @cached_property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.count("LDL") + self.count("STL")


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int = 90,
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """Compile `kernel` for compute capability `arch` (80, 90, 100).

    `signature` names the types of the run-time arguments as Triton writes them; pointers are assumed to be aligned to
    16 bytes, and "i32:16" is an integer divisible by 16. All other arguments must be in `constexprs`.
    """
    names = kernel.arg_names
    divisible = [name for name, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr").removesuffix(":16") for name in names},
        constexprs=dict(constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    # Without FMA contraction, as for all kernels that must be bit-identical to their reference.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    built: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    listing, usage = disassemble(built.asm["cubin"])
    instructions, loop = parse(listing)
    return Compiled(
        ptx=built.asm["ptx"],
        instructions=instructions,
        loop=loop,
        shared=built.metadata.shared,
        registers=_resource(usage, "REG"),
        local=_resource(usage, "STACK") + _resource(usage, "LOCAL"),
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The listing of nvdisasm and the resource usage of cuobjdump."""
    tools: Any = knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = ([tools.nvdisasm.path, "-c", path], [tools.cuobjdump.path, "-res-usage", path])
        listing, usage = (subprocess.run(each, check=True, capture_output=True, text=True).stdout for each in commands)
    return listing, usage


def parse(listing: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The instructions of nvdisasm's listing, and those of its main loop (empty where nothing branches back)."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(found[1])
            target = re.match(r"BRA\b.*`\((\.L_\w+)\)", found[1])
            # The branch to itself after the end is padding.
            if target and labels.get(target[1], len(instructions)) < len(instructions) - 1:
                loops.append((labels[target[1]], len(instructions)))
    innermost = [
        (start, stop)
        for start, stop in loops
        if not any((start, stop) != other and start <= other[0] and other[1] <= stop for other in loops)
    ]
    bodies = [tuple(instructions[start:stop]) for start, stop in innermost]
    return tuple(instructions), max(bodies, key=lambda body: (_products(body), len(body)), default=())


def _products(instructions: tuple[str, ...]) -> int:
    return sum(_count(instructions, each) for each in PRODUCTS)


def _count(instructions: tuple[str, ...], opcode: str) -> int:
    return sum(re.split(r"[.\s]", each, maxsplit=1)[0] == opcode for each in instructions)


def _resource(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found, f"cuobjdump names no {name}:\n{usage}"
    return int(found[1])
