"""Safe YAML reader and writer: plain values only, no duplicate keys, YAML 1.2 floats, bounded work.

PyYAML follows YAML 1.1, where `1e-6` is a string and a repeated key silently replaces the first one. Aliases, merge
keys and long integers let a short text demand unbounded time and memory: none are needed here, and all are refused.
"""

import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from qpcompile.errors import QPCompileError
from qpcompile.nested import is_dict

SMALL = 64 * 1024
"""Size limit in bytes of hand-written files: twenty times a recipe with every key."""
LARGE = 1024 * 1024
"""Size limit in bytes of generated files: several times the plan of a decoder with a hundred layers."""
DEEPEST = 16
LONGEST = 1000
DIGITS = 40
SHOWN = 200

# PyYAML raises the last three on texts such as `0b_`, `!!bool x` and `!!timestamp x`.
_MISTAKES = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
_MERGE = "tag:yaml.org,2002:merge"
_INT = "tag:yaml.org,2002:int"


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads `1e-6` as a number, refuses duplicate keys, and bounds its work."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = _upcoming(self)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refusal("anchors and aliases (& and *) are not read; write the value out", event)
        if event.tag is not None:
            raise _refusal("tags (!) are not read; write a plain value", event)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST:
            raise _refusal(f"a value of {len(event.value)} characters; {LONGEST} are read at most", event)
        if self.depth >= DEEPEST:
            raise _refusal(f"more than {DEEPEST} levels of nesting", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                raise _refusal("merge keys (<<) are not read; write the keys out", key)
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _refusal(f"key {short(repr(key.value))} twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """An integer of bounded length: Python refuses, or is slow on, thousands of digits."""
        if len(node.value) > DIGITS:
            raise _refusal(f"an integer of {len(node.value)} characters; {DIGITS} are read at most", node)
        return self.construct_yaml_int(node)


def _upcoming(loader: Any) -> Any:
    """The event that is parsed next; PyYAML's stubs leave its type open."""
    return loader.peek_event()


def _refusal(problem: str, place: Any) -> yaml.YAMLError:
    """PyYAML's error for a defect at an event or a node."""
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


_Loader.add_constructor(_INT, _Loader.construct_int)


class _Dumper(yaml.SafeDumper):
    """SafeDumper without anchors, so that equal values print equally."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# For both classes, so that the text "1e6" is quoted. Each class gets a copy of the table: PyYAML's is unchanged.
yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."), Loader=_Loader, Dumper=_Dumper)


def short(text: str, most: int = SHOWN) -> str:
    """The text, truncated so that messages stay readable."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def read(path: Path, refuse: Callable[[str], QPCompileError], most: int = SMALL) -> str:
    """The text of a file of at most `most` bytes; `refuse` creates the error from a problem such as "cannot be
    read".
    """
    try:
        # Reading a pipe would block, and a device has no end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise refuse("cannot be read: a folder, a pipe or a device, not a file")
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise refuse(f"has more than {most} bytes, which is more than is read")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise refuse(f"cannot be read: byte {error.start} is not UTF-8 text") from error
    except ValueError as error:  # a path with a null byte
        raise refuse(f"cannot be read: {error}") from error


def parse(text: str, refuse: Callable[[str], QPCompileError], most: int = SMALL) -> Any:
    """The value of YAML text of at most `most` characters; problems are raised through `refuse`."""
    if len(text) > most:
        raise refuse(f"not valid YAML: {len(text)} characters; {most} are read at most")
    try:
        return yaml.load(text, Loader=_Loader)
    except _MISTAKES as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise refuse(f"not valid YAML: {place}{short(problem)}") from error


def parse_mapping(text: str, refuse: Callable[[str], QPCompileError], most: int = SMALL) -> dict[str, Any]:
    """Parse a YAML mapping; anything else is refused."""
    value = parse(text, refuse, most)
    if not is_dict(value):
        raise refuse(f"a mapping of keys is needed at the top, got {type(value).__name__}")
    return value


def write(value: Mapping[str, Any]) -> str:
    """ASCII text of plain dicts, lists and scalars: keys in the order given, floats by repr, short lists inline."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=None)
