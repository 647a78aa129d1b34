"""CBAM: convolutional block attention module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from se_inject.blocks.layers import Bottleneck, batch_norm, convolution, largest, zero_

from .kernel_sizes import odd_kernel


class ConvolutionalBlockAttention(Bottleneck):
    """A channel gate from average and maximum, then a spatial gate from one 7×7 convolution.

    x' = x · σ(W2 δ(W1 avg(x)) + W2 δ(W1 max(x))), avg and max over space, δ = ReLU, W1 of C/r × C; then
    y = x' · σ(BN(conv_k([mean; max]))), mean and max of x' over the channels.

    Where: after the last normalisation of every residual branch.
    Parameters: 2C²/r, with bias C/r + C more, and 2·k^rank + 2.
    By: Sanghyun Woo, Jongchan Park, Joon-Young Lee, In So Kweon: "CBAM: Convolutional Block Attention Module",
    ECCV 2018, arXiv 1807.06521.
    Not when: latency counts (max, and two passes over the map: ECA's table 3 has 1213 images a second against
    1620 for SE on ResNet-50), or where maps are smaller than the kernel.
    Start: the identity is exact, W2 and the affine part of BN at zero and both gates 2·σ; else the factor is
    about 0.25, the product of two gates.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        reduction: r; the bottleneck is max(4, C // r) wide.
        divisor: round C / r to a multiple of this instead.
        kernel: k of the spatial gate, an odd number.
        bias: whether W1 and W2 have biases; the authors' code has them, timm's has not.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank or reduction, an even kernel.
    """

    def __init__(
        self,
        channels: int,
        *,
        rank: int = 2,
        reduction: float = 16,
        divisor: int | None = None,
        kernel: int = 7,
        bias: bool = True,
    ) -> None:
        super().__init__(channels, rank=rank, reduction=reduction, divisor=divisor, bias=bias)
        self.conv = convolution(rank)(2, 1, odd_kernel(kernel), padding=kernel // 2, bias=False)
        self.norm = batch_norm(rank)(1)
        self.gain = 1

    @staticmethod
    def count(channels: int, *, rank: int = 2, kernel: int = 7, **options: Any) -> int:
        """2Cm (+ m + C) + 2·k^rank + 2, m = C/r."""
        return Bottleneck.count(channels, **options) + 2 * kernel**rank + 2

    def identity_init(self) -> None:
        """Start as x ↦ x: W2, and scale and shift of the spatial gate's norm, are zero; both gates are 2·σ(0) = 1."""
        self.gain = 2
        self.rest_()
        zero_(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.channel_gate(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * (self.gain * torch.sigmoid(self.norm(self.conv(pooled))))

    def channel_gate(self, x: Tensor) -> Tensor:
        """Compute the gate of each channel alone, before that of each position."""
        mean = self.excite(x.mean(self.space, keepdim=True))
        peak = self.excite(largest(x, self.space))
        return self.gain * torch.sigmoid(mean + peak)
