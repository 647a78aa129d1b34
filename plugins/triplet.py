"""Triplet attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from se_inject.blocks.layers import zero_

from .kernel_sizes import odd_kernel


class _PlaneGate(nn.Module):
    """The gate over two of the axes C, H, W, from maximum and mean over the third one."""

    def __init__(self, axis: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, odd_kernel(kernel), padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.amax(self.axis), x.mean(self.axis)], 1)
        return torch.sigmoid(self.norm(self.conv(pooled))).squeeze(1).unsqueeze(self.axis)


class TripletAttention(nn.Module):
    """Triplet attention: three gates, over height × width, channels × width and channels × height.

    y = x · (g_C + g_H + g_W) / 3, where g_A = σ(BN(conv_k([max; mean]))) with maximum and mean over the axis A:
    a map over the other two axes, in their order C, H, W, convolved as if it were an image.

    Where: as CBAM, after the last normalisation of every residual branch.
    Parameters: 3 (2k² + 2): 300 for k = 7, whatever the number of channels.
    By: Diganta Misra, Trikay Nalamada, Ajay Uppili Arasanipalai, Qibin Hou: "Rotate to Attend: Convolutional
    Triplet Attention Module", WACV 2021, arXiv 2010.03045.
    Not when: channels are pruned or permuted afterwards (a convolution runs along them), or memory traffic counts:
    it reads the whole map six times. Two dimensions only.
    Start: the identity is exact: affine parts of the norms zero, and gates of 2·σ; else the factor is about 0.5.

    Args:
        channels: C; not used, no weight depends on it.
        kernel: k, an odd number.

    Shape:
        (N, C, H, W) to (N, C, H, W).

    Raises:
        OptionError: an even kernel.
    """

    def __init__(self, channels: int, *, kernel: int = 7) -> None:
        super().__init__()
        self.over_channels = _PlaneGate(1, kernel)
        self.over_height = _PlaneGate(2, kernel)
        self.over_width = _PlaneGate(3, kernel)
        self.gain = 1

    @staticmethod
    def count(channels: int, *, kernel: int = 7) -> int:
        """3 (2k² + 2)."""
        return 3 * (2 * kernel * kernel + 2)

    def identity_init(self) -> None:
        """Start as x ↦ x: scale and shift of the three norms are zero, every gate is 2·σ(0), and (1 + 1 + 1) / 3 = 1."""
        self.gain = 2
        for gate in (self.over_channels, self.over_height, self.over_width):
            zero_(gate.norm)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Compute the mean of the three gates, as large as x."""
        # the gates are averaged, not the gated maps: (x + x + x) / 3 is not always x in floating point
        gates = self.over_channels(x) + self.over_height(x) + self.over_width(x)
        return self.gain * gates / 3
