"""Typed measurements that passes hand to later passes; they are not saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement(Generic[T]):
    """A key of `Measurements`: its name, and to type checkers, the type of its value. Keys are defined next to that
    type.
    """

    name: str


class Measurements:
    """Values by key, each of its key's type. A key without a value raises KeyError."""

    def __init__(self) -> None:
        self._values: dict[Measurement[Any], Any] = {}

    def __getitem__(self, key: Measurement[T]) -> T:
        return self._values[key]

    def __setitem__(self, key: Measurement[T], value: T) -> None:
        self._values[key] = value

    def __delitem__(self, key: Measurement[Any]) -> None:
        del self._values[key]

    def __contains__(self, key: Measurement[Any]) -> bool:
        return key in self._values

    def get(self, key: Measurement[T]) -> T | None:
        """The value, or None if there is none."""
        return self._values.get(key)
