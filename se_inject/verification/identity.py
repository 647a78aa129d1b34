"""Find out whether blocks are identities, and put identities in their place for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from se_inject.blocks import NoGate, is_fused
from se_inject.surgery import Step, steps_of
from se_inject.verification.watching import named


def starts_as_identity(after: nn.Module, blocks: dict[str, nn.Module], fresh: bool) -> bool:
    """Return whether the blocks are meant to be identities: they start so, and nobody has trained them."""
    steps = {step.path: step for step in steps_of(after)}
    if any(steps[path].init != "identity" for path in blocks):
        return False
    try:
        return fresh or all(is_identity(block, steps[path]) for path, block in blocks.items())
    except Exception:
        return True  # a block that fails wasn't trained: let the checks report it


def no_identity(after: nn.Module, blocks: dict[str, nn.Module]) -> str | None:
    """Name the first block that isn't an identity; None if all are, or fail."""
    with contextlib.suppress(Exception):
        return next(
            (
                named(after, step.path)
                for step in steps_of(after)
                if step.path in blocks and not is_identity(blocks[step.path], step)
            ),
            None,
        )
    return None


def is_identity(block: nn.Module, step: Step) -> bool:
    """Return whether a block gives back what it gets, bit for bit, in eval mode."""
    near = next(iter(block.parameters()), torch.zeros(()))
    x = torch.randn(2, step.channels, *[8] * step.rank, generator=torch.Generator().manual_seed(0)).to(near)
    mode = block.training
    try:
        with torch.no_grad():
            block.eval()
            return bool(torch.equal(block(x, None, "none") if is_fused(block) else block(x), x))
    finally:
        block.train(mode)


@contextlib.contextmanager
def without_blocks(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[None]:
    """Replace every block in a model by an identity, which still adds and activates where a fused block did."""
    places = []
    for path in blocks:
        parent, _, name = path.rpartition(".")
        places.append((model.get_submodule(parent), name))
    try:
        for owner, name in places:
            owner._modules[name] = NoGate()
        yield
    finally:
        for (owner, name), block in zip(places, blocks.values(), strict=True):
            owner._modules[name] = block
