"""What the blocks share: layers for 1, 2 or 3 spatial dimensions, and statistics that don't overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import OptionError

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def convolution(rank: int) -> Any:
    """The class of convolutions for this many spatial dimensions.

    Raises:
        OptionError: not 1, 2 or 3.
    """
    if rank not in _CONVOLUTIONS:
        raise OptionError("a block needs 1 to 3 spatial dimensions", seen=f"rank = {rank}")
    return _CONVOLUTIONS[rank]


def batch_norm(rank: int) -> Any:
    """The class of batch normalisation for this many spatial dimensions."""
    return _NORMS[rank]


def zero_(layer: Any) -> None:
    """Make a layer's weight and bias zero: what it returns is then zero, and its gradient is not."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def odd_kernel(kernel: int) -> int:
    """The kernel size itself, if a convolution of that size can keep the shape.

    Raises:
        OptionError: it is even, or below 1.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise OptionError("a kernel that keeps the shape has an odd size", seen=f"kernel = {kernel}")
    return kernel


def chosen(what: str, value: str, known: tuple[str, ...]) -> str:
    """The value itself, if it is one of those known.

    Raises:
        OptionError: it is not.
    """
    if value not in known:
        raise OptionError(f"no such {what}: `{value}`", seen=", ".join(known))
    return value


def widened(x: Tensor) -> Tensor:
    """Half precision as float32, for sums of squares: 65504, float16's largest number, is soon reached."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
