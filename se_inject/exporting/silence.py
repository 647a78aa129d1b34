"""Notice blocks that a network holds and never calls: a file of it would be one without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from se_inject.errors import ExportError
from se_inject.surgery import injected_blocks


@contextlib.contextmanager
def blocks_called(model: nn.Module) -> Iterator[None]:
    """Look on while a network is called, and check that every module which is called calls the blocks in it.

    Raises:
        ExportError: a module returned without having called its block.
    """
    blocks = dict(injected_blocks(model))
    watched = {path: model.get_submodule(path) for block in blocks for path in (block, block.rpartition(".")[0])}
    called: set[str] = set()
    hooks = [module.register_forward_hook(lambda *_, path=path: called.add(path)) for path, module in watched.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [path for path in blocks if path not in called and path.rpartition(".")[0] in called]:
        raise ExportError(
            f"the network holds blocks that it doesn't call: {len(silent)}, `{silent[0]}` the first",
            seen=f"`{silent[0].rpartition('.')[0] or type(model).__name__}` returns without it",
            hint="something has put another forward in its place: inject into the network as it is to be exported",
        )
