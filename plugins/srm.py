"""SRM: style-based recalibration module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks.layers import convolution, mean_and_deviation, zero_


class StyleRecalibration(nn.Module):
    """Style-based recalibration: every channel's gate comes from its own mean and standard deviation.

    y_c = x_c · σ(BN(w_c1 μ_c + w_c2 s_c)), μ_c and s_c = √(var + ε) over space; no channel sees another one.

    Where: as SE, after the last normalisation of every residual branch.
    Parameters: 4C: 2C weights and 2C of the batch normalisation.
    By: HyunJae Lee, Hyo-Eun Kim, Hyeonseob Nam: "SRM: A Style-based Recalibration Module for Convolutional Neural
    Networks", ICCV 2019, arXiv 1903.10829.
    Not when: training with one example per device: the batch normalisation has N values for each channel
    and raises at N = 1; small batches make the gate noisy.
    Start: the identity is exact, the affine part of BN at zero and the gate 2·σ; else the factor is 0.5, exactly
    so with the authors' w = 0.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        epsilon: ε. The variance is the paper's, divided by the number of positions.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank.
    """

    def __init__(self, channels: int, *, rank: int = 2, epsilon: float = 1e-5) -> None:
        super().__init__()
        convolution(rank)
        self.weight = nn.Parameter(torch.zeros(channels, 2))
        self.norm = nn.BatchNorm1d(channels)
        self.space = list(range(2, 2 + rank))
        self.ones = [1] * rank
        self.epsilon = epsilon
        self.gain = 1

    @staticmethod
    def count(channels: int, **_: Any) -> int:
        """4C."""
        return 4 * channels

    def identity_init(self) -> None:
        """Start as x ↦ x: the norm's scale and shift are zero, the gate is 2·σ(0) = 1.

        The weights, zero in the authors' code, become random: with both zero, only the shift would learn.
        """
        self.gain = 2
        nn.init.normal_(self.weight)
        zero_(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """σ(BN(w · style)), (N, C, 1, …)."""
        mean, deviation = mean_and_deviation(x, self.space, self.epsilon)
        # not stacked and summed: OpenVINO is wrong where a norm is behind a sum
        style = mean.flatten(1) * self.weight[:, 0] + deviation.flatten(1) * self.weight[:, 1]
        s = self.gain * torch.sigmoid(self.norm(style))
        return s.reshape([x.size(0), x.size(1)] + self.ones)  # noqa: RUF005 -- TorchScript has no unpacking
