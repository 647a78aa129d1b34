"""A block in a package of its own: copy this folder, rename, and change the formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoudnessGate(nn.Module):
    """A made-up gate: a channel is turned up or down by how loud it is.

    y_c = x_c · (1 + tanh(s (a_c · loudness_c + b_c))), loudness_c = mean over space of |x_c|.

    Where: after the last normalisation of a residual branch.
    Parameters: 2C.
    By: nobody; it shows what a plug-in looks like.
    Not when: results matter.
    Start: the identity, exactly: a = b = 0.

    Args:
        channels: C.
        rank: number of spatial dimensions; se-inject fills it in.
        sharpness: s, how steep tanh is, an option: ``--set sharpness=2``.

    Shape:
        (N, C, *) to (N, C, *).
    """

    def __init__(self, channels: int, *, rank: int = 2, sharpness: float = 1.0) -> None:
        super().__init__()
        shape = (1, channels, *[1] * rank)
        self.slope = nn.Parameter(torch.randn(shape))
        self.offset = nn.Parameter(torch.randn(shape))
        self.space = list(range(2, 2 + rank))
        self.sharpness = sharpness

    @staticmethod
    def count(channels: int, *, rank: int = 2, sharpness: float = 1.0) -> int:
        """2C; the conformance kit compares it with what is built."""
        return 2 * channels

    def identity_init(self) -> None:
        """Start as x ↦ x: the gate is 1 + tanh(0)."""
        nn.init.zeros_(self.slope)
        nn.init.zeros_(self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The block is x · gate(x): with this method it can be fused and its gates can be recorded."""
        loudness = x.abs().mean(self.space, keepdim=True)
        return 1 + torch.tanh(self.sharpness * (self.slope * loudness + self.offset))
