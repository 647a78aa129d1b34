"""Statistics of the gates of one block, and of all blocks of a network, as values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from se_inject.gates.plot import plot_gates
from se_inject.gates.text import excitations_text
from se_inject.tables import Printed, counted

EDGE = 0.05
"""A gate within this share of its range from an end is saturated."""


@dataclass(frozen=True, eq=False)
class BlockGates:
    """Statistics of one block's gate over the examples. Tensors are (C,), float64, on the CPU.

    Args:
        path: where the block is in the network.
        block: its name.
        site: the address of the site it gates.
        stage: the number of the site's stage.
        call: 0; more for the later calls of a block that is called several times in one forward.
        examples: how many gates were seen.
        positions: how many positions the gate has; if more than one, the numbers are of its means over them.
        ends: the range in which the gate lies; None if the block does not say.
        mean: of each channel, over the examples.
        std: the standard deviation of each channel over the examples (divided by their number).
        low: the smallest gate of each channel.
        high: the largest gate of each channel.
        saturated: of each channel, the share of examples in which the gate is near an end of its range; None if the
            range is not known.
        class_mean: the mean of each channel over the examples of each class, (K, C); NaN for a class without one.
        class_std: the standard deviation likewise.
        class_share: the share of the variance between images that is between the classes; None without two classes.
    """

    path: str
    block: str
    site: str
    stage: int | None
    call: int
    examples: int
    positions: int
    ends: tuple[float, float] | None
    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    saturated: Tensor | None = None
    class_mean: Tensor | None = None
    class_std: Tensor | None = None
    class_share: float | None = None

    @property
    def name(self) -> str:
        """The path, with the number of the call if the block is called several times."""
        return self.path if not self.call else f"{self.path} (call {self.call + 1})"

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def average(self) -> float:
        """The mean over examples and channels."""
        return float(self.mean.mean())

    @property
    def spread(self) -> float:
        """The distance of a channel's gate from its own mean, as the root mean square over examples and channels."""
        return float(self.std.square().mean().sqrt())

    @property
    def variation(self) -> float:
        """The spread over the root mean square of the means: the relative error of a constant gate in its place."""
        size = float(self.mean.square().mean().sqrt())
        return self.spread / size if size else (math.inf if self.spread else 0.0)

    @property
    def between_images(self) -> float:
        """The share of the gates' variance that is between images; the rest is between channels. 0 for constant gates."""
        within = float(self.std.square().mean())
        whole = within + float(self.mean.var(correction=0))
        return within / whole if whole else 0.0

    @property
    def saturation(self) -> float | None:
        """The share of gates near an end of their range; None if that is not known."""
        return None if self.saturated is None else float(self.saturated.mean())

    @property
    def always_on(self) -> float | None:
        """The share of channels whose gate is near the upper end for every image; None if there is no such end."""
        if self.ends is None or math.isinf(self.ends[1]):
            return None
        return float((self.low >= self.ends[1] - self._margin).double().mean())

    @property
    def always_off(self) -> float | None:
        """The share of channels whose gate is near 0 for every image; None if the range is not known."""
        if self.ends is None:
            return None
        return float((torch.maximum(self.high.abs(), self.low.abs()) <= self._margin).double().mean())

    @property
    def _margin(self) -> float:
        return margin(self.ends)

    @property
    def is_constant(self) -> bool:
        """Whether the gate was the same, to the bit, for every image."""
        return bool((self.low == self.high).all())


@dataclass(frozen=True, eq=False, repr=False)
class Excitations(Printed):
    """Statistics of all gates of a network on data, printed as a table.

    Args:
        model: class name of the network.
        blocks: one for each block (and call of it) that offers a gate, in the order of the calls.
        examples: how many the statistics are of.
        classes: the names of the classes.
        class_counts: how many examples each class has.
        notes: what the user should know.
        without_gate: paths of blocks that offer no gate, or were never called.
        source: the batches, if they can be gone through again.
    """

    model: str
    blocks: tuple[BlockGates, ...]
    examples: int
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    without_gate: tuple[str, ...] = ()
    source: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[BlockGates]:
        return iter(self.blocks)

    def __getitem__(self, path: str) -> BlockGates:
        """Return the block with this path, or gating the site with this address.

        Raises:
            KeyError: there is none.
        """
        for block in self.blocks:
            if path in (block.name, block.site):
                return block
        raise KeyError(path)

    def text(self) -> str:
        """Format a line for each block, and the correlations with depth."""
        return excitations_text(self)

    def summary(self) -> str:
        """Say of which network and how many examples."""
        return f"{counted(len(self.blocks), 'block')} of {self.model} on {counted(self.examples, 'example')}"

    def plot(self, path: str | PathLike[str], **options: Any) -> None:
        """Draw a panel for each block: the gates of its channels, by class where there are labels; see ``plot_gates``.

        Args:
            path: ``.png``, ``.svg`` or ``.pdf``.
            **options: ``blocks`` and ``classes`` by name, and ``force`` to replace a file.

        Raises:
            OptionError: a suffix of no picture, or no such block or class.
            ExportError: the file can't be written, or there is no matplotlib.
        """
        plot_gates(self, path, **options)

    @property
    def depth_correlation(self) -> dict[str, float | None]:
        """Pearson's correlation of each figure with depth, the number of the block: from -1 to 1.

        None for a figure that is the same in all blocks or not known, and for fewer than three blocks.
        """
        figures = ("average", "spread", "variation", "between_images", "class_share", "saturation")
        return {name: correlation([getattr(block, name) for block in self.blocks]) for name in figures}


def margin(ends: tuple[float, float] | None) -> float:
    """Return the distance from an end of its range within which a gate counts as saturated; without an upper end, that of 0 … 1."""
    low, high = ends or (0.0, 1.0)
    return EDGE * (1.0 if math.isinf(high - low) else high - low)


def correlation(values: Sequence[float | None]) -> float | None:
    """Compute Pearson's correlation of numbers with their positions; None if it is not defined."""
    known = [(float(i), value) for i, value in enumerate(values) if value is not None and math.isfinite(value)]
    if len(known) < 3:
        return None
    depth, figures = torch.tensor(known, dtype=torch.float64).T
    depth, figures = depth - depth.mean(), figures - figures.mean()
    size = float(depth.norm() * figures.norm())
    return float(depth @ figures) / size if size > 1e-12 else None
