"""Find out what an untrained block does to its input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from se_inject.blocks import build_block
from se_inject.errors import PluginError
from se_inject.random_numbers import seeded
from se_inject.surgery import Step

_ENOUGH = 2**24
"""Numbers in an example of a value."""


def start_factor(name: str, channels: int, size: Sequence[int], options: dict[str, Any], init: str) -> float:
    """Compute the factor by which a new block scales its input: the a for which a·x is nearest to its output y.

    a = Σ x·y / Σ x², for one random normal example x, in eval mode; of a very large value a part is enough. An identity has 1, a gate around σ(0) has 0.5.
    No random state of the caller is used or changed.

    Args:
        name: of the block.
        channels: C of the values it gates.
        size: their spatial size.
        options: of the block.
        init: ``identity`` or ``paper``.

    Raises:
        PluginError: the block fails.
    """
    with seeded(0), torch.device("cpu"), torch.no_grad():
        block = build_block(name, channels, size, options, init).eval()
        x = torch.randn(1, channels, *_cropped(channels, size))
        try:
            y = block(x)
        except Exception as error:
            raise PluginError(
                f"block `{name}` fails on a value of {tuple(x.shape)}", seen=f"{type(error).__name__}: {error}"
            ) from error
        return float((x * y).sum() / x.square().sum())


def _cropped(channels: int, size: Sequence[int]) -> list[int]:
    """Return a spatial size at which a value has at most ``_ENOUGH`` numbers: this one, or half of its longest side, …"""
    sides = list(size)
    while channels * math.prod(sides) > _ENOUGH and max(sides) > 1:
        longest = sides.index(max(sides))
        sides[longest] //= 2
    return sides


def start_factors(steps: Iterable[Step]) -> dict[str, tuple[float, float]]:
    """Find the smallest and the largest factor of every block that doesn't start as x ↦ x."""
    found: dict[str, dict[str, float]] = {}
    for step in steps:
        if step.init == "identity":
            continue
        known = found.setdefault(step.block, {})
        key = repr((step.channels, step.size, sorted(step.options.items())))
        if key not in known:
            known[key] = start_factor(step.block, step.channels, step.size, step.options, step.init)
    return {block: (min(factors.values()), max(factors.values())) for block, factors in found.items()}
