"""SimAM: a parameter-free attention module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks.layers import convolution, widened


class SimAM(nn.Module):
    """Parameter-free attention: neurons that stand out from their channel count more.

    y = x · σ((x − μ)² / (4 (v + λ)) + 0.5), μ the mean of a channel over space and v its variance (divided by
    M − 1, M positions): the inverse of a neuron's minimal energy, in closed form.

    Where: as SE, after the last normalisation of every residual branch.
    Parameters: none.
    By: Lingxiao Yang, Ru-Yuan Zhang, Lida Li, Xiaohua Xie: "SimAM: A Simple, Parameter-Free Attention Module for
    Convolutional Neural Networks", ICML 2021 (PMLR 139).
    Not when: it is put into a trained network that is not trained further: there is nothing to switch it off.
    Also for maps of a few positions, whose variance says little.
    Start: no identity. The factor follows from the data alone, nothing in it can be set, and it never is 1: at
    least σ(0.5) = 0.622 where x is at its channel's mean, about 0.67 on average, towards 1 for what stands out.

    Args:
        channels: C; not used, the formula has no weights.
        rank: number of spatial dimensions: 1, 2 or 3.
        epsilon: λ.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank.
    """

    def __init__(self, channels: int, *, rank: int = 2, epsilon: float = 1e-4) -> None:
        super().__init__()
        convolution(rank)
        self.space = list(range(2, 2 + rank))
        self.epsilon = epsilon

    @staticmethod
    def count(channels: int, **_: Any) -> int:
        """None."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Compute the gate of every position, as large as x."""
        wide = widened(x)
        squares = (wide - wide.mean(self.space, keepdim=True)).square()
        others = 1
        for dimension in self.space:
            others = others * x.size(dimension)
        variance = squares.sum(self.space, keepdim=True) / max(others - 1, 1)
        return torch.sigmoid(squares / (4 * (variance + self.epsilon)) + 0.5).to(x.dtype)
