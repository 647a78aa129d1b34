"""Name the functions in graphs."""

from __future__ import annotations

import torch
from torch import fx

_IN_PLACE = {"add_": "iadd", "sub_": "isub", "mul_": "imul", "div_": "itruediv"}


def function_name_of(node: fx.Node) -> str:
    """Return the name of a node's function or method.

    An operator of torch has no overload here, and is called as Python's operator in place is: ``add``, ``iadd``.
    """
    target = node.target
    if isinstance(target, str):
        return target
    name: str = target.__name__ if hasattr(target, "__name__") else str(target)
    if not isinstance(target, torch._ops.OpOverload):
        return name
    name = name.partition(".")[0]
    return _IN_PLACE.get(name, name)
