"""A stand-in for the package ray: tasks run in this process when they are waited for, the last one first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest


class StandIn(ModuleType):
    """What ray_rows.py uses of Ray.

    losses: name of a row -> how many of its attempts are lost. machines: the resources of each.
    """

    def __init__(self, machines: list[dict[str, float]]) -> None:
        super().__init__("ray")
        self.machines, self.losses = machines, dict[str, int]()
        self.needs: dict[str, Any] = {}
        self.order: list[str] = []
        self.cancelled: list[Any] = []
        self.exceptions = ModuleType("ray.exceptions")
        self.exceptions.RayError = type("RayError", (Exception,), {})  # type: ignore[attr-defined]
        names = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError", "RayTaskError")
        for name in (*names, "LocalRayletDiedError"):
            setattr(self.exceptions, name, type(name, (self.exceptions.RayError,), {}))
        self.died = False
        self.util = type("util", (), {"get_node_ip_address": staticmethod(lambda: "10.0.0.1")})

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": each} for each in self.machines]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, function: Callable[..., Any]) -> Any:
        return _Remote(self, function)

    def wait(self, references: list[Any]) -> tuple[list[Any], list[Any]]:
        return references[-1:], references[:-1]

    def cancel(self, reference: Any, force: bool) -> None:
        self.cancelled.append(reference)

    def get(self, reference: Callable[[], Any]) -> Any:
        return reference()


class _Remote:
    def __init__(self, ray: StandIn, function: Callable[..., Any]) -> None:
        self._ray, self._function = ray, function

    def options(self, **needs: Any) -> _Remote:
        self._ray.needs = needs
        return self

    def remote(self, station: Any, id: str, name: str, *rest: Any) -> Callable[[], Any]:
        def result() -> Any:
            ray = self._ray
            ray.order.append(name)
            if ray.died:
                raise ray.exceptions.LocalRayletDiedError("The task's local raylet died.\nmore")
            if ray.losses.get(name, 0) > 0:
                ray.losses[name] -= 1
                raise ray.exceptions.WorkerCrashedError
            try:
                return self._function(station, id, name, *rest)
            except Exception as error:
                lost = ray.exceptions.RayTaskError("a long traceback")
                lost.cause = error
                raise lost from error

        return result


def forget() -> None:
    """Have ray_rows imported anew the next time."""
    sys.modules.pop("qpcompile.evaluate.run.ray_rows", None)
    vars(importlib.import_module("qpcompile.evaluate.run")).pop("ray_rows", None)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in with two machines, which ray_rows is imported with."""
    forget()
    made = StandIn([{"CPU": 2, "memory": 4 * 2**30}, {"CPU": 4, "memory": 8 * 2**30}])
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setitem(sys.modules, "ray.exceptions", made.exceptions)
    yield made
    forget()
