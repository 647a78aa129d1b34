"""Layers to build attention blocks from: for 1, 2 or 3 dimensions, SE's bottleneck, statistics that don't overflow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from se_inject.errors import OptionError
from se_inject.user_code import did_you_mean

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hard_swish": nn.Hardswish,
}
"""δ, the activation inside the bottleneck, by name."""


def convolution(rank: int) -> Any:
    """Return the class of convolutions for this many spatial dimensions.

    Raises:
        OptionError: not 1, 2 or 3.
    """
    if rank not in _CONVOLUTIONS:
        raise OptionError("a block needs 1 to 3 spatial dimensions", seen=f"rank = {rank}")
    return _CONVOLUTIONS[rank]


def batch_norm(rank: int) -> Any:
    """Return the class of batch normalisation for this many spatial dimensions."""
    return _NORMS[rank]


def zero_(layer: Any) -> None:
    """Make a layer's weight and bias zero: what it returns is then zero, and its gradient is not."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def chosen(what: str, value: str, known: Iterable[str]) -> str:
    """Check that a value is one of those known, and return it.

    Raises:
        OptionError: it is not.
    """
    if value not in known:
        raise OptionError(f"no such {what}: `{value}`", seen=", ".join(known), hint=did_you_mean(str(value), known))
    return value


def _recorded() -> bool:
    """Tell whether a call is being exported or traced: files are then written in forms that more runtimes get right."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call,no-any-return]


def hard_sigmoid(a: Tensor) -> Tensor:
    """Compute min(max(a + 3, 0), 6) / 6; in files written like this: OpenCV's HardSigmoid before a product is wrong."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if _recorded():
            return (a + 3).clamp(0, 6) / 6
    return F.hardsigmoid(a)


def largest(x: Tensor, space: list[int]) -> Tensor:
    """Compute the maximum over space, (N, C, 1, …); for images in exported files as a pooling, which more runtimes read and quantise.

    Not in eager, where pooling gives all of the gradient to the first of equal values.
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if len(space) == 2 and _recorded():
            return F.adaptive_max_pool2d(x, 1)
    return x.amax(space, keepdim=True)


def widened(x: Tensor) -> Tensor:
    """Convert half precision to float32, for sums of squares: 65504, float16's largest number, is soon reached."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def mean_and_deviation(x: Tensor, space: list[int], epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute the mean over space and √(var + ε), the variance divided by the number of positions.

    The gradient is finite where the variance is 0. Half precision is widened for the sums.
    """
    wide = widened(x)
    mean = wide.mean(space, keepdim=True)
    spread = ((wide - mean).square().mean(space, keepdim=True) + epsilon).sqrt()
    return mean.to(x.dtype), spread.to(x.dtype)


LEAST_WIDTH = 4
"""The narrowest bottleneck that a reduction gives; no count of the paper changes by it."""
WIDEST = 2**24
"""The widest bottleneck there can be; how large a block may be is for ``build_block``."""


def squeeze_width(
    channels: int, reduction: float | None = None, divisor: int | None = None, width: int | None = None, least: int = 1
) -> int:
    """Return the width of the bottleneck: C // r, C / r rounded to a multiple of ``divisor``, or ``width`` itself.

    C // r is at least ``least``, or C if that is less.
    Rounding is to the nearest multiple and at least one, as timm's ``make_divisible(..., round_limit=0)`` has it.

    Args:
        channels: C.
        reduction: r; None: 16.
        divisor: None: no rounding.
        width: instead of the two.
        least: the least C // r.

    Raises:
        OptionError: a reduction that is not positive and finite, a divisor or width below 1 or too large, a width beside the
            others.
    """
    if width is not None:
        if reduction is not None or divisor is not None:
            raise OptionError(
                "the width of the bottleneck is given twice",
                seen=f"width = {width}, " + (f"r = {reduction:g}" if reduction is not None else f"divisor = {divisor}"),
                hint="give either a width, or a reduction r and perhaps a divisor",
            )
        if width < 1:
            raise OptionError("the bottleneck must be at least 1 wide", seen=f"width = {width}")
        return int(_at_most(width, f"width = {width}"))
    reduction = 16 if reduction is None else reduction
    if not 0 < reduction < math.inf:
        raise OptionError(
            "the reduction r must be positive and finite", seen=f"r = {reduction}", hint="the paper uses 16"
        )
    exact = _at_most(channels / reduction, f"r = {reduction} at {channels} channels")
    if divisor is None:
        return max(min(least, channels), int(channels // reduction))
    if divisor < 1:
        raise OptionError("the divisor must be at least 1", seen=f"divisor = {divisor}")
    return max(int(_at_most(divisor, f"divisor = {divisor}")), int(exact + divisor / 2) // divisor * divisor)


def _at_most(width: float, seen: str) -> float:
    """Return a width that tensors can have.

    Raises:
        OptionError: it is beyond.
    """
    if width > WIDEST:
        raise OptionError("the bottleneck is too wide", seen=seen, hint=f"at most {WIDEST:,}")
    return width


class Bottleneck(nn.Module):
    """W2 δ(W1 z) of SE (arXiv 1709.01507, equation 3), as two 1×1 convolutions: what many blocks build on.

    W1 is ``fc1`` and W2 is ``fc2``. A block that inherits from it calls ``excite`` in its own forward.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        reduction: r; the bottleneck is max(4, C // r) wide. None: 16.
        divisor: round C / r to a multiple of this instead.
        width: of the bottleneck, instead of a reduction.
        bias: whether W1 and W2 have biases.
        activation: δ: ``relu``, ``silu``, ``gelu`` or ``hard_swish``.
        norm: batch normalisation between W1 and δ.

    Raises:
        OptionError: no such rank, width or activation.
    """

    least_width = 1

    def __init__(
        self,
        channels: int,
        *,
        rank: int = 2,
        reduction: float | None = None,
        divisor: int | None = None,
        width: int | None = None,
        bias: bool = True,
        activation: str = "relu",
        norm: bool = False,
    ) -> None:
        super().__init__()
        layer = convolution(rank)
        width = squeeze_width(channels, reduction, divisor, width, self.least_width)
        self.fc1 = layer(channels, width, 1, bias=bias)
        self.bn = batch_norm(rank)(width) if norm else None
        self.act = ACTIVATIONS[chosen("activation", activation, ACTIVATIONS)]()
        self.fc2 = layer(width, channels, 1, bias=bias)
        self.space = list(range(2, 2 + rank))

    @classmethod
    def count(
        cls,
        channels: int,
        *,
        reduction: float | None = None,
        divisor: int | None = None,
        width: int | None = None,
        bias: bool = True,
        norm: bool = False,
        **_: Any,
    ) -> int:
        """Count the parameters: 2Cm (+ m + C with biases, + 2m with a norm), m the width; other options have none."""
        m = squeeze_width(channels, reduction, divisor, width, cls.least_width)
        return 2 * channels * m + bias * (m + channels) + norm * 2 * m

    @property
    def width(self) -> int:
        """The width of the bottleneck that was built."""
        return self.fc1.out_channels  # type: ignore[no-any-return]

    def rest_(self) -> None:
        """Start with W2 zero and every inner unit on: a ReLU that is off for all inputs would never learn.

        b1 is 1, and W1 z is well below 1 for inputs that a normalisation made. The second row of W1 is the first one turned
        round, so that one of the two is on however large z is; without a bias, every second row is the one before it turned round.
        """
        zero_(self.fc2)
        if self.bn is not None:
            nn.init.ones_(self.bn.bias)
            return
        pairs = self.width // 2 * 2
        if self.fc1.bias is not None:
            nn.init.ones_(self.fc1.bias)
            pairs = min(pairs, 2)
        with torch.no_grad():
            self.fc1.weight[1:pairs:2] = -self.fc1.weight[0:pairs:2]

    def excite(self, z: Tensor) -> Tensor:
        """Compute W2 δ(W1 z), for z of (N, C, *)."""
        hidden = self.fc1(z)
        if self.bn is not None:
            hidden = self.bn(hidden)
        return self.fc2(self.act(hidden))  # type: ignore[no-any-return]
