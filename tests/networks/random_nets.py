"""Random convolutional networks, as data and as modules: what no list of networks holds.

A network is drawn as a tree of ``Part``: a class from ``random_parts``, its options, and the parts within. The tree
prints as it is, so a failing example can be read and built again.
"""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.common import randomise
from tests.networks.random_parts import (
    ACTIVATIONS,
    Again,
    Attended,
    Chain,
    Dense,
    Gated,
    Hourglass,
    Joined,
    Moody,
    Net,
    OwnWeights,
    Paired,
    Partial,
    Recomputed,
    Residual,
    Shaped,
    Shuffled,
    Tied,
    Told,
    Unit,
    separable,
    sequential,
    sequential_unit,
)

SIDES = {1: 24, 2: 12, 3: 8}


@dataclasses.dataclass(frozen=True)
class Part:
    """A module as data.

    Args:
        make: its class, called with ``rank``, channels in and out, the modules of ``parts``, and the options.
        channels: C of what goes in.
        out: C of what comes out.
        parts: the parts within.
        options: keyword arguments.
    """

    make: Any
    channels: int
    out: int
    parts: tuple["Part", ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, rank):
        parts = [part.build(rank) for part in self.parts]
        return self.make(rank, self.channels, self.out, *parts, **self.options)

    def __repr__(self):
        inner = [repr(part) for part in self.parts] + [f"{key}={value!r}" for key, value in self.options.items()]
        return f"{self.make.__name__}({', '.join([f'{self.channels}→{self.out}', *inner])})"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A network as data: what goes in and out, and its parts."""

    rank: int
    stem: Part
    parts: tuple[Part, ...]
    inputs: str
    outputs: str

    def build(self):
        """The network in training mode, with the same random weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            parts = [part.build(self.rank) for part in self.parts]
            head = nn.Linear(self.parts[-1].out, 5)
            return randomise(
                Net(self.rank, self.stem.build(self.rank), parts, head, inputs=self.inputs, outputs=self.outputs)
            )

    def call(self, batch):
        """Arguments for a call."""
        generator = torch.Generator().manual_seed(batch)
        x, other = (torch.randn(batch, 3, *[SIDES[self.rank]] * self.rank, generator=generator) for _ in range(2))
        if self.inputs == "two":
            return (x, other), {}
        return ({"image": x} if self.inputs == "dict" else x,), {"scale": 0.5} if self.inputs == "keyword" else {}


# -- drawing them -----------------------------------------------------------------------------------------

widths = st.integers(2, 9)
kernels = st.sampled_from([1, 3, 3, 3, 5])
norms = st.sampled_from(["batch", "batch", "batch", "group", "instance", "layer", None])


@st.composite
def units(draw, channels, out):
    """A part with one convolution, or two."""
    make = draw(st.sampled_from([Unit, Unit, Unit, sequential_unit, sequential_unit, separable, OwnWeights, Gated]))
    options = {"kernel": draw(kernels)}
    if make in (Unit, sequential_unit):
        options |= {"norm": draw(norms), "act": draw(st.sampled_from(list(ACTIVATIONS)))}
        options["groups"] = channels if out % channels == 0 and draw(st.booleans()) else 1
    if make is Unit:
        options |= {
            "first": draw(st.sampled_from(["conv", "conv", "norm"])),
            "drop": draw(st.sampled_from([0.0, 0.0, 0.3])),
        }
    return Part(make, channels, out, (), options)


@st.composite
def blocks(draw, channels, out, depth):
    """A part of any kind with so many channels in and out."""
    kind = draw(st.sampled_from(KINDS)) if depth > 0 else unit
    part = draw(kind(channels, out, depth))
    return part if part.out == out else Part(sequential, channels, out, (part, draw(units(part.out, out))))


def unit(channels, out, depth):
    return units(channels, out)


@st.composite
def residual(draw, channels, out, depth):
    options = {
        "how": draw(st.sampled_from(ADDITIONS)),
        "act": draw(st.sampled_from(["relu", "relu in place", "F.relu", "F.relu in place", None])),
        "projection": draw(st.booleans()),
    }
    return Part(Residual, channels, out, (draw(chain(channels, out, depth)),), options)


ADDITIONS = [
    "x + f", "f + x", "f += x", "x += f", "input += f", "torch.add", "alpha", "add_", "scaled", "gamma", "sum", "drop path",
]  # fmt: skip


@st.composite
def chain(draw, channels, out, depth):
    """Parts one after the other."""
    count = draw(st.integers(1, 3))
    inner = [channels, *[draw(widths) for _ in range(count - 1)], out]
    parts = tuple(draw(blocks(inner[i], inner[i + 1], depth - 1)) for i in range(count))
    how = draw(st.sampled_from(["list", "dict", "sequential", "numbers", None]))
    return Part(Chain, channels, out, parts, {"how": how}) if how else Part(sequential, channels, out, parts)


@st.composite
def joined(draw, channels, out, depth):
    how = draw(st.sampled_from(["cat", "cat from the end", "cat list", "sum", "total"]))
    count = draw(st.integers(2, 3))
    shares = [out] * count if how in ("sum", "total") else [out // count + (i < out % count) for i in range(count)]
    parts = tuple(draw(blocks(channels, max(share, 1), depth - 1)) for share in shares)
    total = out if how in ("sum", "total") else sum(part.out for part in parts)
    return Part(Joined, channels, total, parts, {"how": how, "merge": draw(st.booleans())})


@st.composite
def partial(draw, channels, out, depth):
    half = draw(st.integers(2, 5))
    parts = tuple(draw(blocks(half, half, depth - 1)) for _ in range(draw(st.integers(1, 2))))
    return Part(
        Partial, channels, out, parts, {"half": half, "how": draw(st.sampled_from(["chunk", "split", "slice"]))}
    )


@st.composite
def shuffled(draw, channels, out, depth):
    inner = Part(Shuffled, 2 * out, 2 * out, (draw(blocks(out, out, depth - 1)),))
    return Part(sequential, channels, 2 * out, (draw(units(channels, 2 * out)), inner))


@st.composite
def dense(draw, channels, out, depth):
    growth, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    parts = tuple(draw(blocks(channels + i * growth, growth, 0)) for i in range(count))
    return Part(
        Dense, channels, channels + count * growth, parts, {"how": draw(st.sampled_from(["names", "children"]))}
    )


@st.composite
def hourglass(draw, channels, out, depth):
    options = {"how": draw(st.sampled_from(["cat", "add"])), "up": draw(st.sampled_from(["interpolate", "transposed"]))}
    return Part(Hourglass, channels, out, (draw(blocks(channels, out, depth - 1)),), options)


@st.composite
def again(draw, channels, out, depth):
    inner = Part(Again, out, out, (draw(blocks(out, out, depth - 1)),), {"times": draw(st.integers(2, 3))})
    return Part(sequential, channels, out, (draw(units(channels, out)), inner))


def wrapper(make, **options):
    @st.composite
    def strategy(draw, channels, out, depth):
        drawn = {name: draw(st.sampled_from(choices)) for name, choices in options.items()}
        return Part(make, channels, out, (draw(blocks(channels, out, depth - 1)),), drawn)

    return strategy


KINDS = [
    unit, unit, residual, residual, residual, residual, chain, joined, joined, partial, shuffled, dense, hourglass,
    again,
    wrapper(Attended), wrapper(Tied), wrapper(Shaped), wrapper(Recomputed),
    wrapper(Moody, how=["dropout", "functional", "noise", "scaled"]),
    wrapper(Told, scale=[None, 0.7], flag=[True, False]),
    wrapper(Paired, how=["tuple", "dict"]),
]  # fmt: skip


@st.composite
def networks(draw):
    """A whole network."""
    rank = draw(st.sampled_from([2, 2, 2, 1, 3]))
    width = draw(widths)
    stem = Part(
        Unit,
        3,
        width,
        (),
        {"stride": draw(st.sampled_from([1, 2])), "act": draw(st.sampled_from(["relu", "relu in place", "silu"]))},
    )
    parts, channels = [], width
    for _ in range(draw(st.integers(1, 3))):
        parts.append(draw(blocks(channels, draw(st.sampled_from([channels, 5, 6, 8])), draw(st.integers(1, 3)))))
        channels = parts[-1].out
    inputs = draw(st.sampled_from(["one", "one", "keyword", "two", "dict"]))
    outputs = draw(st.sampled_from(["one", "one", "tuple", "dict", "more in training"]))
    return Recipe(rank, stem, tuple(parts), inputs, outputs)
