"""Read the marks on generated classes: what a class was made from, and the data that it was made of."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

ORIGINAL = "_se_inject_original"
BODY = "_se_inject_body"
THAWED = "_se_inject_thawed"
UNFUSED = "_se_inject_unfused"
ALWAYS_ON = "_se_inject_always_on"


def original_class(module: nn.Module) -> Any:
    """Return the class that the author wrote; it is the module's own class if nothing was generated."""
    return getattr(type(module), ORIGINAL, type(module))


def made_from(kind: Any) -> tuple[Any, ...]:
    """Return the original class and the text of the body for a class with an edited forward, else the class alone."""
    return (vars(kind)[ORIGINAL], vars(kind)[BODY]) if BODY in vars(kind) else (kind,)


def is_edited(module: nn.Module) -> bool:
    """Return whether a module's class, or a class that it inherits from, has an edited forward."""
    return hasattr(type(module), BODY)


def body_of(module: nn.Module) -> dict[str, Any] | None:
    """Return the data of a module's edited forward, ``edited.KEYS``; None for a module that has none."""
    text = getattr(type(module), BODY, None)
    return json.loads(text) if text else None


def steps_data(module: nn.Module) -> list[dict[str, Any]]:
    """Return the steps by which a module's forward was edited, as ``Step.to_data`` gave them."""
    body = body_of(module)
    return body["steps"] if body else []


def has_changed_class(module: nn.Module) -> bool:
    """Return whether somebody changed the class of a module with an edited forward afterwards, as parametrizations do."""
    return is_edited(module) and BODY not in vars(class_when_thawed(module))


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module is a batch normalisation whose statistics were frozen."""
    return THAWED in vars(type(module))


def is_fused(block: nn.Module) -> bool:
    """Return whether a block is fused with the operations behind it."""
    return UNFUSED in vars(type(block))


def class_when_unfused(block: nn.Module) -> Any:
    """Return the class that a block has, or that it will have again when it is unfused."""
    return vars(type(block)).get(UNFUSED, type(block))


def class_when_on(block: nn.Module) -> Any:
    """Return the class that a block has, or that it will have again when it can't be switched off any more."""
    return vars(type(block)).get(ALWAYS_ON, type(block))


def class_when_thawed(module: nn.Module) -> Any:
    """Return the class that a module has, or that it will have again when its statistics are thawed."""
    return vars(type(module)).get(THAWED, type(module))
