"""The peers of the CPU benchmark, what each one loads, and how that is built."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "bench"

# The environments workers run in; cpu_install.py makes the others.
OWN = "own"
OPENVINO = "openvino"
LLAMACPP = "llamacpp"
# What is compiled for every shape; W4A8 apart from them.
PRESETS = "w4a4kv4,quota-30"

_MODELS = ("tests/bench/cpu_models.py", "tests/bench/cpu_shapes.py")
# Sources that a compiled folder depends on, without the code that only runs it.
_COMPILER = (
    *_MODELS,
    "qpcompile/*.py",
    "qpcompile/recipe/**/*.py",
    "qpcompile/recipe/presets/*.yaml",
    "qpcompile/capture/*.py",
    "qpcompile/emit/**/*.py",
    "qpcompile/ir/*.py",
    "qpcompile/calibration/*.py",
    "qpcompile/quantization/**/*.py",
    "qpcompile/pruning/**/*.py",
    "passes/*.py",
    "kernels/*/op.py",
    "kernels/*/onnx.py",
    "kernels/*/onnx_contrib.py",
    "kernels/*/packing.py",
)


@dataclass(frozen=True)
class Make:
    """A folder that peers load: `script` is run with `arguments`, the shape, the folder, and the folder in `source`."""

    folder: str
    script: str
    arguments: tuple[str, ...] = ()
    source: str = ""
    python: str = OWN
    depends: tuple[str, ...] = _MODELS

    def key(self) -> str:
        """A hash of all files that the folder is built from."""
        total = hashlib.sha256(repr((self.script, self.arguments, self.source)).encode())
        for pattern in (*self.depends, f"tests/bench/{self.script}"):
            for path in sorted(ROOT.glob(pattern)):
                total.update(path.read_bytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Peer:
    """A row of the table: `worker` loads `folder` (or `part` of it) and answers `batch` equal prompts at once.

    Peers with `asked` run only if they are named; those with `needs` only on processors with that flag.
    """

    name: str
    worker: str
    folder: str
    part: str = ""
    arguments: tuple[str, ...] = ()
    python: str = OWN
    asked: bool = False
    needs: str = ""
    threads: int = 1
    batch: int = 1


MAKES = {
    make.folder: make
    for make in (
        Make("torch-float32", "cpu_prepare.py", ("torch:float32",)),
        Make("torch-bfloat16", "cpu_prepare.py", ("torch:bfloat16",)),
        Make("openvino", "cpu_openvino_export.py", python=OPENVINO),
        Make("llamacpp", "cpu_llamacpp_export.py", python=LLAMACPP, depends=(*_MODELS, "tests/bench/llamacpp/*")),
        Make("ours-float32", "cpu_prepare.py", (f"ours:float32:{PRESETS}",), depends=_COMPILER),
        Make("ours-bfloat16", "cpu_prepare.py", (f"ours:bfloat16:{PRESETS}",), depends=_COMPILER),
        Make("ours-w4a8-float32", "cpu_prepare.py", ("ours:float32:w4a8kv4",), depends=_COMPILER),
        Make("ours-w4a8-bfloat16", "cpu_prepare.py", ("ours:bfloat16:w4a8kv4",), depends=_COMPILER),
        Make("ort-fp32", "cpu_prepare.py", ("ort:fp32",), depends=_COMPILER),
        Make("ort-int4", "cpu_prepare.py", ("ort:int4",), depends=_COMPILER),
        Make("ort-int4-fast", "cpu_prepare.py", ("ort:int4:fast",), depends=_COMPILER),
        Make("onnx-w4a4kv4", "cpu_prepare.py", ("onnx:w4a4kv4",), "ours-float32", depends=_COMPILER),
        Make("onnx-quota-30", "cpu_prepare.py", ("onnx:quota-30",), "ours-float32", depends=_COMPILER),
        Make("onnx-fast-w4a4kv4", "cpu_prepare.py", ("onnx-fast:w4a4kv4",), "ours-float32", depends=_COMPILER),
        Make("onnx-fast-quota-30", "cpu_prepare.py", ("onnx-fast:quota-30",), "ours-float32", depends=_COMPILER),
    )
}

PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch fp32", "cpu_torch.py", "torch-float32", arguments=("eager",)),
        # Without instructions for it, torch takes a minute for a first token in bfloat16.
        Peer("torch bf16", "cpu_torch.py", "torch-bfloat16", arguments=("eager",), needs="avx512_bf16"),
        Peer("torch.compile bf16", "cpu_torch.py", "torch-bfloat16", arguments=("compile",), asked=True),
        Peer("OpenVINO GenAI int4", "cpu_openvino.py", "openvino", "", ("1",), OPENVINO),
        Peer("OpenVINO GenAI int4, CDPruner 30 %", "cpu_openvino.py", "openvino", "", ("0.3",), OPENVINO),
        Peer("llama.cpp Q4_0", "cpu_llamacpp.py", "llamacpp", "", ("Q4_0",), LLAMACPP),
        Peer("llama.cpp Q4_K_M", "cpu_llamacpp.py", "llamacpp", "", ("Q4_K_M",), LLAMACPP),
        Peer("ORT fp32", "cpu_ours_onnx.py", "ort-fp32", asked=True),
        Peer("ORT int4", "cpu_ours_onnx.py", "ort-int4", asked=True),
        Peer("ORT int4, caches in place", "cpu_ours_onnx.py", "ort-int4-fast"),
        Peer("ours w4a4kv4", "cpu_ours.py", "ours-float32", "w4a4kv4"),
        Peer("ours quota-30", "cpu_ours.py", "ours-float32", "quota-30"),
        Peer("ours w4a8kv4", "cpu_ours.py", "ours-w4a8-float32", "w4a8kv4", asked=True),
        Peer("ours w4a4kv4, bf16", "cpu_ours.py", "ours-bfloat16", "w4a4kv4"),
        Peer("ours quota-30, bf16", "cpu_ours.py", "ours-bfloat16", "quota-30"),
        Peer("ours w4a8kv4, bf16", "cpu_ours.py", "ours-w4a8-bfloat16", "w4a8kv4"),
        Peer("ours w4a4kv4, bf16, 2 threads", "cpu_ours.py", "ours-bfloat16", "w4a4kv4", threads=2),
        Peer("ours w4a4kv4, bf16, batch 8", "cpu_ours.py", "ours-bfloat16", "w4a4kv4", batch=8),
        Peer("ours w4a4kv4, ONNX", "cpu_ours_onnx.py", "onnx-w4a4kv4", asked=True),
        Peer("ours quota-30, ONNX", "cpu_ours_onnx.py", "onnx-quota-30", asked=True),
        Peer("ours w4a4kv4, ONNX fast", "cpu_ours_onnx.py", "onnx-fast-w4a4kv4"),
        Peer("ours quota-30, ONNX fast", "cpu_ours_onnx.py", "onnx-fast-quota-30"),
    )
}


def interpreter(python: str) -> Path:
    """The interpreter of an environment; it may not exist."""
    return Path(sys.executable) if python == OWN else BUILD / python / "bin" / "python"
