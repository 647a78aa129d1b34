"""Plot a cost grid. matplotlib, an extra, is imported when one is drawn."""

from __future__ import annotations

import importlib.util
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from se_inject.atomic_files import atomic, check_writable
from se_inject.cost import FIGURES
from se_inject.errors import ExportError, OptionError
from se_inject.figures import figure_class

if TYPE_CHECKING:
    from se_inject.plans.grid import CostGrid

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | PathLike[str], *, force: bool = False) -> None:
    """Ask whether a picture may be written here, and can be drawn. Nothing is written.

    Raises:
        OptionError: a suffix of no picture.
        ExportError: the file can't be written, or there is no matplotlib.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise OptionError(f"can't draw to `{path}`", seen="its suffix", hint=f"one of {', '.join(SUFFIXES)}")
    check_writable(path, force)
    if importlib.util.find_spec("matplotlib") is None:
        raise ExportError(
            f"can't draw `{path}`", seen="matplotlib is not installed", hint="pip install 'se-inject[plot]'"
        )


def plot_grid(grid: CostGrid, path: str | PathLike[str], *, force: bool = False) -> None:
    """Draw what every choice of stages adds over the reduction ratio; bars for a block without one.

    Args:
        grid: from ``cost_grid``.
        path: ``.png``, ``.svg`` or ``.pdf``.
        force: whether it may replace a file that exists.

    Raises:
        OptionError: a suffix of no picture.
        ExportError: the file can't be written, or there is no matplotlib.
    """
    check_plot(path, force=force)
    figure = figure_class()(figsize=(10, 7), layout="constrained")
    figure.suptitle(f"What {grid.block} blocks add to {grid.model}, one example")
    for axes, (field, name) in zip(figure.subplots(2, 2).flat, FIGURES.items(), strict=True):
        _draw(axes, grid, field)
        axes.set_title(f"{name}, % of {getattr(grid.before, field):,}", fontsize="medium")
    figure.axes[0].legend(title="stages")
    with atomic(path, force) as temporary:
        figure.savefig(temporary, dpi=150)


def _draw(axes: Any, grid: CostGrid, field: str) -> None:
    """Draw one panel: a line for each choice of stages, or a bar."""
    whole = max(1, getattr(grid.before, field))
    for stages in grid.stages:
        shares = [100 * getattr(grid[stages, reduction].added, field) / whole for reduction in grid.reductions]
        if grid.reductions == (None,):
            axes.bar([stages], shares, label=stages)
        else:
            axes.plot(grid.reductions, shares, marker="o", label=stages)
    if grid.reductions != (None,):
        axes.set_xscale("log", base=2)
        axes.set_xticks(grid.reductions, [f"{reduction:g}" for reduction in grid.reductions], minor=False)
        axes.set_xlabel("reduction ratio r")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
