"""Mappings in and out of YAML text: safe tags only, no key twice, floats as YAML 1.2 spells them.

PyYAML follows YAML 1.1, where `1e-6` is a string and a repeated key silently replaces the first one.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from qpcompile.errors import QPCompileError

# PyYAML lets the last three escape on texts such as `0b_`, `!!bool x` and `!!timestamp x`.
_MISTAKES = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads `1e-6` as a number and refuses a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes every value out, without anchors, so that equal values print equally."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Both ways, so that the text "1e6" is written in quotes. The table is copied into each class first: PyYAML's stay.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse(text: str, refuse: Callable[[str], QPCompileError]) -> Any:
    """The value of YAML text; what is wrong with it goes through `refuse` and is raised."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _MISTAKES as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise refuse(f"not valid YAML: {place}{getattr(error, 'problem', None) or error}") from error


def parse_mapping(text: str, refuse: Callable[[str], QPCompileError]) -> dict[str, Any]:
    """The mapping of YAML text; anything else is refused."""
    value = parse(text, refuse)
    if not isinstance(value, dict):
        raise refuse(f"a mapping of keys is needed at the top, got {type(value).__name__}")
    return value


def write(value: Mapping[str, Any]) -> str:
    """ASCII text of plain dicts, lists and scalars: keys in the order given, floats by repr, short lists inline."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=None)
