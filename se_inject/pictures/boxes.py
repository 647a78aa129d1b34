"""The parts of a picture as values: boxes in groups, the blocks in them, and units that are alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from se_inject.pictures.shapes import LEVELS
from se_inject.sites import Parts, Site
from se_inject.surgery import Step


@dataclass(frozen=True)
class Mark:
    """A block to be drawn.

    Args:
        step: what is put where.
        colour: the number of its kind's colour.
        level: of a figure that colours it instead, from 0 to 1; None: by kind.
        tooltip: the figure in words.
    """

    step: Step
    colour: int
    level: float | None = None
    tooltip: str = ""

    @property
    def name(self) -> str:
        """``SE``, or the block's name as it is."""
        return block_name(self.step.block)


@dataclass(frozen=True)
class Box:
    """One unit, or something that is none, or a place that was refused.

    Args:
        kind: ``unit``, ``plain`` or ``refused``.
        time: when data reached it.
        address: of the site, the refusal, or the first module.
        channels: of its value; 0 if unknown.
        size: its spatial size.
        site: the unit's site.
        marks: its blocks.
        tooltip: what the mouse shows.
        words: for plain ones, the operations in it.
        count: how many equal ones it stands for.
    """

    kind: str
    time: float
    address: str
    channels: int
    size: tuple[int, ...]
    site: Site | None = None
    marks: tuple[Mark, ...] = ()
    tooltip: str = ""
    words: tuple[str, ...] = ()
    count: int = 1
    letter: str = ""


@dataclass
class Group:
    """A stage, or what lies between two: its boxes in lanes, one for each resolution of parallel branches."""

    title: str
    lines: list[str]
    boxes: list[Box]
    stage: int | None = None
    is_neck: bool = False

    @property
    def lanes(self) -> list[list[Box]]:
        """The boxes of each resolution, the finest first, if they come in parallel; else all in one."""
        sizes = list(dict.fromkeys(box.size for box in self.boxes if box.kind == "unit"))
        if self.stage is None or len(sizes) < 2:
            return [self.boxes]
        sizes.sort(key=math.prod, reverse=True)
        return [[box for box in self.boxes if box.size == size and box.kind == "unit"] for size in sizes]


@dataclass
class Kind:
    """Units that are made alike: a letter, an example taken apart, and all of them."""

    letter: str
    parts: Parts
    example: Box
    title: str
    addresses: list[str] = field(default_factory=list)
    stages: set[int] = field(default_factory=set)


@dataclass
class Scene:
    """All that a picture of a network shows."""

    model: str
    groups: list[Group]
    kinds: list[Kind]
    blocks: dict[str, int]
    refused: list[Box]
    counts: dict[str, int]
    figure: str = ""


def block_name(name: str) -> str:
    """Return a block's name, ``SE``; for one out of a user's file the name of its class."""
    return (
        name.upper()
        if name in ("se", "eca", "ese", "cbam", "bam", "gc", "gct", "ge", "fca", "srm")
        else name.rpartition(":")[2]
    )


def colour_of(mark: Mark, prefix: str) -> str:
    """Return the role of a block's colour: of its kind, or of the figure that colours it."""
    if mark.level is None:
        return f"{prefix}{mark.colour % 6}"
    return f"h{round(mark.level * (LEVELS - 1))}"
