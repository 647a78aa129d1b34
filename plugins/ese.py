"""eSE: effective squeeze-excitation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from se_inject.blocks.layers import convolution, hard_sigmoid, zero_


class EffectiveSqueezeExcitation(nn.Module):
    """Effective squeeze-excitation: SE with one full layer and a hard sigmoid, without a bottleneck.

    y = x · hσ(W mean(x) + b), W of C × C, hσ(a) = min(max(a + 3, 0), 6) / 6: no channel information is lost
    in a bottleneck, and no exponential is needed.

    Where: after the concatenating convolution of every OSA module of VoVNet; elsewhere as SE.
    Parameters: C² + C.
    By: Youngwan Lee, Jongyoul Park: "CenterMask: Real-Time Anchor-Free Instance Segmentation", CVPR 2020,
    arXiv 1911.06667.
    Not when: C is large: with 2048 channels a site has 4.2 million parameters, 8 times those of SE with r = 16.
    Start: the identity is exact, with W and b zero and the gate 2·hσ(0) = 1; else the factor is about 0.5.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        bias: whether W has a bias.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank.
    """

    def __init__(self, channels: int, *, rank: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.fc = convolution(rank)(channels, channels, 1, bias=bias)
        self.space = list(range(2, 2 + rank))
        self.gain = 1

    @staticmethod
    def count(channels: int, *, bias: bool = True, **_: Any) -> int:
        """C² (+ C)."""
        return channels * channels + bias * channels

    def identity_init(self) -> None:
        """Start as x ↦ x: W and b are zero and the gate is 2·hσ(0) = 1."""
        self.gain = 2
        zero_(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """hσ(W mean(x) + b), (N, C, 1, …)."""
        return self.gain * hard_sigmoid(self.fc(x.mean(self.space, keepdim=True)))
