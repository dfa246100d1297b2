"""Compiled models on the hub and through transformers' auto classes; the hub is a folder here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import errors
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import qpcompile
from qpcompile import hub
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import ArtifactError, InputError, OutputError

NAME = "org/model"
TESTBED = Path(__file__).resolve().parents[1] / "testbed" / "llava"


def response(status: int) -> Any:
    """What errors of the hub's library read of a response."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


class FakeHub:
    """Repositories as dicts of files, and a cache as huggingface_hub lays it out: links to blobs."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, token: str | None = None) -> FakeHub:
        self.asked.append(("token", token))
        return self

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.asked.append(("private", private))
        self.files.setdefault(name, {".gitattributes": b""})

    def list_repo_files(self, name: str, *, revision: str | None) -> list[str]:
        return list(self.files[name])

    def upload_folder(self, *, repo_id: str, folder_path: Path, delete_patterns: str, **_: Any) -> SimpleNamespace:
        assert delete_patterns == "*"
        paths = [path for path in folder_path.rglob("*") if path.is_file()]
        self.files[repo_id] = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in paths}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot(self, name: str, **options: Any) -> str:
        self.asked.append((name, options))
        if name not in self.files:
            raise errors.RepositoryNotFoundError("404", response=response(404))
        home = self.cache / f"models--{name.replace('/', '--')}"
        for place, (path, data) in enumerate(self.files[name].items()):
            blob, link = home / "blobs" / str(place), home / "snapshots" / "abc" / path
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(data)
            if not link.exists():
                link.symlink_to(blob)
        return str(home / "snapshots" / "abc")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(hub, "HfApi", made)
    monkeypatch.setattr(hub, "snapshot_download", made.snapshot)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return made


@pytest.fixture(scope="module")
def model(compiled_llava: CompiledVLM) -> CompiledVLM:
    return CompiledVLM(compiled_llava.program, AutoProcessor.from_pretrained(TESTBED))


@pytest.fixture(scope="module")
def saved(model: CompiledVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "out"
    model.save_pretrained(folder)
    return folder


def test_what_is_pushed_loads_by_its_name(
    model: CompiledVLM, fake: FakeHub, tiny_llava: tuple[Any, dict[str, dict[str, torch.Tensor]]]
) -> None:
    assert model.push_to_hub(NAME, private=True, token="t") == "https://hub/org/model/commit/1"
    assert fake.asked == [("token", "t"), ("private", True)]
    inputs = tiny_llava[1]["one"]
    for _ in range(2):  # the second time from the plain folder beside the cache
        loaded = qpcompile.load(NAME, revision="main")
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)  # type: ignore[arg-type]
    assert fake.asked[-1] == (NAME, {"revision": "main"})
    assert model.push_to_hub(NAME)  # replaces the artifact


def test_a_repository_with_something_else_is_left_alone(model: CompiledVLM, fake: FakeHub) -> None:
    fake.files[NAME] = {"README.md": b"", "pytorch_model.bin": b"weights"}
    with pytest.raises(OutputError, match=r"holds something else: pytorch_model\.bin"):
        model.push_to_hub(NAME)
    assert fake.files[NAME]["pytorch_model.bin"] == b"weights"


def test_a_folder_of_that_name_is_meant_first(
    saved: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / NAME).symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    qpcompile.load(NAME)
    assert not fake.asked


def test_links_out_of_the_cache_are_refused(model: CompiledVLM, fake: FakeHub, tmp_path: Path) -> None:
    model.push_to_hub(NAME)
    snapshot = Path(fake.snapshot(NAME))
    (tmp_path / "secret").write_text("x")
    (snapshot / "notes.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="leads out of it"):
        hub._plain(snapshot, tmp_path / "plain")


@pytest.mark.parametrize(
    "error, said",
    [
        (errors.RepositoryNotFoundError("404", response=response(404)), "knows no such model, or it is private"),
        (errors.GatedRepoError("403", response=response(403)), "access to it must be granted"),
        (errors.RevisionNotFoundError("404", response=response(404)), "no such revision"),
        (errors.HfHubHTTPError("403", response=response(403)), "refuses this account"),
        (errors.HfHubHTTPError("server on fire", response=response(500)), "server on fire"),
        (errors.LocalEntryNotFoundError("no"), "the cache has none, and it cannot be reached"),
        (errors.OfflineModeIsEnabled("no"), "HF_HUB_OFFLINE is set"),
        (OSError(113, "No route to host"), "No route to host"),
    ],
)
def test_what_the_hub_says_is_told(
    error: Exception, said: str, fake: FakeHub, model: CompiledVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(ArtifactError, match="no folder here is named org/model") as caught:
        qpcompile.load(NAME)
    assert said in caught.value.what and caught.value.do
    monkeypatch.setattr(fake, "upload_folder", fails)
    with pytest.raises(OutputError, match="the hub did not take the model") as refused:
        model.push_to_hub(NAME)
    assert said in refused.value.what


def test_arguments_of_load_are_known() -> None:
    with pytest.raises(InputError, match="load has no argument device"):
        qpcompile.load("out", device="cuda")


def test_auto_classes_load_once_they_are_told(saved: Path, model: CompiledVLM) -> None:
    qpcompile.register_with_transformers()
    qpcompile.register_with_transformers()
    auto: Any = AutoModelForImageTextToText
    loaded = auto.from_pretrained(saved, device_map="cpu", dtype="auto")
    assert isinstance(loaded, CompiledVLM) and loaded.config.model_type == "llava"
    assert AutoConfig.from_pretrained(saved).model_type == "qpcompile"
    assert transformers.pipeline("image-text-to-text", model=str(saved)).model.plan == model.plan


@pytest.mark.parametrize(
    "options, named",
    [
        ({"attn_implementation": "eager"}, "attn_implementation"),
        ({"image_token_index": 7}, "image_token_index"),
        ({"device_map": "auto"}, "device_map='auto'"),
        ({"device_map": {"": "cpu"}}, "device_map={'': 'cpu'}"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"dtype": torch.float16}, "compiled in torch.float32, not torch.float16"),
    ],
)
def test_auto_classes_ignore_nothing(options: dict[str, Any], named: str, saved: Path) -> None:
    qpcompile.register_with_transformers()
    auto: Any = AutoModelForImageTextToText
    with pytest.raises(InputError) as caught:
        auto.from_pretrained(saved, **options)
    assert named in caught.value.what


ALONE = """
import sys, transformers
for name in ("AutoModelForImageTextToText", "AutoConfig", "LlavaForConditionalGeneration"):
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except ValueError as error:
        print(name, str(error).splitlines()[0])
print(type(transformers.AutoProcessor.from_pretrained(sys.argv[1])).__name__)
"""


@pytest.mark.slow
def test_plain_transformers_refuses_the_folder(saved: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE, str(saved)], capture_output=True, text=True, check=True)
    *refused, processor = done.stdout.splitlines()
    assert len(refused) == 3 and processor == "LlavaProcessor"
    assert all("model type `qpcompile`" in line for line in refused[:2]) and "qpcompile.load(folder)" in refused[2]
