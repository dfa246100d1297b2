"""docs/extending.md is true: a toy of each kind is added by the files that its table names, runs, and leaves nothing.

The toys are complete examples, tests/extending/<kind>/: `files/` holds new files at their places, EDITS what is added
to others, and `check.py` uses the toy. All are added at once to a tree of links to this repository, in which one
process runs the checks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

from qpcompile.recipe.choices import METHODS, SOLVERS

ROOT = Path(__file__).resolve().parents[1]
TOYS = ROOT / "tests" / "extending"
SOURCES = ("qpcompile", "passes", "kernels", "docs", "tests/extending")

ADAPTED_TOWER = '''

class ColumnTower(transformers.PixtralVisionModel):
    """Pixtral's tower, with the patches of each picture column by column."""

    @capture_outputs
    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **kwargs: Any) -> Any:
        grids = [(height // self.patch_size, width // self.patch_size) for height, width in image_sizes.tolist()]
        frames = zip(self.patch_conv(pixel_values), grids, strict=True)
        patches = [frame[:, :height, :width].transpose(1, 2).flatten(1).T for frame, (height, width) in frames]
        packed = self.ln_pre(torch.cat(patches).unsqueeze(0))
        places = [torch.cartesian_prod(torch.arange(width), torch.arange(height)).flip(1) for height, width in grids]
        blocks = torch.block_diag(*(torch.ones(len(each), len(each)) for each in patches))
        mask = torch.zeros_like(blocks).masked_fill(blocks == 0, torch.finfo(packed.dtype).min)
        rotary = self.patch_positional_embedding(packed, torch.cat(places))
        return self.transformer(packed, attention_mask=mask[None, None], position_embeddings=rotary, **kwargs)


def column_llava() -> tuple[PreTrainedModel, Cases]:
    """LLaVA on that tower."""
    model = _build(
        "Llava",
        vision_config=_tower("pixtral", image_size=64, head_dim=8),
        text_config=_text(model_type="llama", num_hidden_layers=1),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    plain = model.model.vision_tower
    model.model.vision_tower = ColumnTower(plain.config).eval().requires_grad_(False)
    model.model.vision_tower.load_state_dict(plain.state_dict())
    return model, _cases(model, _pixtral)
'''
COLUMN_TABLE = '''

def column_table(module: torch.nn.Module, sizes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """`patch_table` with the patches of each picture column by column."""
    pictures = [patch_table(module, [size]) for size in sizes]
    ordered = [patches[(patches[:, 2] * len(patches) + patches[:, 1]).argsort()] for patches in pictures]
    return torch.cat([patches + torch.tensor([picture, 0, 0]) for picture, patches in enumerate(ordered)])
'''
COSH = """

def _cosh(_: Fact, x: Any) -> Any:
    return op.Mul(op.Add(op.Exp(x), op.Exp(op.Neg(x))), 0.5)
"""
HEADROOM = '    headroom: float = Field(default=1.0, ge=1, le=2, description="Factor of every scale.")\n'

# Kind -> file -> (a line that is there once, the lines added after it).
Edits = Mapping[str, list[tuple[str, str]]]
EDITS: dict[str, Edits] = {
    "pass": {
        "qpcompile/pass_list.py": [
            (
                "from qpcompile.passes.canonicalize import Canonicalize\n",
                "from qpcompile.passes.drop_identities import DropIdentities\n",
            ),
            ("        Canonicalize(),\n", "        DropIdentities(),\n"),
        ]
    },
    "operator": {},
    "pruning method": {},
    "weight solver": {},
    "recipe key": {
        "qpcompile/recipe/quantize.py": [("    solver: Solver = Field(", HEADROOM)],
        "qpcompile/quantization/solve.py": [
            ("    scale = _scales(wide, moments, scheme)\n", "    scale = scale * scheme.headroom\n")
        ],
    },
    "ONNX translation": {
        "qpcompile/emit/onnx/translate/aten.py": [
            ("    return op.Mul(x, _sigmoid(out, x))\n", COSH),
            ("        aten.silu.default: _silu,\n", "        aten.cosh.default: _cosh,\n"),
        ]
    },
    "model family": {
        "tests/families.py": [
            (
                "from transformers import PreTrainedModel\n",
                "from transformers.utils.output_capturing import capture_outputs\n",
            ),
            ("    return model, _cases(model, _pixtral)\n", ADAPTED_TOWER),
            ("        mistral3,\n", "        column_llava,\n"),
        ],
        "qpcompile/capture/adapters.py": [
            (
                "ADAPTERS: dict[str, Adapter] = {\n",
                '    "ColumnTower": Adapter(capture_outputs(_packed_pictures), "columns"),\n',
            )
        ],
        "qpcompile/runtime/prepare.py": [
            (
                "    return next(getattr(part, name) for part in module.modules() if hasattr(part, name))\n",
                COLUMN_TABLE,
            ),
            ('    "merged": merge_table,\n', '    "columns": column_table,\n'),
        ],
    },
}
# What the table calls "the code that reads it".
READERS = {"recipe key": {"qpcompile/quantization/solve.py"}}
RUN = """
import json, runpy, sys, traceback

for check in sys.argv[1:]:
    try:
        runpy.run_path(check)
        problem = None
    except BaseException:
        problem = traceback.format_exc()
    print(json.dumps([check, problem]), flush=True)
"""


def folder(kind: str) -> Path:
    return TOYS / kind.lower().replace(" ", "_")


def new_files(kind: str) -> dict[str, str]:
    """Path in the repository -> text of each file that a toy consists of."""
    top = folder(kind) / "files"
    return {path.relative_to(top).as_posix(): path.read_text("utf-8") for path in sorted(top.rglob("*.py"))}


def edited(path: str, edits: list[tuple[str, str]]) -> str:
    """The text of a file of the repository with lines added."""
    text = (ROOT / path).read_text("utf-8")
    for line, added in edits:
        assert text.count(line) == 1, f"{path}: {line}"
        end = text.index("\n", text.index(line)) + 1
        text = text[:end] + added + text[end:]
    return text


def extend(source: Path, target: Path, changed: Mapping[Path, str]) -> None:
    """Write `source` with changed files to `target`: folders that hold one are real, other visible entries links."""
    target.mkdir()
    names = {path.parts[0] for path in changed}
    for entry in source.iterdir() if source.is_dir() else ():
        if entry.name not in names and not entry.name.startswith("."):
            # A link within the repository leads to the extended folder.
            (target / entry.name).symlink_to(entry.readlink() if entry.is_symlink() else entry)
    for name in names:
        inside = {path.relative_to(name): text for path, text in changed.items() if path.parts[0] == name}
        if Path() in inside:
            (target / name).write_text(inside[Path()], "utf-8")
        else:
            extend(source / name, target / name, inside)


def sources() -> set[Path]:
    return {path for top in SOURCES for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Kind -> why its check failed, or None; all toys are in the tree at once."""
    before = sources()
    tree = tmp_path_factory.mktemp("extended") / "tree"
    changed = {path: text for kind in EDITS for path, text in new_files(kind).items()}
    changed |= {path: edited(path, edits) for kind in EDITS for path, edits in EDITS[kind].items()}
    extend(ROOT, tree, {Path(path): text for path, text in changed.items()})
    checks = {str(tree / folder(kind).relative_to(ROOT) / "check.py"): kind for kind in EDITS}
    paths = os.pathsep.join([str(tree), str(tree / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", RUN, *checks],
        env=os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sources() == before
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {checks[check]: problem for check, problem in found}


@pytest.mark.parametrize("kind", EDITS)
def test_a_toy_works(kind: str, problems: dict[str, str | None]) -> None:
    assert problems[kind] is None, problems[kind]


def rows() -> dict[str, list[str]]:
    """Kind -> the cells of its row in the table of the page: what to write, what to edit, tests and pages."""
    text = (ROOT / "docs" / "extending.md").read_text("utf-8")
    found = re.findall(r"^\| \[(?:a|an) ([\w ]+)\]\(#[\w-]+\) \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    return {kind: list(cells) for kind, *cells in found}


def paths_in(cell: str) -> list[str]:
    """The paths of a cell as patterns: `<name>` stands for any name, a folder for what is in it."""
    paths = [re.sub(r"<\w+>", "*", path) for path in re.findall(r"`([\w/<>]+(?:\.\w+|/))`", cell)]
    return [f"{path}*" if path.endswith("/") else path for path in paths]


def test_the_page_has_every_kind() -> None:
    assert set(rows()) == set(EDITS)


@pytest.mark.parametrize("kind", EDITS)
def test_a_toy_takes_the_files_that_the_page_names(kind: str) -> None:
    write, edit, test = map(paths_in, rows()[kind])
    needed = new_files(kind)
    assert needed or not write
    assert all(any(fnmatch(path, pattern) for pattern in write) for path in needed)
    assert set(EDITS[kind]) - READERS.get(kind, set()) <= {*edit, *test}
    missing = [path for path in (*edit, *test) if not list(ROOT.glob(path))]
    assert not missing


def test_nothing_of_a_toy_is_here() -> None:
    assert "loudest" not in METHODS and "floor" not in SOLVERS
    assert not [path for kind in EDITS for path in new_files(kind) if (ROOT / path).exists()]
