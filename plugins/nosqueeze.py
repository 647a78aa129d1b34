"""NoSqueeze: the ablation of section 7.1 of the SE paper."""

from __future__ import annotations

import torch
from torch import Tensor

from se_inject.blocks.layers import Bottleneck


class NoSqueeze(Bottleneck):
    """SE without the squeeze: the same two layers as 1×1 convolutions on the map, a gate for every position.

    y = x · σ(W2 δ(W1 x)), W1 of C/r × C, W2 of C × C/r, δ = ReLU: equation 3 of SE with x in the place of its mean.

    Where: as SE. It is an ablation: it shows what the global context is worth (ResNet-50: 22.93 % top-1 error against
    22.28 % for SE and 23.30 % for neither).
    Parameters: 2C²/r, with bias C/r + C more; as SE.
    By: Jie Hu, Li Shen, Samuel Albanie, Gang Sun, Enhua Wu: "Squeeze-and-Excitation Networks", section 7.1 and
    table 16, TPAMI 2020, arXiv 1709.01507.
    Not when: anything but the comparison is wanted: it is worse than SE with H·W times its multiplications (4.27
    GMACs against 3.87).
    Start: the identity is exact, W2 zero and the gate 2·σ; else the factor is about 0.5.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        reduction: r; the bottleneck is max(4, C // r) wide.
        divisor: round C / r to a multiple of this instead.
        bias: whether W1 and W2 have biases.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank or reduction.
    """

    def __init__(
        self,
        channels: int,
        *,
        rank: int = 2,
        reduction: float = 16,
        divisor: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(channels, rank=rank, reduction=reduction, divisor=divisor, bias=bias)
        self.gain = 1

    def identity_init(self) -> None:
        """Start as x ↦ x: W2 is zero and the gate is 2·σ(0) = 1 everywhere."""
        self.gain = 2
        self.rest_()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """σ(W2 δ(W1 x)), as large as x."""
        return self.gain * torch.sigmoid(self.excite(x))
