"""Allowed values of a pydantic model in words, for error messages and the generated recipe reference.

The words come from the model's JSON schema, so that they cannot diverge from the validation.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from qpcompile.nested import is_list, is_mapping
from qpcompile.recipe.yaml_text import short

MOST, LINE, VALUE = 900, 250, 80
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def impossible(reasons: Mapping[str, str]) -> PydanticCustomError:
    """An error for values that are valid alone but not together; reasons: key path below the model -> why."""
    return PydanticCustomError("impossible", "impossible combination", {"reasons": dict(reasons)})


def allowed(node: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """The values a JSON schema node accepts; root: the schema with the `$defs` it refers to."""
    if "$ref" in node:
        return allowed(section(node, root), root)
    if "const" in node:
        return json.dumps(node["const"]).strip('"')
    if "enum" in node:
        return " | ".join(json.dumps(value).strip('"') for value in node["enum"])
    if "anyOf" in node:
        return " | ".join(allowed(option, root) for option in node["anyOf"])
    kind = node.get("type", "anything")
    if kind == "object":
        return f"a section with the keys {', '.join(node['properties'])}" if "properties" in node else "a mapping"
    if kind == "array":
        return _allowed_list(node, root)
    if kind == "boolean":
        return "true | false"
    if kind == "string" and "maxLength" in node:
        return f"string of at most {node['maxLength']} characters"
    bounds = [f"{sign} {numeral(node[word])}" for word, sign in _BOUNDS.items() if word in node]
    return " ".join([kind, " and ".join(bounds)]).strip()


def numeral(value: float) -> str:
    """Integers in full, fractions in their shortest form."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def _allowed_list(node: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """The values an array node accepts."""
    if "prefixItems" in node:
        return f"[{', '.join(allowed(item, root) for item in node['prefixItems'])}]"
    items = allowed(node.get("items", {}), root)
    most = f", {node['maxItems']} at most" if "maxItems" in node else ""
    return f"list of ({items}){most}" if " | " in items else f"list of {items}{most}"


def section(node: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The node itself, or its reference resolved; an optional section resolves to the section."""
    if "$ref" in node:
        return section(root["$defs"][node["$ref"].rsplit("/", 1)[-1]], root)
    options = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
    return section(options[0], root) if len(options) == 1 and "$ref" in options[0] else node


def problems(model: type[BaseModel], error: ValidationError, data: Any) -> list[str]:
    """One line per wrong key of `data`, in the order found: its path, what was given, what is allowed.

    Lines beyond `MOST` characters in total are only counted: garbage input yields thousands.
    """
    schema = _schema(model)
    details = error.errors(include_url=False, include_input=False)
    lines: dict[str, str] = {}
    length = 0
    for seen, detail in enumerate(details, 1):
        for path, text in _explain(schema, detail, data):
            # A union reports one error per option, and a list its length after a wrong item: only the first is kept.
            if path not in lines and not any(known.startswith(f"{path}.") for known in lines):
                lines[path] = f"{short(path, LINE)}: {short(text, LINE)}"
                length += len(lines[path])
        if length > MOST and seen < len(details):
            return [*lines.values(), f"... and {len(details) - seen} more"]
    return list(lines.values())


@cache
def _schema(model: type[BaseModel]) -> Mapping[str, Any]:
    """A model's JSON schema, cached because generating it dominates the time here."""
    return model.model_json_schema()


def _explain(schema: Mapping[str, Any], detail: Mapping[str, Any], data: Any) -> list[tuple[str, str]]:
    """(path, problem) for one pydantic error: several for an impossible combination."""
    loc, kind = detail["loc"], detail["type"]
    if kind == "missing" and isinstance(loc[-1], int):
        loc = loc[:-1]
    path, node = _locate(schema, loc)
    if kind == "impossible":
        full = [[*path, *key.split(".")] for key in detail["ctx"]["reasons"]]
        reasons = detail["ctx"]["reasons"].values()
        return [(".".join(key), f"{_given(data, key)}: {why}") for key, why in zip(full, reasons, strict=True)]
    if kind == "extra_forbidden":
        key = short(str(loc[-1]), VALUE)
        return [(".".join([*path, _plain(key)]), _unknown(key, list(section(node, schema)["properties"])))]
    if kind == "invalid_key":
        return [(".".join([*path, _plain(short(str(loc[-1]), VALUE))]), "a key must be text")]
    why = f" ({detail['msg'].removeprefix('Value error, ')})" if kind == "value_error" else ""
    return [(".".join(path), f"{_given(data, path)}; allowed: {allowed(node, schema)}{why}")]


def _locate(schema: Mapping[str, Any], loc: Sequence[str | int]) -> tuple[list[str], Mapping[str, Any]]:
    """The key path of a pydantic location and its schema node; stops before union tags and unknown keys."""
    node: Mapping[str, Any] = schema
    path: list[str] = []
    for part in loc:
        inside = section(node, schema)
        if isinstance(part, str) and part in inside.get("properties", {}):
            node = inside["properties"][part]
        elif isinstance(part, int) and part < len(inside.get("prefixItems", [])):
            node = inside["prefixItems"][part]
        elif isinstance(part, int) and "items" in inside:
            node = inside["items"]
        else:
            break
        path.append(str(part))
    return path, node


def _given(data: Any, path: Sequence[str]) -> str:
    """`given <value>` for the value at a path, or that the key is missing."""
    for part in path:
        if isinstance(data, BaseModel):
            data = data.model_dump(mode="json")
        if is_mapping(data) and part in data:
            data = data[part]
        elif is_list(data) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        else:
            return "not given"
    try:
        text = json.dumps(data.model_dump(mode="json") if isinstance(data, BaseModel) else data, default=str)
    except (ValueError, RecursionError, TypeError):  # self-referencing values, huge integers, keys that are not text
        text = f"a {type(data).__name__} that cannot be shown"
    return f"given {short(text, VALUE)}"


def _plain(key: str) -> str:
    """A key unchanged, or quoted if it would break its line."""
    return key if key.isprintable() else json.dumps(key)


def _unknown(key: str, known: list[str]) -> str:
    """The message for a key that is not in the section."""
    close = difflib.get_close_matches(key, known, n=2)
    return f"unknown key; did you mean {' or '.join(close)}?" if close else f"unknown key; known: {', '.join(known)}"
