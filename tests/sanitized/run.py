"""Run the kernels' tests and the fuzzer on the library with sanitizers: python tests/sanitized/run.py [CALLS [SEED]]

A planted overflow has to be detected first, so that a missing sanitizer is not a success.
"""

import random
import subprocess
import sys
from pathlib import Path

from asan_tree import ROOT, build, environment

KERNELS = (
    *("native", "native_cells", "native_codes", "native_gates", "native_tape"),
    *("linear", "linear_int", "linear_w4a16", "linear_w8a16", "expert_linear_int", "attention_kv", "kv_write"),
    *("rope", "hadamard", "kronecker", "quantize_dynamic", "rmsnorm_quantize", "layernorm_quantize"),
    *("activation", "activation_quantize", "transform_quantize", "rope_kv_write", "attention_step"),
)
ON_C = "not onnx and not export and not triton and not contrib and not past_the_caches"
PLANTED = """
import ctypes, torch
from qpcompile.kernels.native import library as native
assert "asan" in str(native.library().path), native.library()
tensor = torch.empty(40)
ctypes.memset(tensor.data_ptr(), 0, tensor.nbytes + 4)
"""


def check_sanitizer(tree: Path) -> None:
    """Exit unless an access four bytes past the end of a tensor is detected."""
    found = subprocess.run([sys.executable, "-c", PLANTED], cwd=tree, env=environment(), capture_output=True, text=True)
    if "heap-buffer-overflow" not in found.stderr:
        sys.exit(f"AddressSanitizer does not see a planted overflow:\n{found.stderr}")


def main(calls: str = "5000", seed: str = "") -> None:
    """Build; then test and fuzz, each on a separate core."""
    tree = build()
    check_sanitizer(tree)
    tests = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in KERNELS]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    pytest += ["-c", str(ROOT / "pyproject.toml"), "-k", ON_C, *tests]
    fuzz = [sys.executable, str(ROOT / "tests" / "sanitized" / "fuzz.py"), seed or str(random.randrange(2**31)), calls]
    # The fuzzer prints its progress as it goes, the tests print at their end.
    tests_run = subprocess.Popen(pytest, cwd=tree, env=environment(), stdout=subprocess.PIPE)
    failed = subprocess.run(fuzz, cwd=tree, env=environment()).returncode
    print(tests_run.communicate()[0].decode())
    sys.exit(failed or tests_run.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
