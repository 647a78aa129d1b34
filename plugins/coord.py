"""CoordAttention: coordinate attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from se_inject.blocks.layers import squeeze_width, zero_


def _width(channels: int, reduction: float, divisor: int | None, least: int) -> int:
    return max(least, squeeze_width(channels, reduction, divisor))


class CoordinateAttention(nn.Module):
    """Coordinate attention: one gate for each row and one for each column, from pooling along the other axis.

    z_h = mean of x over the width, z_w = over the height; f = δ(BN(W1 [z_h; z_w])), δ = h-swish, W1 of m × C;
    y = x · σ(W_h f_h) · σ(W_w f_w): a row's gate is the same in all its columns, and the other way round.

    Where: in mobile networks, where SE would be: in the inverted residual before the last 1×1 convolution.
    Parameters: 3Cm + 3m + 2C with biases, 3Cm + 2m without; m = max(8, C/32).
    By: Qibin Hou, Daquan Zhou, Jiashi Feng: "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021,
    arXiv 2103.02907.
    Not when: maps have no fixed orientation (remote sensing, microscopy), or are so small (7×7 and below) that
    rows and columns tell little. Two dimensions only.
    Start: the identity is exact, W_h and W_w zero and both gates 2·σ; else the factor is about 0.25.

    Args:
        channels: C.
        reduction: the bottleneck is C // reduction wide.
        divisor: round C / reduction to a multiple of this instead.
        least: the bottleneck is at least this wide.
        bias: whether the convolutions have biases; timm's have none.

    Shape:
        (N, C, H, W) to (N, C, H, W).

    Raises:
        OptionError: a reduction that is not positive.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: float = 32,
        divisor: int | None = None,
        least: int = 8,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.width = _width(channels, reduction, divisor, least)
        self.conv = nn.Conv2d(channels, self.width, 1, bias=bias)
        self.norm = nn.BatchNorm2d(self.width)
        self.act = nn.Hardswish()
        self.rows = nn.Conv2d(self.width, channels, 1, bias=bias)
        self.columns = nn.Conv2d(self.width, channels, 1, bias=bias)
        self.gain = 1

    @staticmethod
    def count(
        channels: int, *, reduction: float = 32, divisor: int | None = None, least: int = 8, bias: bool = True
    ) -> int:
        """3Cm + 2m (+ m + 2C)."""
        width = _width(channels, reduction, divisor, least)
        return 3 * channels * width + 2 * width + bias * (width + 2 * channels)

    def identity_init(self) -> None:
        """Start as x ↦ x: W_h and W_w are zero and both gates are 2·σ(0) = 1."""
        self.gain = 2
        zero_(self.rows)
        zero_(self.columns)

    def forward(self, x: Tensor) -> Tensor:
        strips = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        rows, columns = self.act(self.norm(self.conv(strips))).split([x.size(2), x.size(3)], 2)
        by_row = self.gain * torch.sigmoid(self.rows(rows))
        by_column = self.gain * torch.sigmoid(self.columns(columns.transpose(2, 3)))
        return x * by_column * by_row
