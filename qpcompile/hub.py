"""Compiled models on the Hugging Face hub: download one by its name, upload a folder."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qpcompile.errors import ArtifactError, OutputError
from qpcompile.files import staged_folder

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
MANIFEST = "manifest.json"
# What a new repository may hold before the first upload.
BLANK = frozenset({".gitattributes", "README.md", "LICENSE"})
# The hub answers over HTTP, and what cannot be reached raises an error of the operating system.
FAILURES = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OfflineModeIsEnabled, OSError)


def is_hub_name(source: object) -> bool:
    """Whether a text that names no folder here has the form of a name on the hub: `organization/name`."""
    return isinstance(source, str) and NAME.fullmatch(source) is not None and not Path(source).exists()


def downloaded(name: str, **options: Any) -> Path:
    """The folder of a model on the hub, downloaded unless the cache has it. It holds plain files.

    Args:
        name: `organization/name`.
        options: of huggingface_hub.snapshot_download: revision, token, cache_dir, local_files_only, force_download.

    Raises ArtifactError, with what the hub said, if there is no such model or no way to it.
    """
    try:
        snapshot = Path(snapshot_download(name, **options))
    except FAILURES as error:
        what, do = _explained(error)
        raise ArtifactError(
            f"no folder here is named {name}, and the hub did not give it: {what}", where=f"hub, {name}", do=do
        ) from error
    return _plain(snapshot, Path(options.get("cache_dir") or constants.HF_HUB_CACHE) / "qpcompile" / name)


def uploaded(
    folder: Path, name: str, *, message: str, private: bool | None, revision: str | None, token: str | None
) -> str:
    """Upload an artifact folder as one commit, in place of the artifact that the repository holds; its address.

    Raises OutputError, with what the hub said, for a repository that holds something else and one that is not writable.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        there = set(api.list_repo_files(name, revision=revision))
        if MANIFEST not in there and there - BLANK:
            raise OutputError(
                f"the repository holds something else: {', '.join(sorted(there - BLANK)[:3])}",
                where=f"hub, {name}",
                do="name a new repository, or one that holds a compiled model",
            )
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, revision=revision, delete_patterns="*"
        )
    except FAILURES as error:
        what, do = _explained(error)
        raise OutputError(f"the hub did not take the model: {what}", where=f"hub, {name}", do=do) from error
    return str(commit.commit_url)


def _plain(snapshot: Path, home: Path) -> Path:
    """A folder of hard links to the files of a snapshot: the cache has symbolic links, which no artifact may hold."""
    folder = home / snapshot.name
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    cache = snapshot.resolve().parents[1]
    with staged_folder(folder) as aside:
        for path in sorted(snapshot.rglob("*")):
            if path.is_dir():
                continue
            file, target = path.resolve(), aside / path.relative_to(snapshot)
            if not file.is_relative_to(cache):
                raise ArtifactError("a file of the cache leads out of it", where=str(path), do="clear the cache")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # another file system, or one without links
                shutil.copyfile(file, target)
    return folder


def _explained(error: Exception) -> tuple[str, str]:
    """(what happened, what to do) in words."""
    known: list[tuple[type[Exception], str, str]] = [
        (GatedRepoError, "access to it must be granted", "ask for access on its page, then `hf auth login`"),
        (RevisionNotFoundError, "it has no such revision", "name a branch, a tag or a commit that it has"),
        (
            RepositoryNotFoundError,
            "it knows no such model, or it is private",
            "check the name; for a private one, `hf auth login`, or give token=...",
        ),
        (HFValidationError, "this is not a name that it allows", "name it as organization/name"),
    ]
    for kind, what, do in known:
        if isinstance(error, kind):
            return what, do
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so that it is not asked", "unset it to use the network, or name a folder"
    if isinstance(error, LocalEntryNotFoundError):
        return "the cache has none, and it cannot be reached", "check the network, or name a folder"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "it refuses this account", "`hf auth login` with a token that may write there, or give token=..."
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{type(error).__name__}: {text}", "check the network and https://status.huggingface.co, then try again"
