"""Compute count, mean, spread, extremes and shares of a stream of numbers, in memory that does not grow with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Summary:
    """Statistics of columns after all rows have passed: tensors are (C,) or, by class, (K, C).

    Args:
        rows: how many.
        mean: of each column.
        squares: sum of the squared differences from the mean.
        low: the smallest number.
        high: the largest number.
        inside: how many numbers were within the bounds.
        class_rows: rows of each class, (K,).
        class_mean: mean of each column over the rows of each class; NaN for a class without rows.
        class_squares: as ``squares``.
    """

    rows: int
    mean: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor
    inside: Tensor
    class_rows: Tensor
    class_mean: Tensor
    class_squares: Tensor

    @property
    def std(self) -> Tensor:
        """The standard deviation of each column, divided by the number of rows and not by one less."""
        return (self.squares / self.rows).sqrt()

    @property
    def class_std(self) -> Tensor:
        """The same over the rows of each class."""
        return (self.class_squares / self.class_rows[:, None]).sqrt()

    def __add__(self, other: Summary) -> Summary:
        """Unite the moments of both sets of rows."""
        mean, squares = _united((self.rows, self.mean, self.squares), (other.rows, other.mean, other.squares))
        class_rows = self.class_rows + other.class_rows
        class_mean, class_squares = _united(
            (self.class_rows[:, None], self.class_mean, self.class_squares),
            (other.class_rows[:, None], other.class_mean, other.class_squares),
        )
        return Summary(
            self.rows + other.rows,
            mean,
            squares,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.inside + other.inside,
            class_rows,
            class_mean,
            class_squares,
        )


class Moments:
    """Sums of rows of C columns, as a whole and by class.

    All sums are of differences from the first row, in float64: columns that are constant have a spread of exactly 0.

    Args:
        columns: C.
        bounds: for each column the smallest and the largest value that is not counted as saturated, (2, C).
    """

    def __init__(self, columns: int, bounds: Tensor) -> None:
        self.rows = 0
        self.bounds = bounds
        self.shift = torch.zeros(columns, dtype=torch.float64)
        self.sums = torch.zeros(2, columns, dtype=torch.float64)
        self.low = torch.full((columns,), torch.inf, dtype=torch.float64)
        self.high = torch.full((columns,), -torch.inf, dtype=torch.float64)
        self.inside = torch.zeros(columns, dtype=torch.float64)
        self.class_rows = torch.zeros(0, dtype=torch.float64)
        self.class_sums = torch.zeros(2, 0, columns, dtype=torch.float64)

    def add(self, values: Tensor, classes: Tensor | None = None) -> None:
        """Add rows, (N, C), and the number of the class of each, (N,)."""
        if not len(values):
            return
        if not self.rows:
            self.shift = values[0].double()
        centred = values.double() - self.shift
        squares = centred.square()
        self.rows += len(values)
        self.sums[0] += centred.sum(0)
        self.sums[1] += squares.sum(0)
        self.low = torch.minimum(self.low, values.amin(0).double())
        self.high = torch.maximum(self.high, values.amax(0).double())
        self.inside += ((values > self.bounds[0]) & (values < self.bounds[1])).sum(0)
        if classes is not None:
            self._add_classes(centred, squares, classes)

    def _add_classes(self, centred: Tensor, squares: Tensor, classes: Tensor) -> None:
        known, needed = len(self.class_rows), int(classes.max()) + 1
        if needed > known:
            room = max(needed, 2 * known if known else needed)
            self.class_rows = torch.cat([self.class_rows, self.class_rows.new_zeros(room - known)])
            more = self.class_sums.new_zeros(2, room - known, centred.shape[1])
            self.class_sums = torch.cat([self.class_sums, more], 1)
        self.class_rows.index_add_(0, classes, torch.ones(len(classes), dtype=torch.float64))
        self.class_sums[0].index_add_(0, classes, centred)
        self.class_sums[1].index_add_(0, classes, squares)

    def summary(self, columns: slice, classes: int) -> Summary:
        """Summarise the moments of some of the columns, for this number of classes."""
        shift = self.shift[columns]
        mean, squares = _mean_and_squares(self.sums[:, columns], self.rows)
        rows = torch.zeros(classes, dtype=torch.float64)
        sums = torch.zeros(2, classes, len(shift), dtype=torch.float64)
        known = min(classes, len(self.class_rows))
        rows[:known] = self.class_rows[:known]
        sums[:, :known] = self.class_sums[:, :known, columns]
        class_mean, class_squares = _mean_and_squares(sums, rows[:, None])
        return Summary(
            self.rows,
            shift + mean,
            squares,
            self.low[columns],
            self.high[columns],
            self.inside[columns],
            rows,
            class_mean + shift,
            class_squares,
        )


def _mean_and_squares(sums: Tensor, rows: Tensor | int) -> tuple[Tensor, Tensor]:
    """Compute the mean, and the sum of squared differences from it, from sums of numbers and of their squares."""
    mean = sums[0] / rows
    return mean, (sums[1] - sums[0] * mean).clamp(min=0)


def _united(one: tuple[Any, Tensor, Tensor], other: tuple[Any, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Unite the means and squares of two sets of rows (Chan, Golub, LeVeque)."""
    rows = [torch.as_tensor(part[0], dtype=torch.float64) for part in (one, other)]
    whole = rows[0] + rows[1]
    means = [torch.where(count > 0, part[1], 0.0) for count, part in zip(rows, (one, other), strict=True)]
    squares = [torch.where(count > 0, part[2], 0.0) for count, part in zip(rows, (one, other), strict=True)]
    apart = means[1] - means[0]
    mean = torch.where(whole > 0, means[0] + apart * rows[1] / whole, torch.nan)
    return mean, squares[0] + squares[1] + torch.where(whole > 0, apart.square() * rows[0] * rows[1] / whole, 0.0)
