"""Hostile folders with valid hashes: nothing in them runs, opens another file or crashes, all are refused.

`tests/reliability/damage_artifact.py` does the same at random, in thousands.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from artifacts import edit, read, rehash, replace
from transformers import AutoProcessor

from qpcompile.compiled import CompiledVLM, load
from qpcompile.emit.artifact import agreement
from qpcompile.errors import ArtifactError
from tests.families import llava

TESTBED = Path(__file__).resolve().parents[1] / "testbed" / "llava"
WEIGHTS, INDEX, MANIFEST = "model-00001-of-00001.safetensors", "model.safetensors.index.json", "manifest.json"
Harm = Callable[[Path], Any]


@pytest.fixture(scope="module")
def saved(compiled_llava: CompiledVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the tiny model with a processor; do not change it."""
    folder = tmp_path_factory.mktemp("artifact") / "out"
    CompiledVLM(compiled_llava.program, AutoProcessor.from_pretrained(TESTBED)).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def put(name: str, *path: Any, value: Any) -> Harm:
    """Put a value at a path of keys in a JSON file."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return lambda folder: edit(folder, name, change)


def facts(**changes: Any) -> Harm:
    """Change keys of the manifest."""
    return lambda folder: rehash(folder, **changes)


def text(name: str, data: str | bytes) -> Harm:
    """Put another text in place of a file."""

    def harm(folder: Path) -> None:
        replace(folder, name, data)
        rehash(folder)

    return harm


def link(name: str, target: str, folder_too: bool = False) -> Harm:
    """A link in the folder; `target` is relative to the folder's parent, where a copy of the file lies."""

    def harm(folder: Path) -> None:
        if not folder_too:
            shutil.copy(folder / name, folder.parent / "outside")
            (folder / name).unlink()
        (folder / name).symlink_to(target)

    return harm


def outside_weights(name: Callable[[Path], str]) -> Harm:
    """The index names a file outside the folder."""

    def harm(folder: Path) -> None:
        shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")

        def change(index: Any) -> None:
            index["weight_map"] = dict.fromkeys(index["weight_map"], name(folder))

        edit(folder, INDEX, change)

    return harm


def header(change: Callable[[dict[str, Any]], None], length: int | None = None) -> Harm:
    """Change the header of the weights."""

    def harm(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        change(entries)
        made = json.dumps(entries).encode()
        start = (len(made) if length is None else length).to_bytes(8, "little")
        replace(folder, WEIGHTS, start + made + data[8 + size :])
        rehash(folder)

    return harm


def node_type(kind: str) -> Harm:
    """The first value of the decode graph has another type."""
    return put("graph/decode.json", "nodes", 0, "type", value=kind)


def second_tower(folder: Path) -> None:
    """Another graph of the tower, which says no values either."""
    data = read(folder, "graph/vision.json") | {"name": "vision.1"}
    (folder / "graph" / "vision.1.json").write_text(json.dumps(data, indent=2))
    files = read(folder, MANIFEST)["files"]
    files["graph/vision.1.json"] = dict(files["graph/vision.json"])
    rehash(folder, files=files, graphs=[*read(folder, MANIFEST)["graphs"], "vision.1"])


def endless(folder: Path) -> None:
    """A template with an infinite loop."""
    text("chat_template.jinja", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")(
        folder
    )


CODE = "f32[__import__('pytest').fail('code of the folder ran'), 1]"
HARMS: dict[str, tuple[Harm, str]] = {
    "code in a type": (node_type(CODE), "is not a size"),
    "power in a type": (node_type("int 9**9**9**9"), "is not a size"),
    "operator not on the list": (
        put("graph/head.json", "nodes", 2, "target", value="aten::resize_.default"),
        "operator",
    ),
    "weights above the folder": (outside_weights(lambda _: "../outside.safetensors"), "not a file of the artifact"),
    "weights anywhere": (
        outside_weights(lambda folder: f"{folder.parent}/outside.safetensors"),
        "not a file of the art",
    ),
    "index of a text file": (outside_weights(lambda _: "README.md"), "not a file of the artifact"),
    "graph outside": (facts(graphs=["/etc/passwd"]), r"manifest\.json cannot be used"),
    "graph of another name": (put("graph/head.json", "name", value="../../x"), "the graph's name"),
    "graph of another owner": (put("graph/head.json", "owner", value="no.such"), "no module no.such"),
    "graph that is missing": (facts(graphs=["vision", "prefill"]), "there is no decode graph"),
    "link to a file outside": (link("config.json", "../outside"), "holds a link"),
    "link to a file inside": (link("README.md", "config.json"), "holds a link"),
    "link to a folder": (link("more", "/etc", folder_too=True), "holds a link"),
    "fifo": (lambda folder: os.mkfifo(folder / "x.json"), "special file"),
    "hidden file": (lambda folder: (folder / ".x.json").write_text("{}"), "does not belong"),
    "newline after the manifest": (
        lambda folder: (folder / MANIFEST).open("a").write("\n"),
        "not written as a manifest is",
    ),
    "key twice in the manifest": (
        lambda folder: replace(folder, MANIFEST, (folder / MANIFEST).read_text().replace("{", '{"format": 2,', 1)),
        "occurs twice",
    ),
    "deep manifest": (lambda folder: replace(folder, MANIFEST, "[" * 100_000), "nested too deep"),
    "number of 5,000 digits": (text("config.json", '{"x": ' + "1" * 5000 + "}"), "too many digits"),
    "config that is not JSON": (text("config.json", "x"), r"config\.json"),
    "config that is a list": (text("config.json", "[]"), "mapping"),
    "generation settings that are not JSON": (text("generation_config.json", "{"), "generation_config"),
    "index that is not JSON": (text(INDEX, "x"), "index"),
    "index of numbers": (put(INDEX, "weight_map", value={"x": 7}), "not an index"),
    "header of another length": (header(lambda _: None, 2**62), "header has"),
    "header with more tensors": (
        header(lambda entries: entries.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
        "does not hold the tensors",
    ),
    "ten million layers": (put("config.json", "text_config", "num_hidden_layers", value=10**7), "at most"),
    "layers of another model": (put("config.json", "text_config", "num_hidden_layers", value=40), "has 40 layers"),
    "ten million layers of the tower": (
        put("config.json", "vision_config", "num_hidden_layers", value=10**7),
        "at most",
    ),
    "a billion beams": (put("generation_config.json", "num_beams", value=10**9), "at most"),
    "endless template": (endless, "loops in loops"),
    "kernel from the hub": (facts(attention="someone/kernel"), "attention: given"),
    "kernel from the hub in the config": (put("config.json", "attn_implementation", value="a/b"), "leads to code"),
    "audio tokenizer": (
        put("processor_config.json", "audio_tokenizer", value={"audio_tokenizer_name_or_path": "x/y"}),
        "leads",
    ),
    "code from the hub": (put("config.json", "auto_map", value={"AutoConfig": "x--y.Z"}), "leads to code"),
    "code for the tokenizer": (
        put("tokenizer_config.json", "auto_map", value={"AutoTokenizer": ["x.Y", None]}),
        "leads",
    ),
    "file for the tokenizer": (put("tokenizer_config.json", "vocab_file", value="/etc/passwd"), "leads to code"),
    "padding of the tokenizer": (put("tokenizer.json", "padding", value={"strategy": {"Fixed": 10**12}}), "pads to"),
    "endless expression of the tokenizer": (
        put("tokenizer.json", "pre_tokenizer", value={"type": "Split", "pattern": {"Regex": "(a+)+$"}}),
        "repeats what has repeats",
    ),
    "unknown processor": (put("processor_config.json", "processor_class", value="os"), "no class os"),
    "unknown tokenizer": (put("tokenizer_config.json", "tokenizer_class", value="PreTrainedModel"), "no class"),
    "another processor": (facts(processor="Qwen2VLProcessor"), "manifest.json says Qwen2VLProcessor"),
    "integers as floats": (facts(dtype="int8"), "dtype: given"),
    "another dtype": (facts(dtype="bfloat16"), r"the decoder takes f32"),
    "class that is not a text": (facts(model_class=7), "model_class: given"),
    "class of another kind": (facts(model_class="AutoModel"), "no model class AutoModel"),
    "host that is a list": (facts(host=[]), "host: given"),
    "host of unknown tensors": (facts(host={"x": "y"}), "is not stored"),
    "history that is a text": (facts(history="x"), "history: given"),
    "no graphs": (facts(graphs=[]), "graphs: given"),
    "more keys": (facts(more=1), "unknown key"),
    "other sites": (
        facts(sites=[{"graph": "vision", "name": "x", "kernel": "y"}]),
        "other sites",
    ),
    "other places left out": (facts(left_out=[{"graph": "vision", "name": "x", "reason": "y"}]), "other sites"),
    "other layers": (facts(layers=["a", "b", "c"]), "other layers"),
    "other returns": (put("graph/head.json", "returns", value={"x": "nothing"}), "the graph's returns"),
    "other constants": (put("graph/prefill.json", "constants", "mask_axes", value=9), "the graph's constants"),
    "rows of zeros": (put("graph/prefill.json", "constants", "absent.mask", value=10**9), "the graph's constants"),
    "rows of zeros as text": (
        put("graph/prefill.json", "constants", "absent.mask", value="x"),
        "the graph's constants",
    ),
    "a book of values": (
        put("graph/vision.json", "constants", "values_said", value="x" * 201),
        "the graph's constants",
    ),
    "head of some values": (put("graph/head.json", "constants", "values", value="x"), "only towers and projectors"),
    "tower without values": (second_tower, "does not say which values of vision"),
    "recipe of another compile": (
        lambda folder: text("recipe.yaml", (folder / "recipe.yaml").read_text().replace("seed: 0", "seed: 1"))(folder),
        "asks for something else",
    ),
}


@pytest.mark.parametrize(("harm", "message"), HARMS.values(), ids=list(HARMS))
def test_hostile_folder_is_refused(copied: Path, harm: Harm, message: str) -> None:
    harm(copied)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(copied)
    assert caught.value.where and caught.value.do and len(str(caught.value)) < 2000


def test_zeros_for_a_prompt_without_pictures_are_bounded(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("graph/prefill.json", "constants", "absent.inputs_embeds", value=1)(copied)
    load(copied)
    monkeypatch.setattr(agreement, "MOST_MADE", 47)
    with pytest.raises(ArtifactError, match="would fill the memory"):
        load(copied)


def test_unreadable_file_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "plan.yaml":
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **options)

    original = Path.open
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ArtifactError, match=r"PermissionError[\s\S]*plan\.yaml"):
        load(copied)


def test_undamaged_folder_and_one_without_the_mark_load(copied: Path) -> None:
    def unmark(data: dict[str, Any]) -> None:
        data.pop("quantization_config")
        data["model_type"] = data.pop("compiled_model_type")
        for part in ("text_config", "vision_config"):
            data[part].pop("quantization_config")

    load(copied)
    edit(copied, "config.json", unmark)
    assert load(copied).processor is not None


def test_a_class_of_transformers_refuses_the_folder(saved: Path) -> None:
    model, _ = llava()
    for loader in (type(model), transformers.LlamaForCausalLM):
        with pytest.raises(ValueError, match=r"qpcompile\.load"):
            loader.from_pretrained(saved)
    assert type(AutoProcessor.from_pretrained(saved)).__name__ == read(saved, MANIFEST)["processor"]


def test_modes_of_files_follow_the_umask(compiled_llava: CompiledVLM, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        compiled_llava.save_pretrained(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o640}
