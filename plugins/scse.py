"""scSE: concurrent spatial and channel squeeze and excitation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from se_inject.blocks.layers import Bottleneck, chosen, convolution, zero_


class ConcurrentSqueezeExcitation(Bottleneck):
    """Spatial and channel squeeze and excitation side by side, made for segmentation.

    y = x · (g_c + g_s), or by option max(x · g_c, x · g_s), with the channel gate g_c = σ(W2 δ(W1 mean(x))) of SE
    and the spatial gate g_s = σ(w · x), a 1×1 convolution to one channel.

    Where: after every encoder and decoder stage of a U-Net; in a classifier as SE.
    Parameters: 2C²/r, with bias C/r + C more, and C + 1.
    By: Abhijit Guha Roy, Nassir Navab, Christian Wachinger: "Concurrent Spatial and Channel Squeeze & Excitation
    in Fully Convolutional Networks", MICCAI 2018, arXiv 1803.02579.
    Not when: the task has no use for places (global classification: no published gain there), or r as small as the
    authors' 2 is too dear: C² parameters at each site.
    Start: the identity is exact with all last weights at zero: 0.5 + 0.5 = 1 for the sum, 2·σ(0) for the maximum.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        reduction: r; the bottleneck is max(4, C // r) wide. The authors use 2.
        divisor: round C / r to a multiple of this instead.
        bias: whether W1 and W2 have biases.
        combine: ``sum`` or ``max`` of the two gated maps.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank, reduction or way to combine.
    """

    def __init__(
        self,
        channels: int,
        *,
        rank: int = 2,
        reduction: float = 16,
        divisor: int | None = None,
        bias: bool = True,
        combine: str = "sum",
    ) -> None:
        super().__init__(channels, rank=rank, reduction=reduction, divisor=divisor, bias=bias)
        self.spatial = convolution(rank)(channels, 1, 1)
        self.combine = chosen("way to combine", combine, ("sum", "max"))
        self.gain = 1

    @staticmethod
    def count(channels: int, **options: Any) -> int:
        """2Cm (+ m + C) + C + 1, m = C/r."""
        return Bottleneck.count(channels, **options) + channels + 1

    def identity_init(self) -> None:
        """Start as x ↦ x: W2 and the spatial weights are zero; the sum of gates is 1, for the maximum each is 2·σ(0)."""
        self.gain = 1 if self.combine == "sum" else 2
        self.rest_()
        zero_(self.spatial)

    def forward(self, x: Tensor) -> Tensor:
        channel = self.channel_gate(x)
        spatial = self.gain * torch.sigmoid(self.spatial(x))
        if self.combine == "max":
            return torch.maximum(x * channel, x * spatial)
        return x * (channel + spatial)

    def channel_gate(self, x: Tensor) -> Tensor:
        """Compute the gate of each channel alone, before that of each position is added."""
        return self.gain * torch.sigmoid(self.excite(x.mean(self.space, keepdim=True)))
