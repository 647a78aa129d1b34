"""Plot gates by class in the style of the paper's Figure 6. matplotlib, an extra, is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from se_inject.atomic_files import atomic
from se_inject.errors import OptionError
from se_inject.figures import figure_class
from se_inject.plans import check_plot

if TYPE_CHECKING:
    from se_inject.gates.statistics import BlockGates, Excitations

PANELS, LINES, CHANNELS = 16, 5, 50
"""The most panels and classes that a picture shows, and the channels of each block: so many did the paper draw."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # distinguishable to the colour-blind (Okabe, Ito)


def plot_gates(
    found: Excitations,
    path: str | PathLike[str],
    *,
    blocks: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    force: bool = False,
) -> None:
    """Draw a panel for each block: the mean gate of its channels over all images, and over those of some classes.

    Of wide blocks, 50 channels are drawn, evenly spaced, as the paper did.

    Args:
        found: from ``excitations``.
        path: ``.png``, ``.svg`` or ``.pdf``.
        blocks: paths of those to draw; None: all, or 16 evenly spaced ones, the last always among them.
        classes: names of those to draw; None: the five with the most examples. Without labels a band of ± one standard
            deviation is drawn.
        force: whether it may replace a file that exists.

    Raises:
        OptionError: a suffix of no picture, or no such block or class.
        ExportError: the file can't be written, or there is no matplotlib.
    """
    check_plot(path, force=force)
    panels = _panels(found, blocks)
    lines = _lines(found, classes)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = figure_class()(figsize=(3.4 * columns + 0.6, 2.5 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for number, place in enumerate(axes.flat):
        if number < len(panels):
            _draw(place, panels[number], lines)
            place.set_ylabel("gate" if number % columns == 0 else "")
        else:
            place.set_axis_off()
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    with atomic(path, force) as temporary:
        figure.savefig(temporary, dpi=150)


def _panels(found: Excitations, names: Sequence[str] | None) -> list[BlockGates]:
    if names is not None:
        known = {block.name: block for block in found.blocks}
        if missing := [name for name in names if name not in known]:
            raise OptionError(f"no block `{missing[0]}`", seen=", ".join(known))
        return [known[name] for name in names]
    last = len(found.blocks) - 1
    count = min(PANELS, len(found.blocks))
    return [found.blocks[round(i * last / max(1, count - 1))] for i in range(count)]


def _lines(found: Excitations, names: Sequence[str] | None) -> list[tuple[str, int]]:
    if not any(block.class_mean is not None for block in found.blocks):
        return []
    if names is not None:
        if missing := [name for name in names if name not in found.classes]:
            raise OptionError(f"no class `{missing[0]}`", seen=", ".join(found.classes[:20]))
        return [(name, found.classes.index(name)) for name in names]
    by_count = sorted(range(len(found.classes)), key=lambda number: -found.class_counts[number])[:LINES]
    return [(found.classes[number], number) for number in sorted(by_count) if found.class_counts[number]]


def _draw(axes: Any, block: BlockGates, lines: Sequence[tuple[str, int]]) -> None:
    count = min(CHANNELS, block.channels)
    chosen = [round(i * (block.channels - 1) / max(1, count - 1)) for i in range(count)]
    mean, std = block.mean[chosen].numpy(), block.std[chosen].numpy()
    for (name, number), colour in zip(lines, _COLOURS * len(lines), strict=False):
        if block.class_mean is not None:
            axes.plot(chosen, block.class_mean[number][chosen].numpy(), color=colour, linewidth=1.1, label=name)
    axes.plot(chosen, mean, color="black", linewidth=1.4, linestyle=(0, (4, 2)), label="all images")
    if not lines:
        axes.fill_between(chosen, mean - std, mean + std, color=_COLOURS[0], alpha=0.3, label="± standard deviation")
    stage = "" if block.stage is None else f"stage {block.stage}: "
    axes.set_title(f"{stage}{block.name}", fontsize="medium")
    axes.set_xlabel("channel", fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.25)
    if block.ends is not None and block.ends[1] < float("inf"):
        axes.set_ylim(block.ends[0] - 0.02, block.ends[1] + 0.02)
