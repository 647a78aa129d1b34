"""Draw one kind of unit from the inside: its branches in a row, its blocks where they sit, the positions' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from se_inject.pictures.boxes import Kind, Mark
from se_inject.pictures.shapes import Circle, Drawing, Path, Rect, Text, text_width
from se_inject.sites import Operation
from se_inject.tables import counted

CHIP, SPACE, LANE = 24.0, 8.0, 38.0
POSITIONS = ("pre", "conv3x3", "standard", "identity", "post")


@dataclass
class _Lane:
    """A branch: what is to be drawn in a row, and where the positions of the paper are in it."""

    items: list[Operation | Mark] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    count: int = 1
    """The name of a position, and the number of the item before which it is."""


def draw_kinds(drawing: Drawing, kinds: Sequence[Kind], top: float) -> float:
    """Draw kinds of units below one another, two in a row where there is room; where they end."""
    half = (max(drawing.width, 1160) - 24) / 2
    column, height = 0.0, 0.0
    for kind in kinds:
        own = Drawing("", "")
        end = _draw_kind(own, kind)
        if column and own.width > half:
            top, column, height = top + height, 0.0, 0.0
        drawing.add(*own.shifted(column, top))
        height = max(height, end + 20)
        if column or own.width > half:
            top, column, height = top + height, 0.0, 0.0
        else:
            column = half + 24
    return top + height


def _draw_kind(drawing: Drawing, kind: Kind) -> float:
    """Draw one kind of unit with its heading; where it ends."""
    y = 12.0
    stages = sorted(kind.stages)
    where = f"stage{'s' * (len(stages) != 1)} {_numbers(stages)}" if stages else "outside of the stages"
    head = f"{kind.letter}   {len(kind.addresses)} × {kind.title}"
    drawing.add(Text(0, y, head, size=13, bold=True))
    names = [kind.addresses[0], *(["…"] if len(kind.addresses) > 2 else []), *kind.addresses[1:][-1:]]
    rest = f"{where}: {' '.join(names) if len(names) > 2 else ', '.join(names)}"
    drawing.add(Text(text_width(head, 13, True) + 12, y, rest, "muted", 11.5))
    lanes, after = _lanes(kind)
    lanes = _merged(lanes)
    is_residual = kind.example.site is not None and kind.example.site.kind == "residual"
    y += 50 if is_residual else 26
    used = {mark.step.position for mark in kind.example.marks}
    return _draw(drawing, lanes, after, kind.parts.join, y, used, is_residual)


def _numbers(stages: list[int]) -> str:
    """Format numbers: ``1–4, 6``."""
    runs: list[list[int]] = []
    for number in stages:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _lanes(kind: Kind) -> tuple[list[_Lane], _Lane]:
    """Arrange the branches and the operations behind the join, with the blocks among them."""
    marks = list(kind.example.marks)
    lanes = [_lane(operations, marks) for operations in kind.parts.lanes]
    after = _lane(kind.parts.after, marks)
    site = kind.example.site
    for mark in marks:  # those whose value was not met: at the place that their position has
        target, first = lanes[0], False
        if mark.step.position == "pre":
            first = True
        elif mark.step.position == "identity" and len(lanes) > 1:
            target = lanes[1]
        elif mark.step.position == "post" or (kind.parts.join and site is not None and site.kind != "residual"):
            target, first = after, mark.step.position != "post"
        target.items.insert(0 if first else len(target.items), mark)
    if site is not None and site.kind == "residual":
        lanes[0].places = {"pre": 0, "standard": len(lanes[0].items)}
        marked = [
            i for i, item in enumerate(lanes[0].items) if isinstance(item, Mark) and item.step.position == "standard"
        ]
        if marked:
            lanes[0].places["standard"] = marked[-1] + 1
        if (spatial := _behind_spatial(lanes[0].items)) is not None:
            lanes[0].places["conv3x3"] = spatial
        if kind.parts.join is not None:
            after.places = {"post": len(after.items)}
        if len(lanes) > 1:
            lanes[1].places = {"identity": len(lanes[1].items)}
    return lanes, after


def _lane(operations: tuple[Operation, ...], marks: list[Mark]) -> _Lane:
    """Put each block behind the operation whose value it gates; blocks that found their place leave the list."""
    lane = _Lane()
    for operation in operations:
        if operation.kind not in ("end", "block"):
            lane.items.append(operation)
        for mark in list(marks):
            step = mark.step
            if operation.kind == "block":
                if operation.path == step.path:
                    lane.items.append(mark)
                    marks.remove(mark)
                continue
            at = (operation.owner, operation.label) == (step.owner, step.value)
            ends = operation.kind == "end" and step.value is None and operation.path == step.owner
            if (at or ends) and step.readers is None:
                lane.items.append(mark)
                marks.remove(mark)
    return lane


def _merged(lanes: list[_Lane]) -> list[_Lane]:
    """Merge equal branches to one with their number."""
    merged: list[_Lane] = []
    for lane in lanes:
        last = merged[-1] if merged else None
        texts = [item.text if isinstance(item, Operation) else item for item in lane.items]
        if last is not None and lane.items and texts == [i.text if isinstance(i, Operation) else i for i in last.items]:
            last.count += 1
        else:
            merged.append(lane)
    return merged


def _behind_spatial(items: list[Operation | Mark]) -> int | None:
    """Return the number of the item behind the last spatial convolution, its norm and its activation."""
    for number in range(len(items) - 1, -1, -1):
        item = items[number]
        if (
            isinstance(item, Operation)
            and item.kind == "conv"
            and any(f"{k}×" in item.text or f"k{k}" in item.text for k in "23456789")
        ):
            end = number + 1
            while end < len(items) and isinstance(each := items[end], Operation) and each.kind in ("norm", "act"):
                end += 1
            return end
    return None


def _draw(
    drawing: Drawing,
    lanes: list[_Lane],
    after: _Lane,
    join: str | None,
    y: float,
    used: set[str],
    is_residual: bool,
) -> float:
    start, indent = 16.0, 34.0
    shown = lanes[:5]
    ends = [_lane_end(lane, indent) for lane in shown]
    meet = max(ends) + 14 + 22 * any(lane.count > 1 for lane in shown)
    middle = y + (0 if is_residual else LANE * (len(shown) - 1) / 2)
    drawing.add(Circle(start - 8, middle, 4, "dot"))
    for number, lane in enumerate(shown):
        line = y + LANE * number
        points = ((start - 4, middle), (start + 8, middle), (start + 8, line), (meet, line))
        drawing.add(Path(points if line != middle else (points[0], points[-1])))
        _draw_lane(drawing, lane, indent, line, used, above=number == 0)
        if lane.count > 1:
            drawing.add(Text(_lane_end(lane, indent), line - 5, f"×{lane.count}", "ink", 12, bold=True))
        if join and line != middle:
            drawing.add(Path(((meet, line), (meet, middle + (10 if line > middle else -10)))))
    if len(lanes) > len(shown):
        drawing.add(
            Text(
                indent,
                y + LANE * len(shown) - 12,
                f"and {counted(len(lanes) - len(shown), 'branch')[:-1]}es more",
                "muted",
                11,
            )
        )
    x = meet
    if join:
        drawing.add(Circle(meet, middle, 10, "join"))
        drawing.add(
            Text(
                meet,
                middle + 4.5,
                "+" if join == "add" else "‖",
                "ink",
                14,
                "middle",
                True,
                "addition" if join == "add" else "concatenation",
            )
        )
        x = meet + 10
    end = _lane_end(after, x + SPACE) if after.items else x
    drawing.add(Path(((x, middle), (end + 24, middle)), arrow=True))
    _draw_lane(drawing, after, x + SPACE, middle, used, above=True)
    return (
        y
        + LANE * (len(shown) - 1 + (len(lanes) > len(shown)))
        + CHIP / 2
        + (18 if len(shown) > 1 and is_residual else 6)
    )


def _item_width(item: Operation | Mark) -> float:
    if isinstance(item, Mark):
        return text_width(_mark_text(item), 12, True) + 16
    return text_width(item.text, 11.5) + 14


def _mark_text(mark: Mark) -> str:
    options = mark.step.options
    if options.get("width") is not None:
        return f"{mark.name} w = {options['width']}"
    ratio = options.get("reduction", 16 if mark.step.block == "se" else None)
    return f"{mark.name} r = {ratio:g}" if ratio is not None else mark.name


def _lane_end(lane: _Lane, x: float) -> float:
    return x + sum(_item_width(item) + SPACE for item in lane.items)


def _draw_lane(drawing: Drawing, lane: _Lane, x: float, y: float, used: set[str], *, above: bool) -> None:
    edges = []
    for item in lane.items:
        edges.append(x - SPACE / 2)
        width = _item_width(item)
        if isinstance(item, Mark):
            title = f"{item.step.path}: {item.name} at {item.step.channels} channels" + (
                f", {item.tooltip}" if item.tooltip else ""
            )
            drawing.add(Rect(x, y - CHIP / 2 - 1, width, CHIP + 2, f"b{item.colour % 6}", 5, title))
            drawing.add(Text(x + width / 2, y + 4.5, _mark_text(item), "on", 12, "middle", True))
        else:
            role = "unit" if item.kind in ("conv", "module") else "plain"
            radius = 12 if item.kind == "act" else 4
            drawing.add(Rect(x, y - CHIP / 2, width, CHIP, role, radius, item.path))
            drawing.add(Text(x + width / 2, y + 4, item.text, "ink", 11.5, "middle"))
        x += width + SPACE
    edges.append(x - SPACE / 2)
    _draw_places(drawing, lane, edges, y, used, above)


def _draw_places(drawing: Drawing, lane: _Lane, edges: list[float], y: float, used: set[str], above: bool) -> None:
    """Draw ticks with the names of the positions; a name that would overlap its neighbour's is put higher."""
    reach = -1000.0
    for name, number in sorted(lane.places.items(), key=lambda item: item[1]):
        at, is_used = edges[min(number, len(edges) - 1)], name in used
        if not lane.items and name == "identity":
            at += 40
        elif name == "standard" and is_used:
            at = (edges[number] + edges[max(0, number - 1)]) / 2
        width = text_width(name, 10.5, is_used)
        raised = 13 if at - width / 2 < reach + 4 else 0
        reach = at + width / 2 if not raised else reach
        direction = -1 if above else 1
        near = y + direction * (CHIP / 2 + 2)
        far = near + direction * (6 + raised)
        drawing.add(Path(((at, near), (at, far)), "tick", 1.2))
        text = far - 3 if above else far + 10
        drawing.add(Text(at, text, name, "ink" if is_used else "muted", 10.5, "middle", is_used))
