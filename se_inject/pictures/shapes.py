"""Write the shapes of a drawing as SVG, coloured by role for light and dark, its text as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from html import escape


@dataclass(frozen=True)
class Theme:
    """The colours of each role in one mode."""

    ground: str
    ink: str
    muted: str
    line: str
    unit: str
    edge: str
    plain: str
    band: str
    refused: str
    blocks: tuple[str, ...]
    on_block: str


LIGHT = Theme(
    ground="#ffffff",
    ink="#1b2128",
    muted="#57606a",
    line="#8b97a4",
    unit="#d8e2ee",
    edge="#7d92aa",
    plain="#eceff2",
    band="#f6f8fa",
    refused="#b3261e",
    blocks=("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#be185d", "#0f766e"),
    on_block="#ffffff",
)
DARK = Theme(
    ground="#0f141a",
    ink="#e8edf2",
    muted="#9fabb8",
    line="#6b7988",
    unit="#27384a",
    edge="#5b7590",
    plain="#20272f",
    band="#161d25",
    refused="#ff8a80",
    blocks=("#ff9d5c", "#8fb3ff", "#6fdc8c", "#d0a2ff", "#ff92c2", "#5fd8cb"),
    on_block="#10151b",
)
"""Text on each ground has a contrast of 4.5 or more, in both; the test counts it."""


@dataclass(frozen=True)
class Rect:
    """A rectangle with round corners; ``title`` is shown when the mouse is over it."""

    x: float
    y: float
    width: float
    height: float
    role: str
    radius: float = 3
    title: str = ""


@dataclass(frozen=True)
class Text:
    """A line of text; ``anchor`` is ``start``, ``middle`` or ``end``."""

    x: float
    y: float
    text: str
    role: str = "ink"
    size: float = 12
    anchor: str = "start"
    bold: bool = False
    title: str = ""


@dataclass(frozen=True)
class Path:
    """A line through points, with round corners; ``arrow`` puts a head at its end."""

    points: tuple[tuple[float, float], ...]
    role: str = "line"
    width: float = 1.5
    arrow: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Circle:
    """A circle."""

    x: float
    y: float
    radius: float
    role: str
    title: str = ""


Shape = Rect | Text | Path | Circle


@dataclass
class Drawing:
    """Shapes on a sheet, with a text for readers who don't see them."""

    title: str
    description: str
    width: float = 0
    height: float = 0
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Put shapes on the sheet, which grows to hold them."""
        for shape in shapes:
            self.shapes.append(shape)
            right, bottom = _extent(shape)
            self.width, self.height = max(self.width, right), max(self.height, bottom)

    def shifted(self, x: float, y: float) -> Iterator[Shape]:
        """Move the shapes by an offset."""
        for shape in self.shapes:
            yield moved(shape, x, y)


def moved(shape: Shape, x: float, y: float) -> Shape:
    """Move a shape by an offset."""
    if isinstance(shape, Path):
        return replace(shape, points=tuple((a + x, b + y) for a, b in shape.points))
    return replace(shape, x=shape.x + x, y=shape.y + y)


def text_width(text: str, size: float = 12, bold: bool = False) -> float:
    """Estimate the width of a text in a common sans-serif face; rather more than less."""
    narrow = sum(letter in "iljtfrI.,:;|'!()[] /" for letter in text)
    wide = sum(letter in "mwMW…%@" for letter in text)
    return size * (0.6 * (len(text) - narrow - wide) + 0.36 * narrow + 0.92 * wide) * (1.12 if bold else 1.0)


def _extent(shape: Shape) -> tuple[float, float]:
    if isinstance(shape, Rect):
        return shape.x + shape.width, shape.y + shape.height
    if isinstance(shape, Path):
        return max(x for x, _ in shape.points), max(y for _, y in shape.points)
    if isinstance(shape, Circle):
        return shape.x + shape.radius, shape.y + shape.radius
    width = text_width(shape.text, shape.size, shape.bold)
    return shape.x + {"start": width, "middle": width / 2, "end": 0.0}[shape.anchor], shape.y + 3


# -- SVG ---------------------------------------------------------------------------------------------------


def svg(drawing: Drawing, *, margin: float = 16, standalone: bool = True) -> str:
    """Write a drawing as SVG.

    Args:
        drawing: the shapes.
        margin: around them.
        standalone: with a ground of its own, and the size in pixels; else it takes the width of what it stands in.
    """
    width, height = round(drawing.width + 2 * margin), round(drawing.height + 2 * margin)
    size = f' width="{width}" height="{height}"' if standalone else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"{size} class="sei" role="img" '
        f'aria-label="{escape(drawing.title)}">',
        f"<title>{escape(drawing.title)}</title>",
        f"<desc>{escape(drawing.description)}</desc>",
        f"<style>{style()}</style>",
    ]
    if standalone:
        parts.append('<rect class="sei-ground" width="100%" height="100%"/>')
    parts.append(f'<g transform="translate({margin:g} {margin:g})">')
    parts += [_element(shape) for shape in drawing.shapes]
    parts += ["</g>", "</svg>"]
    return "\n".join(parts) + "\n"


def style() -> str:
    """Return the rules for all roles: light, and dark where the reader's system asks for it."""
    fixed = (
        ".sei text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
        ".sei .b{font-weight:600}.sei path{fill:none;stroke-linejoin:round;stroke-linecap:round}"
    )
    return fixed + _rules(LIGHT) + "@media (prefers-color-scheme:dark){" + _rules(DARK) + "}"


def _rules(theme: Theme) -> str:
    rules = [
        f".sei-ground{{fill:{theme.ground}}}",
        f".sei .ink{{fill:{theme.ink}}}.sei .muted{{fill:{theme.muted}}}.sei .on{{fill:{theme.on_block}}}",
        f".sei .refusedtext{{fill:{theme.refused}}}",
        f".sei .line{{stroke:{theme.line}}}.sei .dot{{fill:{theme.line}}}.sei .head{{fill:{theme.line}}}",
        f".sei .unit{{fill:{theme.unit};stroke:{theme.edge}}}",
        f".sei .plain{{fill:{theme.plain};stroke:{theme.line}}}",
        f".sei .band{{fill:{theme.band};stroke:none}}",
        f".sei .join{{fill:{theme.ground};stroke:{theme.line}}}",
        f".sei .refused{{fill:{theme.plain};stroke:{theme.refused};stroke-dasharray:3 2}}",
        f".sei .hatch{{stroke:{theme.refused};stroke-opacity:.55}}",
        f".sei .tick{{stroke:{theme.line}}}",
    ]
    for number, colour in enumerate(theme.blocks):
        rules.append(
            f".sei .b{number}{{fill:{colour}}}.sei .t{number}{{fill:{colour}}}.sei .l{number}{{stroke:{colour}}}"
        )
    rules += [f".sei .h{level}{{fill:{colour}}}" for level, colour in enumerate(heat(theme))]
    return "".join(rules)


LEVELS = 7


def heat(theme: Theme) -> Iterator[str]:
    """Make colours from that of the ground's lines to that of the first block: of a figure from 0 to its largest."""
    one, other = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (theme.plain, theme.blocks[0]))
    for level in range(LEVELS):
        part = level / (LEVELS - 1)
        yield "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(one, other, strict=True))


def _element(shape: Shape) -> str:
    if isinstance(shape, Rect):
        radius = f' rx="{shape.radius:g}"' if shape.radius else ""
        head = f'<rect class="{shape.role}" x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"{radius}'
        body = f"{head}>{_title(shape.title)}</rect>" if shape.title else f"{head}/>"
        return body + (_hatching(shape) if shape.role == "refused" else "")
    if isinstance(shape, Circle):
        head = f'<circle class="{shape.role}" cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}"'
        return f"{head}>{_title(shape.title)}</circle>" if shape.title else f"{head}/>"
    if isinstance(shape, Text):
        anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
        role = f"{shape.role} b" if shape.bold else shape.role
        where = f'<text class="{role}" x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}"{anchor}>'
        return where + escape(shape.text) + _title(shape.title) + "</text>"
    points = " ".join(f"{'ML'[number > 0]}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(shape.points))
    dashed = ' stroke-dasharray="3 3"' if shape.dashed else ""
    line = f'<path class="{shape.role}" d="{points}" stroke-width="{shape.width:g}"{dashed}/>'
    return line + (_arrow_head(shape) if shape.arrow else "")


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def hatch_lines(rect: Rect) -> Iterator[tuple[float, float, float, float]]:
    """Make slanted lines across a rectangle, within it."""
    step, reach = 5.0, rect.width + rect.height
    for start in (step * i for i in range(1, int(reach / step))):
        x1, y1 = (rect.x + start, rect.y) if start <= rect.width else (rect.x + rect.width, rect.y + start - rect.width)
        x2, y2 = (
            (rect.x, rect.y + start) if start <= rect.height else (rect.x + start - rect.height, rect.y + rect.height)
        )
        yield x1, y1, x2, y2


def _hatching(rect: Rect) -> str:
    lines = "".join(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" for x1, y1, x2, y2 in hatch_lines(rect))
    return f'<path class="hatch" d="{lines}" stroke-width="1" pointer-events="none"/>'


def arrow_points(path: Path) -> Iterable[tuple[float, float]]:
    """Return the three corners of an arrow's head."""
    (x1, y1), (x2, y2) = path.points[-2:]
    length = max(1e-6, ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5)
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    return (x2, y2), (x2 - 6 * dx - 3.4 * dy, y2 - 6 * dy + 3.4 * dx), (x2 - 6 * dx + 3.4 * dy, y2 - 6 * dy - 3.4 * dx)


def _arrow_head(path: Path) -> str:
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in arrow_points(path))
    return f'<polygon class="head" points="{corners}"/>'
