"""GE: gather-excite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from se_inject.blocks.layers import chosen, squeeze_width, zero_
from se_inject.errors import OptionError


class GatherExcite(nn.Module):
    """Gather-excite: SE's pooling with an extent, in three strengths θ⁻, θ and θ⁺.

    y = x · σ(up(h(g(x)))): g gathers over an extent of e × e, up is nearest-neighbour enlargement.
    θ⁻: g is average pooling (kernel 2e − 1, stride e), h nothing. θ: g is log2(e) depthwise 3×3 convolutions of
    stride 2, each with BN, ReLU between them; for the global extent one depthwise convolution as large as the map,
    and BN. θ⁺: as θ, and h is the bottleneck of SE, W2 δ(W1 ·).

    Where: as SE, after the last normalisation of every residual branch; the paper's best is θ⁺ with global extent.
    Parameters: θ⁻ none; θ 11C·log2(e), or C·H·W + 2C with global extent; θ⁺ as θ and 2Cm + m + C with m = C/r.
    By: Jie Hu, Li Shen, Samuel Albanie, Gang Sun, Andrea Vedaldi: "Gather-Excite: Exploiting Feature Context in
    Convolutional Neural Networks", NeurIPS 2018, arXiv 1810.12348.
    Not when: θ or θ⁺ with global extent and inputs of varying size: the weights have the size of the map in the
    observed call, and other sizes are pooled to it; nor when training with one example per device, since the norm then
    has N values. Two dimensions only.
    Start: θ and θ⁺ exactly the identity: last scale and shift, or W2, at zero and the gate 2·σ. θ⁻ has no identity:
    nothing in it can be set; its factor is σ(local mean), 0.5 where that is zero and more behind a ReLU.

    Args:
        channels: C.
        kind: ``minus``, ``theta`` or ``plus``: θ⁻, θ, θ⁺.
        extent: e, a power of 2; 0: global.
        reduction: r of θ⁺.
        size: (H, W) of the map; only for θ and θ⁺ with global extent.

    Shape:
        (N, C, H, W) to (N, C, H, W).

    Raises:
        OptionError: no such kind or extent, or a global θ without a size.
    """

    def __init__(
        self,
        channels: int,
        *,
        kind: str = "theta",
        extent: int = 0,
        reduction: float = 16,
        size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.kind = chosen("kind", kind, ("minus", "theta", "plus"))
        if extent < 0 or extent == 1 or extent & (extent - 1) or extent > 2**24:
            raise OptionError("the extent is a power of 2, or 0 for global", seen=f"extent = {extent}")
        self.extent = extent
        self.size = [1, 1] if size is None else list(size)
        self.gather = nn.Sequential()
        self.excite = nn.Sequential()
        if kind != "minus" and extent == 0:
            if size is None or len(size) != 2:
                raise OptionError("a global θ is as large as the map: it needs `size`", seen=f"size = {size}")
            self.gather.append(nn.Conv2d(channels, channels, tuple(self.size), groups=channels, bias=False))
            self.gather.append(nn.BatchNorm2d(channels))
        elif kind != "minus":
            for step in range(extent.bit_length() - 1):
                if step:
                    self.gather.append(nn.ReLU())
                self.gather.append(nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False))
                self.gather.append(nn.BatchNorm2d(channels))
        if kind == "plus":
            width = squeeze_width(channels, reduction)
            self.excite.extend([nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1)])
        self.gain = 1
        if kind == "minus":
            self.identity_init = None  # type: ignore[method-assign,assignment]  # has_identity_start then says no

    @staticmethod
    def count(
        channels: int,
        *,
        kind: str = "theta",
        extent: int = 0,
        reduction: float = 16,
        size: Sequence[int] | None = None,
    ) -> int:
        """θ⁻ 0; θ C·H·W + 2C or 11C·log2(e); θ⁺ also 2Cm + m + C."""
        if kind == "minus":
            return 0
        height, width = size or (0, 0)
        gather = 11 * channels * (extent.bit_length() - 1) if extent else channels * (height * width + 2)
        m = squeeze_width(channels, reduction)
        return gather + (2 * channels * m + m + channels if kind == "plus" else 0)

    def identity_init(self) -> None:
        """Start as x ↦ x: W2 of θ⁺, scale and shift of the last norm of θ, are zero and the gate is 2·σ(0) = 1."""
        self.gain = 2
        zero_(self.excite[-1] if self.kind == "plus" else self.gather[-1])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """σ(up(h(g(x)))): (N, C, 1, 1) for the global extent, else as large as x."""
        size = [x.size(2), x.size(3)]
        if self.kind == "minus":
            if self.extent:
                reach = 2 * self.extent - 1
                gathered = F.avg_pool2d(x, reach, self.extent, reach // 2, count_include_pad=False)
            else:
                gathered = x.mean([2, 3], keepdim=True)
        else:
            pooled = self.extent == 0 and size != self.size  # a network accepts inputs of other sizes still
            gathered = self.gather(F.adaptive_avg_pool2d(x, self.size) if pooled else x)
        s = self.gain * torch.sigmoid(self.excite(gathered))
        if self.extent:
            s = F.interpolate(s, size)
        return s
