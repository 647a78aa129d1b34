"""GCT: gated channel transformation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks.layers import convolution, widened


class GatedChannelTransformation(nn.Module):
    """Gated channel transformation: channels compete by their norms, with three weights for each channel.

    s_c = α_c · √(Σ x_c² + ε), the sum over space; ŝ_c = s_c / √(mean over channels of s² + ε);
    y_c = x_c · (1 + tanh(γ_c ŝ_c + β_c)).

    Where: before convolutions in the paper; after the last normalisation of a residual branch as well.
    Parameters: 3C.
    By: Zongxin Yang, Linchao Zhu, Yu Wu, Yi Yang: "Gated Channel Transformation for Visual Recognition", CVPR 2020,
    arXiv 1909.11519. (Not the Gaussian context transformer, which has the same acronym.)
    Not when: weight decay acts on β (exclude it), or the input size changes at run time: the norm is a
    sum over space, and only the normalisation over channels takes the size out again.
    Start: the identity is exact, and is how its authors start it: α = 1, γ = β = 0.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        epsilon: ε.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank.
    """

    def __init__(self, channels: int, *, rank: int = 2, epsilon: float = 1e-5) -> None:
        super().__init__()
        convolution(rank)
        shape = (1, channels, *[1] * rank)
        self.alpha = nn.Parameter(torch.ones(shape))
        self.gamma = nn.Parameter(torch.zeros(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.space = list(range(2, 2 + rank))
        self.epsilon = epsilon

    @staticmethod
    def count(channels: int, **_: Any) -> int:
        """3C."""
        return 3 * channels

    def identity_init(self) -> None:
        """Start as x ↦ x, as it is built: γ = β = 0, and the gate is 1 + tanh(0) = 1."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """1 + tanh(γ ŝ + β), (N, C, 1, …)."""
        energy = widened(x).square().sum(self.space, keepdim=True)
        embedding = self.alpha * (energy + self.epsilon).sqrt()
        normed = embedding / (embedding.square().mean(1, keepdim=True) + self.epsilon).sqrt()
        return (1 + torch.tanh(self.gamma * normed + self.beta)).to(x.dtype)
