"""Compile TorchScript from source, also where torch has freed operators whose addresses it still has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def scripted(model: nn.Module) -> Any:
    """Compile a network to TorchScript from its source.

    torch lists operators by their addresses, and leaves the address listed when it frees one, as it does while it
    imports inductor for ``torch.compile``. What Python puts there next, a tuple of a module for example, is then taken
    for that operator: "builtin cannot be used as a value". Such addresses are removed from the list first.
    """
    _forget_freed_operators()
    return torch.jit.script(model)


def _forget_freed_operators() -> None:
    listed: dict[int, str] = getattr(torch.jit._builtins, "_builtin_table", None) or {}
    for address, name in list(listed.items()):
        namespace, _, short = name.partition("::")
        if namespace in ("aten", "prim"):  # functions of torch, which live as long as it does
            continue
        packet = vars(vars(torch.ops).get(namespace, torch.ops)).get(short)
        if torch._C._jit_get_operation(name)[0] is None if packet is None else id(packet._op) != address:
            listed.pop(address, None)
