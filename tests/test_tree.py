"""The repository contains no leftover files of an editor, a merge or a patch."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = re.compile(r"\.(bak|orig|rej|tmp|swp|swo|partial)$|~$|(^|/)(\.DS_Store|nohup\.out)$")


def test_nothing_was_left_behind() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository: what belongs to it is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(listed) > 1000 and not [name for name in listed.split("\0") if LEFT_BEHIND.search(name)]


@pytest.mark.parametrize("name", ["tests/a.py.bak", "a.orig", "x/b.rej", "notes~", "a.tmp", ".a.py.swp", "x/.DS_Store"])
def test_what_is_left_behind_is_seen(name: str) -> None:
    assert LEFT_BEHIND.search(name)


@pytest.mark.parametrize("name", ["tests/test_tree.py", "docs/original.md", "kernels/tmp_rows.c", "backup.py"])
def test_other_files_are_not(name: str) -> None:
    assert not LEFT_BEHIND.search(name)
