"""Compare two networks on the same data: agreement, accuracy, and whether the difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from se_inject.cost import Latency
from se_inject.errors import DataError
from se_inject.forwards import original_class
from se_inject.gates.batches import Progress, moved, outputs_of
from se_inject.gates.excitations import eval_mode
from se_inject.gates.prune import latency_beside
from se_inject.gates.text import comparison_text
from se_inject.surgery import steps_of
from se_inject.tables import Printed, counted
from se_inject.tracing import check_has_numbers, copied

NOISE = 2.0
"""A difference within so many standard errors is reported as noise: about 1 in 20 such differences comes about by chance."""


@dataclass(frozen=True, repr=False)
class Compared(Printed):
    """Two networks, A and B, on the same examples; printed as a few lines.

    Args:
        models: class names of both.
        params: learnable parameters of both.
        blocks: blocks of ours in both.
        examples: how many examples were compared.
        change: root mean square of the difference of their outputs over that of A's.
        agreement: the share of predictions (the largest of the outputs) in which they agree; None if the outputs are no
            scores of classes.
        right: the shares of examples that A and B get right; None without labels.
        difference: B's accuracy minus A's.
        error: the standard error of that difference, from the examples that only one of them gets right.
        only: how many examples only A gets right, and only B.
        latency: of B beside A, if measured.
        notes: what the user should know.
    """

    models: tuple[str, str]
    params: tuple[int, int]
    blocks: tuple[int, int]
    examples: int
    change: float
    agreement: float | None = None
    right: tuple[float, float] | None = None
    difference: float | None = None
    error: float | None = None
    only: tuple[int, int] | None = None
    latency: Latency | None = None
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Format the comparison as a few lines."""
        return comparison_text(self)

    def summary(self) -> str:
        """Name both networks, and how far apart their outputs are."""
        return f"{self.models[0]} and {self.models[1]} on {counted(self.examples, 'example')}, outputs differ by {self.change:.3g}"

    @property
    def is_noise(self) -> bool | None:
        """Whether the difference of the accuracies is within two standard errors; None without labels."""
        if self.difference is None or self.error is None:
            return None
        return abs(self.difference) <= NOISE * self.error


def compare(
    a: nn.Module,
    b: nn.Module,
    batches: Iterable[Any],
    *,
    latency_seconds: float = 0.0,
    progress: Progress | None = None,
) -> Compared:
    """Run two networks on the same data and compare their outputs. Both are left as they were.

    The accuracies are of the same examples, so their difference is far more certain than either: its standard error is that
    of a paired comparison, √(n₁ + n₂ - (n₁ - n₂)²/N) / N, where n₁ and n₂ are the examples that only one of them gets right
    (McNemar). A difference within two standard errors is noise.

    Args:
        a: a network: the plain one, say.
        b: another that takes the same data: with blocks, or with another ratio.
        batches: as for ``excitations``; with labels, accuracies are compared as well.
        latency_seconds: measure both in turns for so long, on the first batch; 0: don't.
        progress: called after every batch.

    Raises:
        DataError: there is no example, a network fails on the data, or their outputs are of different shapes.
    """
    for model in (a, b):
        check_has_numbers(model)
    tally = _Tally()
    first = None
    with eval_mode(a), eval_mode(b):
        for batch in moved(a, batches, progress):
            first = first or batch
            args, kwargs = copied(_placed(b, (batch.args, batch.kwargs)))
            again = batch._replace(args=args, kwargs=kwargs)
            tally.add(outputs_of(a, batch), outputs_of(b, again), batch.labels, batch.size)
        assert first is not None
        latency = latency_beside(a, b, first.args, first.kwargs, latency_seconds) if latency_seconds else None
    return tally.result(a, b, latency)


def _placed(model: nn.Module, value: Any) -> Any:
    near = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return tree_map_only(
        Tensor, lambda leaf: leaf.to(near.device, near.dtype if leaf.is_floating_point() else None), value
    )


class _Tally:
    """Adds up the outputs and predictions of both networks."""

    def __init__(self) -> None:
        self.examples = self.labelled = self.same = self.scored = 0
        self.both = [0, 0, 0, 0]  # right: neither, only A, only B, both
        self.sums = [0.0, 0.0]
        self.lost = 0

    def add(self, one: Any, other: Any, labels: Tensor | None, size: int) -> None:
        outputs = [
            [
                leaf.detach().double().cpu()
                for leaf in tree_leaves(output)
                if isinstance(leaf, Tensor) and leaf.is_floating_point()
            ]
            for output in (one, other)
        ]
        shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in outputs]
        if shapes[0] != shapes[1] or not outputs[0]:
            raise DataError(
                "the outputs of the two networks can't be compared",
                seen=f"of shapes {shapes[0]} and {shapes[1]}",
                hint="compare networks for the same task",
            )
        self.examples += size
        for x, y in zip(*outputs, strict=True):
            good = x.isfinite() & y.isfinite()
            self.lost += int((~good).sum())
            self.sums[0] += float((x - y)[good].square().sum())
            self.sums[1] += float(x[good].square().sum())
        scores, others = outputs[0][0], outputs[1][0]
        if scores.dim() != 2 or scores.shape[0] != size or scores.shape[1] < 2:
            return
        said, said_by_other = scores.argmax(1), others.argmax(1)
        self.scored += size
        self.same += int((said == said_by_other).sum())
        if labels is not None:
            if len(labels) and int(labels.max()) >= scores.shape[1]:
                raise DataError(
                    "a label is not a class of the networks",
                    seen=f"label {int(labels.max())}, and {scores.shape[1]} outputs",
                    hint="the folders or labels of the data must be in the order of the network's classes",
                )
            self.labelled += size
            kinds = (said == labels).long() + 2 * (said_by_other == labels).long()
            for kind in range(4):
                self.both[kind] += int((kinds == kind).sum())

    def result(self, a: nn.Module, b: nn.Module, latency: Latency | None) -> Compared:
        notes = []
        if self.lost:
            notes.append(f"{counted(self.lost, 'number')} of the outputs were NaN or infinite and are left out")
        right = difference = error = only = None
        if self.labelled:
            count, (_, only_a, only_b, both) = self.labelled, self.both
            right = (both + only_a) / count, (both + only_b) / count
            difference = right[1] - right[0]
            error = math.sqrt(max(0.0, only_a + only_b - (only_a - only_b) ** 2 / count)) / count
            only = only_a, only_b
        else:
            notes.append("no labels: accuracy is not known")
        if not self.scored:
            notes.append("the outputs are not scores of classes: whether predictions agree is not known")
        params = [sum(p.numel() for p in model.parameters()) for model in (a, b)]
        return Compared(
            (original_class(a).__name__, original_class(b).__name__),
            (params[0], params[1]),
            (len(steps_of(a)), len(steps_of(b))),
            self.examples,
            math.sqrt(self.sums[0] / self.sums[1]) if self.sums[1] else (math.inf if self.sums[0] else 0.0),
            self.same / self.scored if self.scored else None,
            right,
            difference,
            error,
            only,
            latency,
            tuple(notes),
        )
