"""Check a module that came out of a file against the forward that came with it."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from se_inject.forwards.lines import check_module
from se_inject.forwards.marks import body_of, original_class
from se_inject.forwards.own_methods import bodies_in
from se_inject.forwards.programs import Program


def stored_lines(module: nn.Module) -> list[Any]:
    """Return the lines of every forward of this module that is data: an edited one, and the program it was made from."""
    body = body_of(module)
    lines = [line for each in bodies_in(body).values() for line in each] if body is not None else []
    if isinstance(module, Program):
        kind: Any = original_class(module)
        lines += json.loads(kind.program)["lines"]
    return lines


def check_forward(module: nn.Module, *, trusted: bool = False) -> None:
    """Check that forwards which are data call submodules of this module and read its tensors, and nothing else of it.

    Args:
        module: of any class, with its state. If its forward isn't stored as data there is nothing to check.
        trusted: whether it may call methods that the authors of its submodules wrote.

    Raises:
        LoadError: one calls or reads something else.
    """
    check_module(module, stored_lines(module), trusted)
