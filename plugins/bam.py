"""BAM: bottleneck attention module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks.layers import batch_norm, chosen, convolution, squeeze_width, zero_
from se_inject.errors import OptionError


class BottleneckAttention(nn.Module):
    """Bottleneck attention: a channel branch and a dilated spatial branch in one gate between 1 and 2.

    y = x · (1 + σ(M_c(x) · M_s(x))); the paper's text has the sum of the two branches instead of the product of its
    published code. M_c = W2 δ(BN(W1 mean(x))); M_s is a 1×1 convolution to m = C/r channels, two 3×3 ones of
    dilation d, each with BN and ReLU, and a 1×1 one to one channel.

    Where: at the ends of the first three stages of a ResNet, not in every block: position ``post`` at the last unit
    of each.
    Parameters: (2Cm + 3m + C) + (Cm + 3m) + (2·3^rank·m² + 6m) + (m + 1).
    By: Jongchan Park, Sanghyun Woo, Joon-Young Lee, In So Kweon: "BAM: Bottleneck Attention Module", BMVC 2018,
    arXiv 1807.06514.
    Not when: at every residual unit, where a factor between 1 and 2 would pile up; when training with one example
    per device (the channel branch normalises N values); on maps smaller than the dilated kernels, 2d + 1.
    Start: the factor is 1.5 with both branches zero. The identity is exact with the gate divided by 1.5, so
    between 2/3 and 4/3, and the last spatial layer zero (for the sum also W2).

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        reduction: r; m = max(4, C // r).
        divisor: round C / r to a multiple of this instead.
        dilation: d.
        combine: ``product`` or ``sum`` of the two branches.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank, reduction, dilation or way to combine.
    """

    def __init__(
        self,
        channels: int,
        *,
        rank: int = 2,
        reduction: float = 16,
        divisor: int | None = None,
        dilation: int = 4,
        combine: str = "product",
    ) -> None:
        super().__init__()
        if not 1 <= dilation <= 1024:
            raise OptionError("the dilation is 1 to 1024", seen=f"dilation = {dilation}")
        layer, norm = convolution(rank), batch_norm(rank)
        m = self.width = squeeze_width(channels, reduction, divisor)
        self.channel = nn.Sequential(layer(channels, m, 1), norm(m), nn.ReLU(), layer(m, channels, 1))
        self.spatial = nn.Sequential(
            *(layer(channels, m, 1), norm(m), nn.ReLU()),
            *(layer(m, m, 3, padding=dilation, dilation=dilation), norm(m), nn.ReLU()),
            *(layer(m, m, 3, padding=dilation, dilation=dilation), norm(m), nn.ReLU()),
            layer(m, 1, 1),
        )
        self.combine = chosen("way to combine", combine, ("product", "sum"))
        self.space = list(range(2, 2 + rank))
        self.scale = 1.0

    @staticmethod
    def count(
        channels: int,
        *,
        rank: int = 2,
        reduction: float = 16,
        divisor: int | None = None,
        **_: Any,
    ) -> int:
        """(2Cm + 3m + C) + (Cm + 3m) + (2·3^rank·m² + 6m) + (m + 1), m = C/r."""
        m = squeeze_width(channels, reduction, divisor)
        dilated = 2 * 3**rank * m * m + 6 * m
        return (2 * channels * m + 3 * m + channels) + (channels * m + 3 * m) + dilated + (m + 1)

    def identity_init(self) -> None:
        """Start as x ↦ x: the combined branches are zero, and the gate is (1 + σ(0)) / 1.5 = 1.

        Of a product only one factor is zero; if both were, neither would ever get a gradient.
        """
        self.scale = 1.5
        zero_(self.spatial[-1])
        if self.combine == "sum":
            zero_(self.channel[-1])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """1 + σ of the channel and the spatial branch, over its value at the start; as large as x."""
        channel = self.channel(x.mean(self.space, keepdim=True))
        spatial = self.spatial(x)
        both = channel * spatial if self.combine == "product" else channel + spatial
        return (1 + torch.sigmoid(both)) / self.scale
