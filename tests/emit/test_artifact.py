"""The artifact folder: it round-trips, every defect is refused by name, and nothing in it is executed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

import qpcompile
from qpcompile.compiled import CompiledVLM, load
from qpcompile.errors import ArtifactError, ExportError, OutputError
from qpcompile.recipe.recipe import Recipe
from tests.artifacts import rehash
from tests.families import llava

Case = dict[str, torch.Tensor]
Tiny = tuple[Any, dict[str, Case]]
GRAPHS = ("vision", "projector", "prefill", "decode", "head")
TESTBED = Path(__file__).resolve().parents[1] / "testbed" / "llava"


@pytest.fixture(scope="module")
def saved(compiled_llava: CompiledVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact folder of the tiny model; do not change it."""
    folder = tmp_path_factory.mktemp("artifact") / "out"
    compiled_llava.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_holds_what_hugging_face_expects(saved: Path) -> None:
    assert sorted(contents(saved)) == sorted(
        [
            *("README.md", "config.json", "generation_config.json", "manifest.json", "plan.yaml", "recipe.yaml"),
            *("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
            *(f"graph/{name}.{kind}" for name in GRAPHS for kind in ("json", "txt")),
        ]
    )
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["model_type"] == "qpcompile"
    assert config["compiled_model_type"] == "llava"


@pytest.mark.parametrize("case", ["one", "longer", "padded", "pictures"])
def test_loaded_model_gives_the_same_tokens(
    tiny_llava: Tiny, compiled_llava: CompiledVLM, saved: Path, case: str
) -> None:
    inputs = tiny_llava[1][case]
    loaded = load(saved)
    for sample in (False, True):
        answers = []
        for model in (compiled_llava, loaded):
            torch.manual_seed(5)
            answers.append(model.generate(**inputs, max_new_tokens=6, do_sample=sample))
        assert torch.equal(*answers)


def test_loaded_model_says_the_same_of_itself(compiled_llava: CompiledVLM, saved: Path) -> None:
    loaded = load(saved)
    assert loaded.plan == compiled_llava.plan and loaded.recipe == compiled_llava.recipe
    assert loaded.program.layers == compiled_llava.program.layers
    assert loaded.weight_bytes() == compiled_llava.weight_bytes()
    for name, graph in compiled_llava.program.graphs.items():
        assert loaded.graph_text(name) == compiled_llava.graph_text(name)
        assert loaded.program.graphs[name].returns == graph.returns


def test_every_save_gives_the_same_bytes(compiled_llava: CompiledVLM, saved: Path, tmp_path: Path) -> None:
    compiled_llava.save_pretrained(tmp_path / "again")
    load(saved).save_pretrained(tmp_path / "from-loaded")
    assert contents(saved) == contents(tmp_path / "again") == contents(tmp_path / "from-loaded")


def test_prefill_and_decode_share_their_tensors(saved: Path) -> None:
    loaded = load(saved)
    prefill, decode = (dict(graph.module.named_buffers()) for graph in loaded.program.language)
    assert prefill["layers.0.mlp.up_proj.weight"].data_ptr() == decode["layers.0.mlp.up_proj.weight"].data_ptr()
    stored = load_file(saved / "model-00001-of-00001.safetensors")
    assert sum("layers.0.mlp.up_proj" in key for key in stored) == 1


@pytest.mark.slow
def test_a_table_that_shares_the_heads_8_bits_comes_back(tmp_path: Path) -> None:
    model, cases = llava(tie_word_embeddings=True)
    recipe = Recipe.load("w4a4kv4").with_overrides(["quantize.transform=hadamard", "quantize.weights.solver=rtn"])
    made = qpcompile.compile(model, recipe, calibration=[cases["one"]])
    made.save_pretrained(tmp_path / "out")
    keys = {name for name in load_file(tmp_path / "out" / "model-00001-of-00001.safetensors") if "embed_tokens" in name}
    assert not keys, "the head's bytes are the table's"
    loaded = load(tmp_path / "out")
    table = loaded.program.graphs["embed"].module.get_buffer("weight_codes")
    assert table.data_ptr() == loaded.program.graphs["head"].module.get_buffer("weight_codes").data_ptr()
    for case in cases.values():
        answers = [each.generate(**case, max_new_tokens=6, do_sample=False) for each in (made, loaded)]
        assert torch.equal(*answers)


def test_processor_comes_back(saved: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(TESTBED)
    CompiledVLM(load(saved).program, processor).save_pretrained(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert type(loaded.processor) is type(processor)
    assert loaded.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_existing_folder_is_refused(compiled_llava: CompiledVLM, saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(OutputError, match="exists already"):
        compiled_llava.save_pretrained(saved)
    assert contents(saved) == before


def test_failed_save_leaves_nothing(
    compiled_llava: CompiledVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qpcompile.emit.artifact.weights.save_file", full)
    with pytest.raises(OutputError, match="disk is full"):
        compiled_llava.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_class_outside_transformers_is_refused(
    compiled_llava: CompiledVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = compiled_llava.program.host
    monkeypatch.setattr(host, "__class__", type("RemoteModel", (type(host),), {}))
    with pytest.raises(ExportError, match="no model class RemoteModel"):
        compiled_llava.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def flip(name: str) -> Callable[[Path], None]:
    """Change one bit in the middle of a file."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(bytes(data))

    return damage


def rewrite(**changes: Any) -> Callable[[Path], None]:
    """Change keys of the manifest and recompute its digest."""

    def damage(folder: Path) -> None:
        rehash(folder, **changes)

    return damage


def put(name: str, data: bytes) -> Callable[[Path], None]:
    """Add a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return damage


class Bomb:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


PICKLE = pickle.dumps(Bomb())
OUTSIDE = {"../secret.json": {"sha256": "0" * 64, "bytes": 1}}
WEIGHTS = "model-00001-of-00001.safetensors"
DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte in weights": (flip(WEIGHTS), WEIGHTS),
    "flipped byte in a graph": (flip("graph/decode.json"), r"graph/decode\.json"),
    "flipped byte in a text": (flip("graph/head.txt"), r"graph/head\.txt"),
    "flipped byte in config": (flip("config.json"), r"config\.json"),
    "flipped byte in the manifest": (flip("manifest.json"), r"manifest\.json"),
    "missing file": (lambda folder: (folder / "plan.yaml").unlink(), r"missing[\s\S]*plan\.yaml"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), r"no manifest\.json"),
    "missing folder": (lambda folder: shutil.rmtree(folder), "no such folder"),
    "other version": (rewrite(format_version=1), "format version 1, this version of qpcompile reads 2"),
    "no version": (rewrite(format=None), "format version"),
    "pickle": (put("pytorch_model.bin", PICKLE), r"pickle[\s\S]*pytorch_model\.bin"),
    "pickle under another name": (put("notes.md", PICKLE), r"pickle[\s\S]*notes\.md"),
    "hidden pickle": (put(".cache.pkl", PICKLE), r"pickle[\s\S]*\.cache\.pkl"),
    "code": (put("modeling.py", b"raise SystemExit"), r"does not belong[\s\S]*modeling\.py"),
    "extra settings": (put("adapter_config.json", b"{}"), r"does not belong[\s\S]*adapter_config\.json"),
    "file outside": (rewrite(files=OUTSIDE), "lists a file|does not belong"),
    "foreign model class": (rewrite(model_class="AutoModel"), "no model class AutoModel"),
    "unknown stage": (rewrite(stage="magic"), "stage"),
    "unknown graph": (rewrite(graphs=["../vision"]), r"manifest\.json cannot be used"),
}


@pytest.mark.parametrize(("damage", "message"), DEFECTS.values(), ids=list(DEFECTS))
def test_defect_is_refused_by_name(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copied)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(copied)
    assert caught.value.do


def test_report_and_pictures_may_lie_beside(copied: Path) -> None:
    (copied / "report.html").write_text("<p>report</p>")
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs")
    load(copied)
