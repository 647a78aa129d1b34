"""ECA: efficient channel attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks.layers import convolution
from se_inject.errors import OptionError

from .kernel_sizes import odd_kernel


def kernel_size(channels: int, gamma: float = 2, beta: float = 1) -> int:
    """k = |log2(C)/γ + b/γ|, the odd number next above where that is even.

    Raises:
        OptionError: it is infinite, or nearly so.
    """
    exact = abs((math.log2(channels) + beta) / gamma)
    if not exact < 2**31:
        raise OptionError("γ and b give no kernel size", seen=f"gamma = {gamma}, beta = {beta}")
    size = int(exact)
    return size if size % 2 else size + 1


class EfficientChannelAttention(nn.Module):
    """Efficient channel attention: one small convolution along the channels instead of the two FCs of SE.

    y = x · σ(conv_k(z)), z_c = mean over space of x_c; the convolution has k weights and no bias, runs over
    the channels with zero padding, and k = |log2(C)/γ + b/γ|_odd grows with C: 3 for 64 channels, 5 for 256,
    7 for 2048.

    Where: as SE, after the last normalisation of every residual branch.
    Parameters: k at each site.
    By: Qilong Wang, Banggu Wu, Pengfei Zhu, Peihua Li, Wangmeng Zuo, Qinghua Hu: "ECA-Net: Efficient Channel
    Attention for Deep Convolutional Neural Networks", CVPR 2020, arXiv 1910.03151.
    Not when: channels are pruned or permuted afterwards, since a channel's neighbours are part of what is learned;
    or when parameters do not matter: its gate sees k channels, that of SE all.
    Start: the identity is exact, with the convolution at zero and the gate 2·σ; else the factor is about 0.5.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        kernel: k, an odd number; None: by the formula.
        gamma: γ of the formula.
        beta: b of the formula.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank, a kernel that is even or reaches beyond all channels, a γ that is not positive.
    """

    def __init__(
        self, channels: int, *, rank: int = 2, kernel: int | None = None, gamma: float = 2, beta: float = 1
    ) -> None:
        super().__init__()
        convolution(rank)
        if not gamma > 0:
            raise OptionError("γ must be positive", seen=f"gamma = {gamma}")
        size = odd_kernel(kernel_size(channels, gamma, beta) if kernel is None else kernel, 2 * channels + 1)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.space = list(range(2, 2 + rank))
        self.ones = [1] * rank
        self.gain = 1

    @staticmethod
    def count(channels: int, *, kernel: int | None = None, gamma: float = 2, beta: float = 1, **_: Any) -> int:
        """k."""
        return kernel or kernel_size(channels, gamma, beta)

    def identity_init(self) -> None:
        """Start as x ↦ x: the convolution is zero and the gate is 2·σ(0) = 1."""
        self.gain = 2
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """σ(conv_k(z)), (N, C, 1, …)."""
        squeezed = x.mean(self.space).unsqueeze(1)
        s = self.gain * torch.sigmoid(self.conv(squeezed))
        return s.reshape([x.size(0), x.size(1)] + self.ones)  # noqa: RUF005 -- TorchScript has no unpacking
