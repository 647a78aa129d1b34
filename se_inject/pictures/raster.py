"""Render a drawing as pixels. matplotlib, an extra, is imported when one is made."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

from se_inject.figures import figure_class
from se_inject.pictures.shapes import (
    LIGHT,
    Circle,
    Drawing,
    Path,
    Rect,
    Shape,
    Text,
    Theme,
    arrow_points,
    hatch_lines,
    heat,
)


def write_png(drawing: Drawing, path: FilePath, *, scale: float = 2.0, margin: float = 16) -> None:
    """Write a drawing, in the light colours, as PNG.

    Args:
        drawing: the shapes.
        path: the file.
        scale: pixels for each unit of the drawing.
        margin: around it, in units of the drawing.
    """
    width, height = drawing.width + 2 * margin, drawing.height + 2 * margin
    figure = figure_class()(figsize=(width / 72, height / 72), facecolor=LIGHT.ground)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-margin, width - margin)
    axes.set_ylim(height - margin, -margin)
    for order, shape in enumerate(drawing.shapes):
        _put(axes, shape, order)
    figure.savefig(path, dpi=72 * scale, format="png")


def _fill(role: str, theme: Theme = LIGHT) -> tuple[str, str | None]:
    """Fill and edge of a role."""
    plain: dict[str, tuple[str, str | None]] = {
        "unit": (theme.unit, theme.edge),
        "plain": (theme.plain, theme.line),
        "band": (theme.band, None),
        "join": (theme.ground, theme.line),
        "refused": (theme.plain, theme.refused),
        "dot": (theme.line, None),
        "ink": (theme.ink, None),
        "muted": (theme.muted, None),
        "on": (theme.on_block, None),
        "refusedtext": (theme.refused, None),
    }
    if role in plain:
        return plain[role]
    number = int(role[1:])
    return (list(heat(theme))[number] if role[0] == "h" else theme.blocks[number]), None


def _put(axes: Any, shape: Shape, order: int) -> None:
    from matplotlib.patches import Circle as Disc
    from matplotlib.patches import FancyBboxPatch, Polygon

    common = {"zorder": order, "clip_on": False}
    if isinstance(shape, Rect):
        if not shape.width:
            return
        face, edge = _fill(shape.role)
        radius = min(shape.radius, shape.width / 2, shape.height / 2)
        style = f"round,pad=0,rounding_size={radius}"
        axes.add_patch(
            FancyBboxPatch(
                (shape.x, shape.y), shape.width, shape.height, boxstyle=style, facecolor=face,
                edgecolor=edge or "none", linewidth=1 if edge else 0, linestyle="--" if shape.role == "refused" else "-", **common,
            )
        )  # fmt: skip
        if shape.role == "refused":
            for x1, y1, x2, y2 in hatch_lines(shape):
                axes.plot([x1, x2], [y1, y2], color=LIGHT.refused, alpha=0.55, linewidth=1, **common)
    elif isinstance(shape, Circle):
        face, edge = _fill(shape.role)
        axes.add_patch(Disc((shape.x, shape.y), shape.radius, facecolor=face, edgecolor=edge or "none", **common))
    elif isinstance(shape, Text):
        where = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
        weight = "bold" if shape.bold else "normal"
        axes.text(
            shape.x, shape.y, shape.text, color=_fill(shape.role)[0], fontsize=shape.size * 0.93, ha=where, va="baseline",
            fontweight=weight, parse_math=False, **common,
        )  # fmt: skip
    elif isinstance(shape, Path):
        xs, ys = zip(*shape.points, strict=True)
        dashes = (0, (3, 3)) if shape.dashed else "-"
        axes.plot(xs, ys, color=LIGHT.line, linewidth=shape.width, linestyle=dashes, solid_joinstyle="round", **common)
        if shape.arrow:
            axes.add_patch(
                Polygon(list(arrow_points(shape)), closed=True, facecolor=LIGHT.line, edgecolor="none", **common)
            )
