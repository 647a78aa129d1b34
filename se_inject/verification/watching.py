"""Follow the blocks of a network while it runs, and name the one that fails."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from se_inject.surgery import steps_of
from se_inject.verification.calls import first_line


@contextlib.contextmanager
def watched(blocks: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Record the paths of the blocks that have been called and have not returned."""
    running: list[str] = []

    def returned(*_: Any) -> None:
        running.pop()

    hooks = []
    for path, block in blocks.items():
        hooks.append(block.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        hooks.append(block.register_forward_hook(returned))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def calls_of(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[Counter[str]]:
    """Count the calls of the blocks and their owners meanwhile."""
    calls: Counter[str] = Counter()
    modules = {path: model.get_submodule(path) for block in blocks for path in (block, block.rpartition(".")[0])}
    hooks = [
        module.register_forward_hook(lambda *_, path=path: calls.update([path])) for path, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def failure(after: nn.Module, error: Exception, running: list[str]) -> str:
    """Name what failed: the block that was running, or else the network."""
    what = named(after, running[-1]) if running else "the injected network"
    return f"{what} fails: {type(error).__name__}: {first_line(error)}"


def named(after: nn.Module, path: str) -> str:
    """Name the block with this path."""
    return next(f"block `{step.block}` in `{path}`" for step in steps_of(after) if step.path == path)
