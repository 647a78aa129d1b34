"""Sum up the recorded gates of batch after batch, and make statistics of the sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import DataError
from se_inject.forwards import original_class
from se_inject.gates.batches import not_finite_note
from se_inject.gates.moments import Moments, Summary
from se_inject.gates.recording import Record, Records, gate_range
from se_inject.gates.statistics import BlockGates, Excitations, margin
from se_inject.surgery import Step
from se_inject.tables import counted


class Tally:
    """The sum of the records of batch after batch.

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
        """Make statistics of all that was added.

        Args:
            model: the network.
            steps: its blocks, by path.
            names: of the classes; None: their numbers.
            batches: the data.

        Raises:
            DataError: no example gave finite numbers.
        """
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
