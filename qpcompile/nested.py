"""Type guards of nested plain values of unknown origin: what a list or a mapping holds is `Any`.

After a bare `isinstance(value, list)` a strict type checker knows nothing about the items, and refuses their use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether a value is a list or a tuple."""
    return isinstance(value, (list, tuple))


def is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    """Whether a value is a dict."""
    return isinstance(value, dict)


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether a value is a dict or another mapping."""
    return isinstance(value, Mapping)
