"""Find the blocks that a call of the network doesn't reach: a file written from that call would be without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from se_inject.blocks import SqueezeExcitation
from se_inject.errors import ExportError
from se_inject.surgery import injected_blocks
from se_inject.tracing import observe_model

_OURS = (SqueezeExcitation,)


@contextlib.contextmanager
def blocks_called(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], skipped: list[str]
) -> Iterator[None]:
    """Look on while a network is called, and check that it calls all blocks that it holds.

    Blocks that no module lists any more, because its class was taken back, count as well.

    Args:
        model: the network.
        example: positional and keyword arguments of the call.
        skipped: gets the paths of blocks that this call doesn't reach because the network decides by the data what it calls.

    Raises:
        ExportError: a block was not called.
    """
    listed = [path for path, _ in injected_blocks(model)]
    lost = [path for path, module in model.named_modules() if path not in listed and isinstance(module, _OURS)]
    blocks = [*listed, *lost]
    watched = {path: model.get_submodule(path) for block in blocks for path in (block, block.rpartition(".")[0])}
    called: set[str] = set()
    hooks = [module.register_forward_hook(lambda *_, path=path: called.add(path)) for path, module in watched.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    silent = [path for path in blocks if path not in called]
    if silent and all(path.rpartition(".")[0] not in called for path in silent):
        trace = observe_model(model, *example)
        skipped += [path for path in silent if trace.may_skip(path.rpartition(".")[0])]
    if silent := [path for path in silent if path not in skipped]:
        owner = silent[0].rpartition(".")[0]
        returned = owner in called
        raise ExportError(
            f"the network holds blocks that it doesn't call: {len(silent)}, `{silent[0]}` the first",
            seen=f"`{owner or type(model).__name__}` {'returns without it' if returned else 'is not called'}",
            hint="something has put another forward or class in its place: inject into the network as it is to be exported"
            if returned
            else "inject into the network as it is to be exported, or eject the blocks first",
        )
