"""Hide an owner's plain attributes and watch its children while its forward is traced, and put all of it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from se_inject.tracing.method_calls import reported_doors, reported_methods
from se_inject.tracing.settings import recorded, settings_of
from se_inject.tracing.snapshots import restore, snapshot

if TYPE_CHECKING:
    from se_inject.tracing.tracer import OwnerTracer


class _WatchedChildren(dict[str, Any]):
    """A module's children, which notices if somebody goes through all of them."""

    iterated = False

    def _all(self, name: str) -> Any:
        self.iterated = True
        return getattr(super(), name)()

    def __iter__(self) -> Any:
        return self._all("__iter__")

    def keys(self) -> Any:
        return self._all("keys")

    def values(self) -> Any:
        return self._all("values")

    def items(self) -> Any:
        return self._all("items")


@contextlib.contextmanager
def hidden_settings(tracer: OwnerTracer) -> Iterator[list[str]]:
    """Read the owner's plain attributes through the watch while this is open, and watch its children.

    Afterwards the owner is as before, and the list given holds the names of the attributes that had changed.
    """
    owner = tracer.owner.__dict__
    before = snapshot(tracer.owner)
    settings: dict[str, Any] = {}
    for key, value in settings_of(tracer.owner).items():
        if hasattr(type(tracer.owner), key):  # reads would find the class's
            tracer.settings_read[key] = recorded(value)
        else:
            settings[key] = owner.pop(key)
    hidden = owner["_parameters"].hidden
    hidden |= settings
    children = owner["_modules"] = _WatchedChildren(before[0]["_modules"])
    changed: list[str] = []
    methods = reported_methods(tracer)
    bound = {name: owner[name] for name in methods if name in owner}
    owner.update(methods)
    doors = reported_doors(tracer)
    for child, name, method in doors:
        child.__dict__[name] = method
    try:
        yield changed
    finally:
        tracer.iterates = children.iterated
        for key, method in methods.items():
            if owner.get(key) is method:
                del owner[key]
        owner.update(bound)
        for child, name, _ in doors:
            child.__dict__.pop(name, None)
        for key in settings:
            del hidden[key]
        if dict(children) == before[0]["_modules"]:
            owner["_modules"] = before[0]["_modules"]
        owner.update({key: value for key, value in settings.items() if key not in owner})
        changed += restore(tracer.owner, before)
