"""FcaNet: frequency channel attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from se_inject.blocks.layers import Bottleneck
from se_inject.errors import OptionError

# (u along the height, v along the width) of a transform of 7 × 7 points: the best sixteen of the 49, by the paper's
# experiments with one frequency at a time
FREQUENCIES = (
    *((0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0)),
    *((5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2)),
)


class FrequencyChannelAttention(Bottleneck):
    """Frequency channel attention: SE whose squeeze takes other frequencies than zero, each for a group of channels.

    z_c = Σ_h Σ_w x_chw B_u(h) B_v(w), B_u(h) = a_u cos(π u (h + ½) / H), a_0 = 1/√H, else √(2/H): a coefficient of
    the discrete cosine transform; (u, v) is one of n frequencies, the c-th channel having the ⌊c·n/C⌋-th.
    y = x · σ(W2 δ(W1 z)). With n = 1 it is SE with z = √(HW) · mean.

    Where: as SE, after the last normalisation of every residual branch.
    Parameters: 2C²/r, with bias C/r + C more. The cosines are computed from the map's size, not stored.
    By: Zequn Qin, Pengyi Zhang, Fei Wu, Xi Li: "FcaNet: Frequency Channel Attention Networks", ICCV 2021,
    arXiv 2012.11879.
    Not when: channels are pruned or permuted afterwards (a channel's place decides its frequency), or features must
    not depend on where things are: most of the frequencies are not shift-invariant. Two dimensions only.
    Start: the identity is exact, W2 zero and the gate 2·σ; else the factor is about 0.5.

    The published code has a table of cosines for one size and pools other sizes to it. Here u on a map of H rows is
    ⌊u·H / 7⌋ of H: the same for 7, 14, 28 and 56, and defined for every other size.

    Args:
        channels: C.
        reduction: r; the bottleneck is max(4, C // r) wide.
        divisor: round C / r to a multiple of this instead.
        frequencies: n, 1 to 16, taken in the order of the paper's ranking.
        bias: whether W1 and W2 have biases; the authors' have none.

    Shape:
        (N, C, H, W) to (N, C, H, W).

    Raises:
        OptionError: a reduction that is not positive, a number of frequencies out of range.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: float = 16,
        divisor: int | None = None,
        frequencies: int = 16,
        bias: bool = False,
    ) -> None:
        super().__init__(channels, reduction=reduction, divisor=divisor, bias=bias)
        if not 1 <= frequencies <= len(FREQUENCIES):
            raise OptionError(f"1 to {len(FREQUENCIES)} frequencies", seen=f"frequencies = {frequencies}")
        self.vertical = [u for u, _ in FREQUENCIES[:frequencies]]
        self.horizontal = [v for _, v in FREQUENCIES[:frequencies]]
        self.gain = 1

    @staticmethod
    def count(channels: int, *, bias: bool = False, **options: Any) -> int:
        """2Cm (+ m + C), m = C/r."""
        return Bottleneck.count(channels, bias=bias, **options)

    def identity_init(self) -> None:
        """Start as x ↦ x: W2 is zero and the gate is 2·σ(0) = 1."""
        self.gain = 2
        self.rest_()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """σ(W2 δ(W1 z)), (N, C, 1, 1)."""
        rows = _cosines(self.vertical, x.size(2), x)
        columns = _cosines(self.horizontal, x.size(3), x)
        squeezed = ((x * columns.unsqueeze(1)).sum(3) * rows).sum(2).unsqueeze(2).unsqueeze(3)
        return self.gain * torch.sigmoid(self.excite(squeezed))


def _cosines(frequencies: list[int], length: int, x: Tensor) -> Tensor:
    """B_u at every position, (C, length), for the frequency u of every channel."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    group = torch.arange(x.size(1), device=x.device) * len(frequencies) // x.size(1)
    u = torch.tensor([f * length // 7 for f in frequencies], device=x.device).to(exact)[group].unsqueeze(1)
    place = (torch.arange(length, device=x.device).to(exact) + 0.5) / length
    height = ((1 + (u > 0).to(exact)) / length).sqrt()
    return (height * torch.cos(math.pi * u * place)).to(x.dtype)
