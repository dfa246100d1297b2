"""Ways to damage an artifact folder. Each changes one thing and returns whether it may then be another model."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# When run as a script, this folder is on the path, but not its parents.
sys.path[1:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import artifacts  # noqa: E402
from artifacts import MANIFEST  # noqa: E402

WEIGHTS = "model-00001-of-00001.safetensors"
# Files that define the model or its prompts: a changed one makes another model.
SETTINGS = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OTHER = (*SETTINGS, "generation_config.json")
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1,
        2,
        3.5,
        10**9,
        2**63,
        -(2**63),
        10**30,
        1e300,
        "",
        "x",
        "../x",
        "/etc/passwd",
        "a\nb",
        "é" * 300,
    ),
    *(
        [],
        {},
        [[]],
        [1],
        {"x": 1},
        "f32[9, 9]",
        "int 9**9**9",
        "@class",
        "%0",
        "aten::relu.default",
        "__import__('os')",
    ),
    *({"ref": "%0"}, "inf", "\ud800", "x" * 100_000, [0] * 10_000, float("nan")),
)


@dataclass(frozen=True)
class Damage:
    """`change` damages a folder and returns whether it may be another model."""

    name: str
    change: Callable[[Path, random.Random], bool]

    def run(self, folder: Path, choice: random.Random, rehash: bool) -> bool:
        """Damage the folder, and recompute the hashes if `rehash`."""
        other = self.change(folder, choice)
        if rehash and (folder / MANIFEST).is_file() and not (folder / MANIFEST).is_symlink():
            # A manifest that is no longer readable is left unchanged.
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                artifacts.rehash(folder)
        return other


def files(folder: Path) -> list[str]:
    """Every plain file of the folder, sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    )


def is_other(name: str) -> bool:
    """Whether a file with other bytes makes another model."""
    return name in OTHER or name == WEIGHTS or (name.startswith("graph/") and name.endswith(".json"))


def flip(folder: Path, choice: random.Random) -> bool:
    """Flip one to four bits of a file."""
    name = choice.choice([name for name in files(folder) if (folder / name).stat().st_size])
    data = bytearray((folder / name).read_bytes())
    for _ in range(choice.randint(1, 4)):
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    artifacts.replace(folder, name, bytes(data))
    return is_other(name)


def cut_short(folder: Path, choice: random.Random) -> bool:
    """Truncate a file, sometimes to nothing."""
    name = choice.choice(files(folder))
    data = (folder / name).read_bytes()
    artifacts.replace(folder, name, data[: choice.choice([0, 1, len(data) // 2, max(len(data) - 1, 0)])])
    return name in SETTINGS


def append(folder: Path, choice: random.Random) -> bool:
    """Append bytes to a file."""
    name = choice.choice(files(folder))
    more = choice.choice([b"\n", b" ", b"\0", b"{}", b"x" * 1000])
    artifacts.replace(folder, name, (folder / name).read_bytes() + more)
    return is_other(name)


def remove(folder: Path, choice: random.Random) -> bool:
    """Remove a file, also from the manifest if hashes are recomputed."""
    name = choice.choice(files(folder))
    (folder / name).unlink()
    if name != MANIFEST and choice.random() < 0.5:
        content = artifacts.read(folder, MANIFEST)
        del content["files"][name]
        artifacts.replace(folder, MANIFEST, json.dumps(content))
    return name in OTHER


def swap(folder: Path, choice: random.Random) -> bool:
    """Swap two files."""
    first, second = choice.sample(files(folder), 2)
    left, right = (folder / first).read_bytes(), (folder / second).read_bytes()
    artifacts.replace(folder, first, right)
    artifacts.replace(folder, second, left)
    return first in OTHER and second in OTHER


def link(folder: Path, choice: random.Random) -> bool:
    """Replace a file by a link: to equal bytes outside, to another file inside, or to nothing."""
    name = choice.choice(files(folder))
    outside = folder.parent / "outside"
    outside.unlink(missing_ok=True)
    outside.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(choice.choice([outside, folder / "config.json", Path("/etc/passwd"), Path("nothing")]))
    return False


def special(folder: Path, choice: random.Random) -> bool:
    """Add something that is not a plain file, or a file that is not listed."""
    path = folder / choice.choice(["x.json", ".x.json", "x.html", "graph/x.json", "tokenizer.model", "a b.txt"])
    kind = choice.choice(["fifo", "folder", "link", "file", "pickle"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc", target_is_directory=True)
    else:
        path.write_bytes(b"\x80\x04x" if kind == "pickle" else b"{}")
    return False


def json_value(folder: Path, choice: random.Random) -> bool:
    """Change one value of a JSON file, sometimes its type; or remove or duplicate it."""
    name = choice.choice([name for name in files(folder) if name.endswith(".json")])
    data = artifacts.read(folder, name)
    places = list(_places(data))
    parent, key = choice.choice(places)
    how = choice.choice(["odd", "odd", "gone", "other", "twice", "near"])
    if how == "odd":
        parent[key] = choice.choice(ODD)
    elif how == "gone":
        del parent[key]
    elif how == "other":
        elsewhere, place = choice.choice(places)
        parent[key] = copy.deepcopy(elsewhere[place])
    elif how == "twice":
        parent.insert(key, parent[key]) if isinstance(parent, list) else parent.update({f"{key}x": parent[key]})
    else:
        parent[key] = _near(parent[key], choice)
    artifacts.replace(folder, name, json.dumps(data, indent=2))
    return is_other(name)


def yaml_line(folder: Path, choice: random.Random) -> bool:
    """Change, remove or duplicate one line of the recipe or the plan."""
    name = choice.choice(["recipe.yaml", "plan.yaml"])
    lines = (folder / name).read_text().split("\n")
    place = choice.randrange(len(lines) - 1)
    key = lines[place].split(":")[0]
    lines[place : place + 1] = choice.choice(
        [
            [],
            [lines[place]] * 2,
            [f"{key}: {choice.choice(['9', '-1', '1e300', 'x', 'null', '[[[[', '&a [*a]', '!!python/x 1'])}"],
        ]
    )
    artifacts.replace(folder, name, "\n".join(lines))
    return False


def header(folder: Path, choice: random.Random) -> bool:
    """Change one entry of the weights' header: a name, a dtype, sizes, offsets; sometimes the header's length."""
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    name = choice.choice([key for key in entries if key != "__metadata__"])
    other = choice.choice([key for key in entries if key != "__metadata__"])
    how = choice.choice(["type", "sizes", "offsets", "name", "swap", "length", "odd"])
    if how == "type":
        entries[name]["dtype"] = choice.choice(["F16", "I8", "U8", "F64", "X9", "F8_E4M3", 7])
    elif how == "sizes":
        entries[name]["shape"] = choice.choice([[], [0], entries[name]["shape"][::-1], [2**62, 4], [-1], "x"])
    elif how == "offsets":
        entries[name]["data_offsets"] = choice.choice([[0, 2**40], entries[other]["data_offsets"], [5, 1], []])
    elif how == "name":
        entries[choice.choice(["x", "", "../x", name + "x"])] = entries.pop(name)
    elif how == "swap":
        entries[name], entries[other] = entries[other], entries[name]
    elif how == "odd":
        entries[name] = choice.choice(ODD)
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8", "surrogatepass")
    size = choice.choice([0, 2**63, len(text) + 1, len(data) * 2]) if how == "length" else len(text)
    artifacts.replace(folder, WEIGHTS, size.to_bytes(8, "little") + text + data[8 + length :])
    return how == "swap"


def numbers(folder: Path, choice: random.Random) -> bool:
    """Flip bits of the tensors themselves."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(choice.randint(1, 50)):
        data[choice.randrange(start, len(data))] = choice.choice([0, 255, 127, 128])
    artifacts.replace(folder, WEIGHTS, bytes(data))
    return True


def _places(value: Any) -> Any:
    """(container, key) of every value, at every level."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _near(value: Any, choice: random.Random) -> Any:
    """A slightly different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + choice.choice([-1, 1, 7])
    if isinstance(value, str):
        return value[1:] if choice.random() < 0.5 else value + "x"
    if isinstance(value, list):
        return value[::-1] if choice.random() < 0.5 else value[1:]
    return dict(list(value.items())[1:]) if isinstance(value, dict) else 1


DAMAGES = [
    *(Damage("bits of a file", flip), Damage("file cut short", cut_short), Damage("bytes appended", append)),
    *(Damage("file removed", remove), Damage("files swapped", swap), Damage("file is a link", link)),
    *(Damage("link, fifo, stranger", special), Damage("header of the weights", header)),
    *(Damage("numbers of the weights", numbers), Damage("line of YAML", yaml_line)),
    *[Damage("value in JSON", json_value)] * 4,
]
