"""Sites, refusals and stages as values, and the reasons why a site is left out by default."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class HeldBack(enum.Enum):
    """Why a site is left out unless it is asked for: the value for machines, ``reason`` for people."""

    ATTENTION = "attention"
    INJECTED = "injected"
    OUTSIDE = "outside"
    NESTED = "nested"
    HEAD = "head"
    DENSE = "dense"
    NECK = "neck"
    OUTPUT = "output"

    @property
    def reason(self) -> str:
        """The reason as part of a sentence."""
        return _REASONS[self]

    @property
    def is_stageless(self) -> bool:
        """Whether such a site lies outside of the stages: it is chosen by its address alone."""
        return self in _STAGELESS


ATTENTION = "its branch is attention between positions, which is left alone"
"""Why a unit of attention is refused."""
_REASONS = {
    HeldBack.ATTENTION: "already has attention",
    HeldBack.INJECTED: "holds a block of ours",
    HeldBack.OUTSIDE: "a plain convolution outside of the units",
    HeldBack.NESTED: "it is made of units that have sites of their own",
    HeldBack.HEAD: "a convolution without activation: a projection or a head",
    HeldBack.DENSE: "a layer of a dense block, which has a site as a whole",
    HeldBack.NECK: "a neck or head, behind the backbone",
    HeldBack.OUTPUT: "the network's own output of few channels: scores, boxes or an image",
}
_STAGELESS = frozenset({HeldBack.OUTSIDE, HeldBack.NESTED, HeldBack.HEAD, HeldBack.DENSE, HeldBack.OUTPUT})


@dataclass(frozen=True)
class Site:
    """One value in an owner's graph that a block can gate.

    Args:
        address: dotted path for people, the value's name last: ``layer3.0.bn3``.
        owner: path of the module whose forward is edited.
        value: label of the value in the owner's graph; None: what the owner returns.
        kind: ``residual``, ``concat``, ``sum`` or ``conv``.
        channels: C of the value, from the observed call.
        size: its spatial size, one number for each dimension.
        stride: of its positions from the network's input, one number for each dimension.
        order: when the value came to be in the observed call.
        container: path of the module that holds the unit and its siblings.
        unit: path of the module that makes up the unit (a block).
        stage: 1, 2, …; None if the site lies outside of the stages.
        held_back: why the site is left out unless it is asked for; None if it is not.
        block_name: the attribute its block gets on the owner.
        blocks: paths of blocks of ours that gate this value already.
        graph: path of the module in whose forward the site was found.
        join: label, in that forward, of the addition or concatenation the site belongs to; None if there is none.
    """

    address: str
    owner: str
    value: str | None
    kind: str
    channels: int
    size: tuple[int, ...]
    stride: tuple[float, ...]
    order: int
    container: str
    unit: str
    stage: int | None = None
    held_back: HeldBack | None = None
    block_name: str = "se"
    blocks: tuple[str, ...] = ()
    graph: str = ""
    join: str | None = None

    @property
    def rank(self) -> int:
        """Number of spatial dimensions: 1, 2 or 3."""
        return len(self.size)


@dataclass(frozen=True)
class Refusal:
    """A place that can take no block, and why."""

    address: str
    reason: str


@dataclass(frozen=True)
class Stage:
    """A run of sites under one container at one resolution, or of parallel branches, each at its own."""

    number: int
    path: str
    strides: tuple[tuple[float, ...], ...]
    channels: tuple[int, ...]
    sites: tuple[Site, ...]
    aliases: tuple[str, ...]
