"""Record the gates of blocks while a network runs, without computing them twice."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

METHODS = ("channel_gate", "gate")
"""The methods that offer a gate: of the first a block may have both, then the rest of what it does isn't a channel gate."""


@dataclass(frozen=True)
class Record:
    """One gate of one call of a block, one row for each example.

    Args:
        path: where the block is in the network.
        call: 0 for the block's first call in a forward, 1 for the second, …
        values: the gate of each channel, (N, C); the mean over the positions if the gate has several.
        positions: how many positions the gate has.
    """

    path: str
    call: int
    values: Tensor
    positions: int


Records = dict[tuple[str, int], Record]
"""The records of one forward, by path and call, in the order of the calls."""


def gate_method(block: nn.Module) -> str | None:
    """Return the name of the method that computes a block's gate from its input; None if it offers none."""
    return next((name for name in METHODS if callable(getattr(type(block), name, None))), None)


def gate_range(block: nn.Module) -> tuple[float, float] | None:
    """Return the ends of the interval in which a block's gate lies; None if the block does not say.

    A block says it with an attribute ``gate_range``; one with a numeric ``gain`` has a gate of (0, gain).
    """
    if (stated := getattr(block, "gate_range", None)) is not None:
        low, high = stated
        return float(low), float(high)
    if (sigma := getattr(block, "sigma", None)) in _RANGES:
        one_at_zero = bool(getattr(block, "one_at_zero", False))
        return _RANGES[sigma][one_at_zero]
    gain = getattr(block, "gain", None)
    return (0.0, float(gain)) if isinstance(gain, int | float) else None


_RANGES = {
    "sigmoid": ((0.0, 1.0), (0.0, 2.0)),
    "hard_sigmoid": ((0.0, 1.0), (0.0, 2.0)),
    "tanh": ((-1.0, 1.0), (0.0, 2.0)),
    "relu": ((0.0, math.inf), (0.0, math.inf)),
}
"""The range of SE's gates, by the name of σ: with the paper's start, with the identity start."""


@contextlib.contextmanager
def recorded_gates(blocks: dict[str, nn.Module], found: Records) -> Iterator[None]:
    """Add a record for every call of these blocks, until the ``with`` block is left.

    A block whose forward does not pass through its own gate method (a fused one) has its gate computed from its input.

    Args:
        blocks: by path; each offers a gate.
        found: where the records go. The caller empties it between batches.
    """
    watchers = [_Watcher(path, block, found) for path, block in blocks.items()]
    try:
        for watcher in watchers:
            watcher.attach()
        yield
    finally:
        for watcher in watchers:
            watcher.detach()


class _Watcher:
    """Stands before one block's gate method and notes what it returns."""

    def __init__(self, path: str, block: nn.Module, found: Records) -> None:
        self.path, self.block, self.found = path, block, found
        self.name = gate_method(block) or ""
        self.method: Callable[[Tensor], Tensor] = getattr(block, self.name)
        self.seen = False
        self.handles: list[Any] = []

    def attach(self) -> None:
        self.block.__dict__[self.name] = self._gate
        self.handles = [
            self.block.register_forward_pre_hook(self._before),
            self.block.register_forward_hook(self._after),
        ]

    def detach(self) -> None:
        self.block.__dict__.pop(self.name, None)
        for handle in self.handles:
            handle.remove()

    def _gate(self, value: Tensor) -> Tensor:
        gate = self.method(value)
        if not self.seen:  # a block that calls its gate twice says the same twice
            self.seen = True
            self._note(gate, value)
        return gate

    def _before(self, block: nn.Module, args: Any) -> None:
        self.seen = False

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        if not self.seen and args and isinstance(args[0], Tensor):
            with torch.no_grad():
                self._gate(args[0])

    def _note(self, gate: Tensor, value: Tensor) -> None:
        call = 0
        while (self.path, call) in self.found:
            call += 1
        self.found[self.path, call] = Record(self.path, call, *channel_values(gate.detach(), value))


def channel_values(gate: Tensor, value: Tensor) -> tuple[Tensor, int]:
    """Reduce a gate of any shape that broadcasts to one number for each example and channel; also return its positions."""
    gate = gate.reshape([1] * (value.dim() - gate.dim()) + list(gate.shape))
    positions = math.prod(gate.shape[2:])
    if positions > 1:
        gate = gate.double().mean(list(range(2, gate.dim())))
    return gate.reshape(gate.shape[:2]).expand(value.shape[:2]), positions
