"""Lay out the picture of a network: above, all of it as data flows through it; below, every kind of unit from the inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from se_inject.pictures.boxes import Box, Group, Mark, Scene, block_name, colour_of
from se_inject.pictures.scene import scene
from se_inject.pictures.shapes import LEVELS, Drawing, Path, Rect, Shape, Text, moved, text_width
from se_inject.pictures.units import draw_kinds
from se_inject.sites import Sites
from se_inject.surgery import Step
from se_inject.tables import counted
from se_inject.tracing import Trace, describe

SHEET = 1160
_WIDEST = 1480
_NARROWEST = 560
"""How wide the picture is, and can be; longer networks are folded, then broken into rows."""
_TALLEST, _LOWEST, _GAP, _HEAD = 110.0, 22.0, 16.0, 68.0
_MOST_KINDS = 12


def draw_network(
    trace: Trace,
    sites: Sites,
    steps: Sequence[Step],
    *,
    figures: Mapping[str, float] | None = None,
    figure: str = "",
) -> Drawing:
    """Draw a network with blocks in it.

    Args:
        trace: an observed call.
        sites: its sites.
        steps: the blocks.
        figures: of blocks, by path: a figure that colours them, from 0 up.
        figure: what that is called, for the legend.
    """
    found = scene(trace, sites, steps, figures or {}, figure)
    drawing = Drawing(f"{found.model} with {_blocks(found) or 'no block'}", description(found, trace))
    drawing.add(Text(0, 18, found.model, size=20, bold=True))
    heading = [_blocks(found) or "no block in it", describe(*trace.inputs)]
    drawing.add(Text(1.06 * text_width(found.model, 20, True) + 14, 18, " · ".join(heading), "muted", 13))
    bottom = _draw_rows(drawing, found, 34.0)
    bottom = _draw_legend(drawing, found, bottom + 26)
    if found.kinds:
        drawing.add(Text(0, bottom + 34, "Inside the units", size=15, bold=True))
        legend = "ticks: candidate positions of a block; bold = used"
        drawing.add(Text(text_width("Inside the units", 15, True) + 14, bottom + 34, legend, "muted", 11.5))
        bottom += 46
    bottom = draw_kinds(drawing, found.kinds[:_MOST_KINDS], bottom + 12)
    if len(found.kinds) > _MOST_KINDS:
        rest = found.kinds[_MOST_KINDS:]
        more = f"and {counted(len(rest), 'other kind')} of unit, {sum(len(kind.addresses) for kind in rest)} units"
        drawing.add(Text(0, bottom + 20, more, "muted"))
        bottom += 26
    for number, box in enumerate(found.refused[:6]):
        drawing.add(
            Rect(0, bottom + 12 + 20 * number, 14, 12, "refused"),
            Text(22, bottom + 22 + 20 * number, box.tooltip, "muted", 11),
        )
    drawing.width = max(drawing.width, _NARROWEST)
    return drawing


def _blocks(found: Scene) -> str:
    return ", ".join(counted(count, f"{block_name(name)} block") for name, count in found.counts.items())


def description(found: Scene, trace: Trace) -> str:
    """Describe the picture in words, for those who don't see it."""
    parts = [f"{found.model} for {describe(*trace.inputs)}, with {_blocks(found) or 'no block'}."]
    for group in found.groups:
        units = [box for box in group.boxes if box.kind == "unit"]
        if group.stage is not None and units:
            marks = sum(len(box.marks) for box in units)
            parts.append(
                f"{group.title} ({', '.join(filter(None, group.lines))}): {counted(len(units), 'unit')}, {counted(marks, 'block')}."
            )
    refused = sum(box.kind == "refused" for group in found.groups for box in group.boxes) + len(found.refused)
    if refused:
        parts.append(f"{counted(refused, 'place')} refused.")
    return " ".join(parts)


# -- the whole network -------------------------------------------------------------------------------------


def _draw_rows(drawing: Drawing, found: Scene, top: float) -> float:
    """Draw groups side by side, in as many rows as it takes; return where the last row ends."""
    largest = max((math.prod(box.size) for group in found.groups for box in group.boxes if box.size), default=1)
    widest = max((box.channels for group in found.groups for box in group.boxes), default=1)
    scale = _Scale(max(1, largest), max(1, widest))
    groups = found.groups
    sheet = max(SHEET, min(_WIDEST, sum(_width(group, scale) + 16 for group in groups)))
    if sum(_width(group, scale) + 16 for group in groups) > sheet:
        groups = [Group(g.title, g.lines, _folded(g), g.stage, g.is_neck) for g in groups]
    rows: list[list[Group]] = [[]]
    used = 0.0
    for group in groups:
        width = _width(group, scale) + 16
        if rows[-1] and used + width > sheet:
            rows.append([])
            used = 0.0
        rows[-1].append(group)
        used += width
    for number, row in enumerate(rows):
        height = max(_height(group, scale) for group in row)
        _draw_row(drawing, row, scale, top + _HEAD, height, first=number == 0, last=number == len(rows) - 1)
        top += _HEAD + height + 44
    return top - 26


class _Scale:
    """Heights by resolution, widths by channels: areas go with the numbers, so their roots are drawn."""

    def __init__(self, largest: int, widest: int) -> None:
        self.largest, self.widest = largest, widest

    def height(self, box: Box) -> float:
        if not box.size:
            return _LOWEST
        return max(_LOWEST, _TALLEST * math.pow(math.prod(box.size) / self.largest, 0.3))

    def width(self, box: Box) -> float:
        own = 13 + 33 * math.sqrt(box.channels / self.widest)
        return max(own, 14 + 8 * len(_inner(box)))


def _inner(box: Box) -> list[Mark]:
    return [mark for mark in box.marks if mark.step.position not in ("post", "identity")]


def _folded(group: Group) -> list[Box]:
    """Replace each run of more than three equal boxes by one that represents them all."""
    runs: list[list[Box]] = []
    for box in group.boxes:
        if runs and _looks(runs[-1][-1]) == _looks(box):
            runs[-1].append(box)
        else:
            runs.append([box])
    result: list[Box] = []
    for run in runs:
        tooltip = f"{run[0].tooltip} … {run[-1].tooltip}"
        result += [replace(run[0], count=len(run), tooltip=tooltip)] if len(run) > 3 else run
    if len(result) <= 24:
        return result
    half, rest = result[:12], result[12:-6]
    return [*half, replace(rest[0], count=sum(box.count for box in rest), letter="…"), *result[-6:]]


def _looks(box: Box) -> tuple[object, ...]:
    return box.kind, box.channels, box.size, box.letter, tuple((m.colour, m.step.position, m.level) for m in box.marks)


def _lane_width(boxes: Sequence[Box], scale: _Scale) -> float:
    return sum(scale.width(box) + _GAP + 8 * (box.count > 1) for box in boxes) + _GAP


def _width(group: Group, scale: _Scale) -> float:
    own = max(_lane_width(lane, scale) for lane in group.lanes)
    if group.stage is None and not _is_named(group):
        return own
    lines = [text_width(_heading(group), 13, True), *(text_width(line, 11) for line in _lines(group))]
    return max(own + 6, *(line + 26 for line in lines))


def _heading(group: Group) -> str:
    return group.title + (" · neck" if group.is_neck else "")


def _is_named(group: Group) -> bool:
    return group.stage is not None or any(box.kind == "plain" for box in group.boxes)


def _lines(group: Group) -> list[str]:
    if group.stage is not None:
        return [line if len(line) < 40 else line[:18] + "…" + line[-18:] for line in group.lines]
    words = [word for box in group.boxes for word in box.words]
    short = list(dict.fromkeys(words))
    if len(short) > 3:
        short = [short[0], f"… {len(words) - 2} more", short[-1]]
    return short


def _height(group: Group, scale: _Scale) -> float:
    lanes = group.lanes
    return sum(max(scale.height(box) for box in lane) + 26 for lane in lanes)


def _draw_row(
    drawing: Drawing, row: Sequence[Group], scale: _Scale, top: float, height: float, *, first: bool, last: bool
) -> None:
    middle = top + height / 2
    x = 0.0
    shapes: list[Shape] = []
    behind: list[Shape] = []
    gaps: list[float] = []  # where the line makes room for parallel branches
    for group in row:
        width = _width(group, scale)
        if len(group.lanes) > 1:
            gaps += [x + 6, x + width - 6]
        if group.stage is not None:
            behind.append(Rect(x, top - _HEAD + 2, width, height + _HEAD + 16, "band", 8))
            role = "muted" if group.is_neck else "ink"
            shapes.append(Text(x + 10, top - _HEAD + 20, _heading(group), role, 13, bold=True))
            shapes += [
                Text(x + 10, top - _HEAD + 35 + 14 * i, line, "muted", 11) for i, line in enumerate(_lines(group))
            ]
        elif _is_named(group) and (group is row[0] or group is row[-1] or width > 60):
            shapes += [
                Text(x + width / 2, top - _HEAD + 35 + 14 * i, line, "muted", 11, "middle")
                for i, line in enumerate(_lines(group))
            ]
        _draw_group(shapes, group, scale, x, width, top, height)
        x += width + 16
    end = x - 16 + (14 if last else 10)
    stops = [-2.0 if first else -10.0, *gaps, end]
    flow = [
        Path(((a, middle), (b, middle)), "line", 1.5, arrow=b == end)
        for a, b in zip(stops[::2], stops[1::2], strict=True)
    ]
    drawing.add(*behind, *flow, *shapes)


def _draw_group(
    shapes: list[Shape], group: Group, scale: _Scale, x: float, width: float, top: float, height: float
) -> None:
    lanes = group.lanes
    own = sum(max(scale.height(box) for box in lane) + 26 for lane in lanes)
    y = top + (height - own) / 2
    middles: list[float] = []
    for lane in lanes:
        tall = max(scale.height(box) for box in lane) + 26
        middle = y + tall / 2
        start = x + (width - _lane_width(lane, scale)) / 2 + _GAP
        middles.append(middle)
        if len(lanes) > 1:
            shapes.append(Path(((x + 6, middle), (x + width - 6, middle)), "line", 1.2))
        for box in lane:
            shapes += _box(box, scale, start, middle)
            start += scale.width(box) + _GAP + 8 * (box.count > 1)
        y += tall
    if len(lanes) > 1:
        shapes += [Path(((at, middles[0]), (at, middles[-1])), "line", 1.2) for at in (x + 6, x + width - 6)]


def _box(box: Box, scale: _Scale, x: float, middle: float) -> list[Shape]:
    width, height = scale.width(box), scale.height(box)
    top = middle - height / 2
    shapes: list[Shape] = []
    if box.count > 1:
        shapes += [Rect(x + 3 * i, top - 3 * i, width, height, box.kind, title=box.tooltip) for i in (2, 1)]
    shapes.append(Rect(x, top, width, height, box.kind, title=box.tooltip))
    if has_shortcut(box):
        left, right, above = x - 4, x + width + 4, top - 6 - 6 * (box.count > 1)
        shapes.append(Path(((left, middle), (left, above), (right, above), (right, middle)), "line", 1.0))
    shapes += _marks(box, x, top, width, height, middle)
    if box.count > 1:
        shapes.append(Text(x + width / 2 + 3, top + height + 14, f"×{box.count}", "ink", 11, "middle", True))
    elif box.letter:
        shapes.append(Text(x + width / 2, top + height + 13, box.letter, "muted", 10, "middle"))
    return shapes


def has_shortcut(box: Box) -> bool:
    """Return whether a unit adds a shortcut."""
    return box.site is not None and box.site.kind == "residual" and box.site.join is not None


def _marks(box: Box, x: float, top: float, width: float, height: float, middle: float) -> list[Shape]:
    """Draw the blocks at their positions: behind the norm, at the branch's start, after the addition, or on the shortcut."""
    shapes: list[Shape] = []
    at = {"standard": 0, "pre": 0, "conv3x3": 0, "post": 0, "identity": 0}
    for mark in box.marks:
        place, role = mark.step.position, colour_of(mark, "b")
        number = at[place] = at.get(place, 0) + 1
        title = f"{mark.step.path}: {mark.name}" + (f", {mark.tooltip}" if mark.tooltip else "")
        if place == "identity":
            shapes.append(Rect(x + width / 2 - 6, top - 9, 12, 6, role, 2, title))
            continue
        left = {
            "standard": x + width - 8 * number,
            "pre": x + 2 + 8 * (number - 1),
            "conv3x3": x + width / 2 - 3 + 8 * (number - 1),
            "post": x + width + 4 + 7 * (number - 1),
        }.get(place, x + width - 8 * number)
        tall = height - 4 if place != "post" else height * 0.6
        shapes.append(Rect(left, middle - tall / 2, 6, tall, role, 2, title))
    return shapes


def _draw_legend(drawing: Drawing, found: Scene, y: float) -> float:
    x = 0.0
    entries: list[tuple[Shape | None, str]] = []
    if not found.figure:
        entries += [(Rect(0, 0, 6, 14, f"b{number % 6}", 2), block_name(name)) for name, number in found.blocks.items()]
    boxes = [box for group in found.groups for box in group.boxes]
    entries.append((Rect(0, 0, 14, 14, "unit"), "unit: height by resolution, width by channels"))
    if any(map(has_shortcut, boxes)):
        entries.append((None, "shortcut"))
    if any(box.kind == "plain" for box in boxes):
        entries.append((Rect(0, 0, 14, 14, "plain"), "not part of a unit"))
    if any(box.kind == "refused" for box in boxes) or found.refused:
        entries.append((Rect(0, 0, 14, 14, "refused"), "refused; the mouse shows why"))
    if found.figure:
        drawing.add(*(Rect(x + 12 * i, y - 11, 12, 14, f"h{i}", 0) for i in range(LEVELS)))
        text = f"{found.figure}, from 0 to the largest"
        drawing.add(Text(x + 12 * LEVELS + 8, y, text, "muted", 11.5))
        x += 12 * LEVELS + 8 + text_width(text, 11.5) + 22
    for shape, text in entries:
        width = 22.0
        if shape is None:
            drawing.add(Path(((x, y), (x, y - 9), (x + 16, y - 9), (x + 16, y)), "line", 1.0))
        elif isinstance(shape, Rect):
            drawing.add(moved(shape, x, y - 11))
            width = shape.width + 8
        drawing.add(Text(x + width, y, text, "muted", 11.5))
        x += width + text_width(text, 11.5) + 22
    return y + 4
