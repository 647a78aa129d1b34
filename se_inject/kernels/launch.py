"""Launch the Triton kernels: strides, tiles, grids, and the small products between them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from se_inject.kernels import programs
from se_inject.kernels.formulas import GIVEN, Excitation, Sigma, excited, hidden_backward

FEW = 8
"""Up to this batch the bottleneck is a kernel of its own and each tile of the tail makes its gates: three launches."""


class Layout(NamedTuple):
    """A dense value (N, C, *): its extents, its strides, and the tile that reads it in the order of memory."""

    batch: int
    channels: int
    positions: int
    strides: tuple[int, int, int]
    tile: tuple[int, int]

    @classmethod
    def of(cls, value: Tensor) -> Layout:
        """Return the layout of a value that is contiguous or has its channels last."""
        batch, channels = value.shape[:2]
        positions = value.numel() // (batch * channels)
        whole = positions * channels
        if value.is_contiguous():
            along = min(1024, _power(positions))
            return cls(batch, channels, positions, (whole, positions, 1), (along, min(2048 // along, _power(channels))))
        across = min(64, _power(channels))
        return cls(batch, channels, positions, (whole, 1, channels), (min(2048 // across, _power(positions)), across))

    @property
    def tiles(self) -> tuple[int, int]:
        """The number of tiles along the positions and along the channels."""
        return -(-self.positions // self.tile[0]), -(-self.channels // self.tile[1])

    def split(self, device: torch.device) -> tuple[int, int]:
        """Choose the number of parts to sum the positions in, and their length: enough programs for the whole card."""
        programs_now = self.batch * self.tiles[1]
        parts = max(1, min(-(-8 * _processors(device) // programs_now), self.tiles[0], 64))
        length = -(-self.tiles[0] // parts) * self.tile[0]
        return -(-self.positions // length), length


def _power(number: int) -> int:
    """Return the next power of 2."""
    return 1 << max(0, int(number) - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def parts_of_mean(value: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Launch sums over parts of the positions, divided by the number of all: (N, splits, C).

    Their sum over ``splits`` is the mean. A single part is of the ``dtype`` asked for, several are float32.
    """
    splits, length = layout.split(value.device)
    kind = dtype if splits == 1 else torch.float32
    partial = value.new_empty((layout.batch, splits, layout.channels), dtype=kind)
    across = layout.tiles[1]
    programs.squeeze[(layout.batch * splits * across,)](
        value, partial, *layout.strides, layout.positions, layout.channels, splits, length, across,
        BP=layout.tile[0], BC=layout.tile[1],
    )  # fmt: skip
    return partial


def _added(partial: Tensor) -> Tensor:
    """Add what parts of the positions contributed: (N, splits, C) to (N, C)."""
    return partial.squeeze(1) if partial.shape[1] == 1 else partial.sum(1)


def tail(value: Tensor, gate: Tensor, shortcut: Tensor | None, activation: str, sigma: Sigma = GIVEN) -> Tensor:
    """Compute act(value · gate + shortcut), for a gate of (N, C) or, with a ``sigma``, its logits."""
    layout, out = Layout.of(value), torch.empty_like(value)
    along, across = layout.tiles
    programs.tail[(layout.batch * along * across,)](
        value, gate, shortcut, out, *layout.strides, layout.positions, layout.channels, along, across,
        ADD=shortcut is not None, GATE=sigma[0], ONE=sigma[1], ACT=activation, EXACT=value.is_cuda,
        BP=layout.tile[0], BC=layout.tile[1],
    )  # fmt: skip
    return out


def tail_backward(
    grad: Tensor, value: Tensor, gate: Tensor, other: Tensor | None, activation: str, adds: bool, scale: bool,
    sigma: Sigma = GIVEN,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Compute the gradients of shortcut (None: it is ``grad`` itself), value (only with ``scale``) and ``gate`` (N, C), float32."""
    layout = Layout.of(value)
    splits, length = layout.split(value.device)
    store = adds and activation != "none"
    d_shortcut = torch.empty_like(value) if store else None
    d_value = torch.empty_like(value) if scale else None
    partial = value.new_empty((layout.batch, splits, layout.channels), dtype=torch.float32)
    across = layout.tiles[1]
    programs.tail_backward[(layout.batch * splits * across,)](
        grad, value, other, gate, d_shortcut, d_value, partial, *layout.strides, layout.positions, layout.channels,
        splits, length, across, ADD=adds, STORE=store, SCALE=scale, GATE=sigma[0], ONE=sigma[1], ACT=activation,
        EXACT=value.is_cuda, BP=layout.tile[0], BC=layout.tile[1],
    )  # fmt: skip
    return d_shortcut, d_value, _added(partial)


def excite(
    value: Tensor, shortcut: Tensor | None, e: Excitation, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a block and its tail: the output, and what backward needs in float32: mean, hidden units before δ, logits."""
    layout = Layout.of(value)
    partial = parts_of_mean(value, layout, torch.float32)
    if layout.batch > FEW:
        mean = _added(partial)
        hidden, logits = excited(mean, e)
        return tail(value, logits, shortcut, activation, e.sigma), mean, hidden, logits
    mean, logits = (value.new_empty((layout.batch, layout.channels), dtype=torch.float32) for _ in range(2))
    out, hidden = _excite_few(partial, value, shortcut, e, activation, mean, logits)
    return out, mean, hidden, logits


def excite_from(source: Tensor, value: Tensor, shortcut: Tensor | None, e: Excitation, activation: str) -> Tensor:
    """Compute the same with the mean of another value, and the output alone; products in the weights' dtype, as unfused."""
    layout = Layout.of(value)
    partial = parts_of_mean(source, Layout.of(source), e.w1.dtype)
    if layout.batch > FEW:
        logits = excited(_added(partial).to(e.w1.dtype), e)[1]
        return tail(value, logits, shortcut, activation, e.sigma)
    return _excite_few(partial, value, shortcut, e, activation, None, None)[0]


def _excite_few(
    partial: Tensor, value: Tensor, shortcut: Tensor | None, e: Excitation, activation: str, mean: Tensor | None,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the output and the hidden units of a small batch in two launches; fill in mean and logits."""
    layout, (width, read), out = Layout.of(value), e.w1.shape, torch.empty_like(value)
    hidden = value.new_empty((layout.batch, width), dtype=torch.float32)
    programs.bottleneck[(layout.batch * width,)](
        partial, e.w1, e.b1, mean, hidden, read, width, partial.shape[1], BIAS=e.b1 is not None,
        BC=min(1024, _power(read)),
    )  # fmt: skip
    along, across = layout.tiles
    programs.tail_with_gate[(layout.batch * along * across,)](
        value, shortcut, out, hidden, logits, e.w2, e.b2, *layout.strides, layout.positions, layout.channels, width,
        along, across, ADD=shortcut is not None, INNER=e.inner, BIAS=e.b2 is not None, GATE=e.gate,
        ONE=e.one_at_zero, ACT=activation, EXACT=value.is_cuda, BP=layout.tile[0], BC=layout.tile[1],
        BR=min(32, _power(width)),
    )  # fmt: skip
    return out, hidden


def excite_backward(
    grad: Tensor, value: Tensor, other: Tensor | None, mean: Tensor, hidden: Tensor, logits: Tensor, e: Excitation,
    activation: str, adds: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Compute the gradients of value, shortcut (None: it is ``grad`` itself), and of W1, b1, W2, b2 in float32."""
    d_shortcut, _, d_logits = tail_backward(grad, value, logits, other, activation, adds, False, e.sigma)
    d_mean, weights = hidden_backward(d_logits, mean, hidden, e)
    before, left = (grad, activation) if d_shortcut is None else (d_shortcut, "none")
    return value_backward(before, value, other, logits, d_mean, left, adds, e.sigma), d_shortcut, weights


def value_backward(
    grad: Tensor, value: Tensor, other: Tensor | None, gate: Tensor, d_mean: Tensor, activation: str, adds: bool,
    sigma: Sigma = GIVEN,
) -> Tensor:  # fmt: skip
    """Compute the gradient of a value that was scaled by a gate made of its mean."""
    layout, d_value = Layout.of(value), torch.empty_like(value)
    along, across = layout.tiles
    programs.value_backward[(layout.batch * along * across,)](
        grad, value, other, gate, d_mean, d_value, *layout.strides, layout.positions, layout.channels, along, across,
        ADD=adds, GATE=sigma[0], ONE=sigma[1], ACT=activation, EXACT=value.is_cuda, BP=layout.tile[0],
        BC=layout.tile[1],
    )  # fmt: skip
    return d_value
