"""GC: the global context block of GCNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks.layers import chosen, convolution, squeeze_width, zero_


class GlobalContext(nn.Module):
    """Global context: a softmax-weighted mean over space, transformed and added to every position.

    y = x + W2 δ(LN(W1 Σ_j a_j x_j)), a = softmax over positions j of W_k x_j; W1 of C/r × C, δ = ReLU.
    The only block here that adds instead of multiplying; by option it multiplies: y = x · σ(W2 δ(…)).

    Where: after the last normalisation of residual branches, in GCNet of stages 3 to 5 (``layer2`` to ``layer4``).
    Parameters: (C + 1) + 2Cm + m + 2m + C with m = C/r.
    By: Yue Cao, Jiarui Xu, Stephen Lin, Fangyun Wei, Han Hu: "GCNet: Non-local Networks Meet Squeeze-Excitation
    Networks and Beyond", ICCV workshops 2019, arXiv 1904.11492.
    Not when: features must keep their sign or sparsity, since a constant is added to each channel; where the
    softmax over very large maps in half precision is a concern.
    Start: the identity is exact, and is how its authors start it: W2 is zero. Made to be put into trained networks.
    With ``fuse=scale`` W2 zero gives a factor of 0.5, and the identity has the gate 2·σ.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        reduction: r; the bottleneck is max(4, C // r) wide. The paper uses 16 (and 4); timm 8.
        divisor: round C / r to a multiple of this instead.
        fuse: ``add`` or ``scale``; the paper's choice is to add.
        epsilon: ε of the layer normalisation; timm has 1e-6.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank, reduction or way to fuse.
    """

    def __init__(
        self,
        channels: int,
        *,
        rank: int = 2,
        reduction: float = 16,
        divisor: int | None = None,
        fuse: str = "add",
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.width = squeeze_width(channels, reduction, divisor)
        layer = convolution(rank)
        self.attention = layer(channels, 1, 1)
        self.fc1 = layer(channels, self.width, 1)
        self.norm = nn.LayerNorm(self.width, epsilon)
        self.relu = nn.ReLU()
        self.fc2 = layer(self.width, channels, 1)
        self.fuse = chosen("way to fuse", fuse, ("add", "scale"))
        self.ones = [1] * rank
        self.gain = 1
        nn.init.kaiming_normal_(self.attention.weight, mode="fan_in")
        zero_(self.fc2)

    @staticmethod
    def count(channels: int, *, reduction: float = 16, divisor: int | None = None, **_: Any) -> int:
        """(C + 1) + 2Cm + m + 2m + C, m = C/r."""
        width = squeeze_width(channels, reduction, divisor)
        return (channels + 1) + 2 * channels * width + width + 2 * width + channels

    def identity_init(self) -> None:
        """Start as x ↦ x: W2 is zero and so is what is added, as it is built; of ``scale`` the gate is 2·σ(0) = 1."""
        self.gain = 2
        zero_(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.attention(x).flatten(2), 2)
        context = torch.matmul(x.flatten(2), weights.squeeze(1).unsqueeze(2))
        hidden = self.fc1(context.reshape([x.size(0), x.size(1)] + self.ones))  # noqa: RUF005 -- TorchScript
        hidden = self.norm(hidden.flatten(1)).reshape(hidden.shape)
        added = self.fc2(self.relu(hidden))
        # x + added; OpenCV takes a convolution with a sum behind it for a residual one, and refuses these shapes
        return x - (-added) if self.fuse == "add" else x * (self.gain * torch.sigmoid(added))
