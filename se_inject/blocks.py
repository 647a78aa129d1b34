"""The block that is put in, and the registry in which it is found by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import InjectError, OptionError

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def squeeze_width(channels: int, reduction: float = 16, divisor: int | None = None) -> int:
    """The width of the bottleneck: max(1, C // r), or C / r rounded to a multiple of ``divisor``.

    Rounding is to the nearest multiple and at least one, as timm's ``make_divisible(..., round_limit=0)`` has it.

    Raises:
        OptionError: a reduction that is not positive, a divisor below 1.
    """
    if not reduction > 0:
        raise OptionError("the reduction r must be positive", seen=f"r = {reduction}", hint="the paper uses 16")
    if divisor is None:
        return max(1, int(channels // reduction))
    if divisor < 1:
        raise OptionError("the divisor must be at least 1", seen=f"divisor = {divisor}")
    return max(divisor, int(channels / reduction + divisor / 2) // divisor * divisor)


class SqueezeExcitation(nn.Module):
    """The Squeeze-and-Excitation block (Hu et al., arXiv 1709.01507, equations 2 to 4).

    z_c = mean over space of u_c; s = σ(W2 δ(W1 z)), W1 of C/r × C and W2 of C × C/r, δ = ReLU; x_c = s_c · u_c.
    W1 is ``fc1`` and W2 is ``fc2``, written as 1×1 convolutions. No shape is baked in.

    Args:
        channels: C.
        rank: number of spatial dimensions: 1, 2 or 3.
        reduction: r; the bottleneck is max(1, C // r) wide.
        divisor: round C / r to a multiple of this instead; 8 is what timm does.
        bias: whether W1 and W2 have biases: the paper's ablations have none, its released models do.

    Shape:
        (N, C, *) to (N, C, *), with ``rank`` dimensions for the star.

    Raises:
        OptionError: no such rank, reduction or divisor.
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
        super().__init__()
        if rank not in _CONVOLUTIONS:
            raise OptionError("a block needs 1 to 3 spatial dimensions", seen=f"rank = {rank}")
        convolution = _CONVOLUTIONS[rank]
        width = squeeze_width(channels, reduction, divisor)
        self.fc1 = convolution(channels, width, 1, bias=bias)
        self.relu = nn.ReLU()
        self.fc2 = convolution(width, channels, 1, bias=bias)
        self.space = list(range(2, 2 + rank))
        self.gain = 1

    def identity_init(self) -> None:
        """Start as x ↦ x, exactly and in every floating-point format: W2 is zero and the gate is 2·σ(0) = 1.

        Gradients reach W2 at once and W1 from the second step on.
        """
        self.gain = 2
        nn.init.zeros_(self.fc2.weight)
        if self.fc2.bias is not None:
            nn.init.zeros_(self.fc2.bias)

    @property
    def width(self) -> int:
        """The width of the bottleneck that was built."""
        return self.fc1.out_channels

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc2(self.relu(self.fc1(x.mean(self.space, keepdim=True)))))
        return x * (gate if self.gain == 1 else self.gain * gate)

    def extra_repr(self) -> str:
        return f"gate={'sigmoid' if self.gain == 1 else '2·sigmoid'}"


BLOCKS: dict[str, Callable[..., nn.Module]] = {"se": SqueezeExcitation}
INITS = ("identity", "paper")
"""How a block starts: as x ↦ x, by its ``identity_init``; or as its authors have it."""


def find_block(name: str) -> Callable[..., nn.Module]:
    """The block with this name.

    Raises:
        OptionError: there is none.
    """
    if name not in BLOCKS:
        raise OptionError(f"no block is called `{name}`", seen=", ".join(sorted(BLOCKS)), hint=_similar(name, BLOCKS))
    return BLOCKS[name]


def block_options(name: str) -> dict[str, inspect.Parameter]:
    """The options a block takes: its factory's parameters but the first (the channels) and ``rank``."""
    parameters = list(inspect.signature(find_block(name)).parameters.values())[1:]
    return {parameter.name: parameter for parameter in parameters if parameter.name != "rank"}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Whether a block takes these options.

    Raises:
        OptionError: one it doesn't know.
    """
    known = block_options(name)
    for key in options:
        if key not in known:
            raise OptionError(
                f"block `{name}` has no option `{key}`",
                seen=", ".join(known) or "it has none",
                hint=_similar(key, known),
            )


def build_block(name: str, channels: int, rank: int, options: dict[str, Any], init: str) -> nn.Module:
    """One new block.

    Args:
        name: of the block.
        channels: C of the values it will gate.
        rank: their number of spatial dimensions.
        options: keyword arguments of the block.
        init: ``identity`` or ``paper``.

    Raises:
        OptionError: no such block or option, a value that it refuses, or a start or rank it doesn't have.
    """
    if init not in INITS:
        raise OptionError(f"no start is called `{init}`", seen=", ".join(INITS))
    factory = find_block(name)
    check_options(name, options)
    takes_rank = "rank" in inspect.signature(factory).parameters
    if rank != 2 and not takes_rank:
        raise OptionError(f"block `{name}` is for two spatial dimensions", seen=f"a value with {rank}")
    try:
        block = factory(channels, **({"rank": rank} if takes_rank else {}), **options)
    except InjectError:
        raise
    except Exception as error:
        raise OptionError(
            f"block `{name}` can't be built for {channels} channels with {options}",
            seen=f"{type(error).__name__}: {error}",
        ) from error
    if init == "identity":
        if not has_identity_start(block):
            raise OptionError(f"block `{name}` has no identity start", hint="init `paper`: as its authors start it")
        block.identity_init()  # type: ignore[operator]
    return block


def has_identity_start(block: nn.Module) -> bool:
    """Whether a block can start as x ↦ x."""
    return callable(getattr(block, "identity_init", None))


def _similar(word: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{close[0]}`?" if close else None
