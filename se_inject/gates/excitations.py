"""What the gates of a network do on data: for every block means, spreads, shares, by class too (Hu et al., section 7)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import DataError, SurgeryError
from se_inject.forwards import original_class
from se_inject.gates.batches import Progress, finite_examples, moved, not_finite_note, outputs_of
from se_inject.gates.moments import Moments, Summary
from se_inject.gates.plot import plot_gates
from se_inject.gates.recording import Record, Records, gate_method, gate_range, recorded_gates
from se_inject.gates.text import excitations_text
from se_inject.surgery import Step, own_steps
from se_inject.tables import Printed, counted
from se_inject.tracing import check_has_numbers, check_supported, preserved

EDGE = 0.05
"""A gate within this share of its range from an end is saturated."""


@dataclass(frozen=True, eq=False)
class BlockGates:
    """What one block's gate did over the examples. Tensors are (C,), float64, on the CPU.

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
    """What the gates of a network did on data; printed as a table.

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


def excitations(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Excitations:
    """Run an injected network over data and sum up what its gates do. The network is left as it was.

    It runs in eval mode and without gradients. Gates are recorded as they are computed and summed up batch by batch:
    memory does not grow with the data, but with the number of classes. A block takes part if it has a method
    ``gate(value)`` whose result the value is multiplied by, or ``channel_gate(value)`` for a part of what it does.

    Args:
        model: an injected network.
        batches: an iterable of batches (a ``DataLoader``): tensors, (tensor, labels), tuples of positional arguments, or
            dicts of keyword arguments. Labels are whole numbers from 0, one for each example.
        classes: their names; None: those of the data, or the numbers.
        progress: called after every batch with the number of examples so far, and of all or None.

    Raises:
        SurgeryError: the network holds no block of ours, or none that offers a gate.
        DataError: there is no example, the network fails on one, or all its gates are NaN.
    """
    check_supported(model)
    check_has_numbers(model)
    steps = {step.path: step for step in own_steps(model)}
    modules = {path: model.get_submodule(path) for path in steps}
    blocks = {path: block for path, block in modules.items() if gate_method(block) is not None}
    if not blocks:
        raise SurgeryError(
            f"none of {counted(len(steps), 'block')} offers its gate",
            seen=", ".join(sorted({step.block for step in steps.values()})),
            hint="a block offers it as a method `gate(value)`, its output being value * gate",
        )
    tally = _Tally(blocks)
    with eval_mode(model), recorded_gates(blocks, tally.records):
        for batch in moved(model, batches, progress):
            tally.records.clear()
            output = outputs_of(model, batch)
            tally.add(batch.size, batch.labels, finite_examples(output, batch.size))
    return tally.result(model, steps, classes or getattr(batches, "classes", None), batches)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode for a while; restore attributes, flags and caches afterwards."""
    with preserved(model):
        for module in model.modules():
            module.training = False
        yield


class _Tally:
    """Sums up the records of batch after batch.

    The gates of one batch are put side by side and added at once: one ``Moments`` for each set of blocks that are
    called together with as many rows.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self.records: Records = {}
        self.blocks = blocks
        self.ends = {path: gate_range(block) for path, block in blocks.items()}
        self.banks: dict[tuple[Any, ...], Moments] = {}
        self.positions: dict[tuple[str, int], int] = {}
        self.class_counts: dict[int, int] = {}
        self.examples = self.lost = 0

    def add(self, size: int, labels: Tensor | None, good: Tensor) -> None:
        """Add the records of one batch, without the examples whose output or gates are not finite numbers."""
        groups: dict[int, list[Record]] = {}
        for record in self.records.values():
            groups.setdefault(len(record.values), []).append(record)
        values = {rows: torch.cat([r.values for r in group], 1).cpu() for rows, group in groups.items()}
        if size in values:
            good = good & values[size].isfinite().all(1)
        self.lost += size - int(good.sum())
        self.examples += int(good.sum())
        if labels is not None:
            if len(labels) and int(labels.min()) < 0:
                raise DataError("a label is negative", seen=str(int(labels.min())), hint="classes are numbered from 0")
            for label in labels[good].tolist():
                self.class_counts[label] = self.class_counts.get(label, 0) + 1
        for rows, group in groups.items():
            keep = good if rows == size else values[rows].isfinite().all(1)
            classes = labels[good] if rows == size and labels is not None else None
            self._bank(group).add(values[rows][keep], classes)

    def _bank(self, group: list[Record]) -> Moments:
        key = tuple((record.path, record.call, record.values.shape[1]) for record in group)
        if key not in self.banks:
            bounds = [_bounds(self.ends[record.path]).expand(-1, record.values.shape[1]) for record in group]
            self.banks[key] = Moments(sum(channels for _, _, channels in key), torch.cat(bounds, 1))
            self.positions |= {(record.path, record.call): record.positions for record in group}
        return self.banks[key]

    def result(
        self, model: nn.Module, steps: dict[str, Step], names: Sequence[str] | None, batches: Any
    ) -> Excitations:
        if not self.examples:
            raise DataError(
                f"every one of {counted(self.lost, 'example')} gave NaN or infinite numbers",
                hint="look at the weights of the network, and at how the data is normalised",
            )
        classes = max(self.class_counts, default=-1) + 1
        parts: dict[tuple[str, int], Summary] = {}
        for key, bank in self.banks.items():
            start = 0
            for path, call, channels in key if bank.rows else ():
                part = bank.summary(slice(start, start + channels), classes)
                parts[path, call] = parts[path, call] + part if (path, call) in parts else part
                start += channels
        blocks = tuple(self._block(steps[path], call, part) for (path, call), part in parts.items())
        known = [str(name) for name in names or ()]
        labels = tuple(known[number] if number < len(known) else str(number) for number in range(classes))
        counts = tuple(self.class_counts.get(number, 0) for number in range(classes))
        called = {path for path, _ in parts}
        result = Excitations(
            original_class(model).__name__,
            blocks,
            self.examples,
            labels,
            counts,
            without_gate=tuple(path for path in steps if path not in called),
            source=batches if can_repeat(batches) else None,
        )
        return replace(result, notes=tuple(_notes(result, self.lost)))

    def _block(self, step: Step, call: int, part: Summary) -> BlockGates:
        ends = self.ends[step.path]
        by_class = len(part.class_rows) > 0 and bool(part.class_rows.sum())
        return BlockGates(
            path=step.path,
            block=step.block,
            site=step.site,
            stage=step.stage,
            call=call,
            examples=part.rows,
            positions=self.positions[step.path, call],
            ends=ends,
            mean=part.mean,
            std=part.std,
            low=part.low,
            high=part.high,
            saturated=None if ends is None else 1 - part.inside / part.rows,
            class_mean=part.class_mean if by_class else None,
            class_std=part.class_std if by_class else None,
            class_share=_class_share(part) if by_class else None,
        )


def margin(ends: tuple[float, float] | None) -> float:
    """Return the distance from an end of its range within which a gate counts as saturated; without an upper end, that of 0 … 1."""
    low, high = ends or (0.0, 1.0)
    return EDGE * (1.0 if math.isinf(high - low) else high - low)


def _bounds(ends: tuple[float, float] | None) -> Tensor:
    low, high = ends or (-math.inf, math.inf)
    return torch.tensor([[low + margin(ends)], [high - margin(ends)]], dtype=torch.float64)


def _class_share(part: Summary) -> float | None:
    """Compute the share of the variance between images that is between the means of the classes."""
    seen = part.class_rows > 0
    whole = float(part.squares.sum())
    if not whole or int(seen.sum()) < 2:
        return None
    rows = part.class_rows[seen, None]
    mean = (part.class_mean[seen] * rows).sum(0) / rows.sum()
    return float((rows * (part.class_mean[seen] - mean).square()).sum()) / whole


def correlation(values: Sequence[float | None]) -> float | None:
    """Compute Pearson's correlation of numbers with their positions; None if it is not defined."""
    known = [(float(i), value) for i, value in enumerate(values) if value is not None and math.isfinite(value)]
    if len(known) < 3:
        return None
    depth, figures = torch.tensor(known, dtype=torch.float64).T
    depth, figures = depth - depth.mean(), figures - figures.mean()
    size = float(depth.norm() * figures.norm())
    return float(depth @ figures) / size if size > 1e-12 else None


def can_repeat(batches: Any) -> bool:
    """Return whether an iterable can be iterated a second time: a generator can't."""
    try:
        return iter(batches) is not batches
    except TypeError:
        return False


def _notes(found: Excitations, lost: int) -> list[str]:
    """Write notes on what limits the figures."""
    notes = not_finite_note(lost, found.examples + lost)
    if found.without_gate:
        without_gate = counted(len(found.without_gate), "block")
        notes.append(
            f"left out: {without_gate} that offers no gate or was not called, `{found.without_gate[0]}` the first"
        )
    gates = found.blocks
    if gates and all(bool((block.low == 1).all() and (block.high == 1).all()) for block in gates):
        notes.append("every gate is exactly 1: the blocks are as they started, nothing was trained")
    elif gates and found.examples > 1 and all(block.is_constant for block in gates):
        notes.append("every gate is constant: none of them depends on the image")
    if found.examples == 1:
        notes.append("one example: there is no spread")
    single = [name for name, count in zip(found.classes, found.class_counts, strict=True) if count == 1]
    if single and found.examples > 1:
        notes.append(f"{counted(len(single), 'class')} with one example, without spread: {', '.join(single[:5])}")
    if wide := [block for block in gates if block.positions > 1]:
        notes.append(f"{counted(len(wide), 'block')} has a gate for every position: the numbers are of its means")
    return notes
