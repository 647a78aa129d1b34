"""Methods of an edited module beside its forward that are data too: how a graph says that one is called, and their lines."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn

from se_inject.forwards.vocabulary import is_plain_name


class OwnMethod:
    """The target of a node that calls a method of the module itself."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"`{self.__name__}` is called on a module")


def calls_own_method(node: fx.Node) -> bool:
    """Return whether a node calls a method of the module itself."""
    return isinstance(node.target, OwnMethod)


def is_method_name(original: Any, name: Any) -> bool:
    """Return whether a class has a public method of this name that its author wrote: one that may be data instead."""
    named = is_plain_name(name) and not name.startswith("_") and not hasattr(nn.Module, name)
    return named and inspect.isfunction(inspect.getattr_static(original, name, None))


def bodies_in(data: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the lines of the forward and of the methods in the data of an edited forward, by name."""
    return {"forward": data["lines"], **data.get("methods", {})}


def with_bodies(data: dict[str, Any], bodies: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the data of an edited forward with these lines instead."""
    rest = {name: lines for name, lines in bodies.items() if name != "forward"}
    kept = {key: value for key, value in data.items() if key != "methods"}
    return {**kept, "lines": bodies["forward"], **({"methods": rest} if rest else {})}
