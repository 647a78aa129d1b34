"""Random convolutional networks, as data and as modules: what no list of networks holds.

A network is drawn as a tree of ``Part``: a class from below, its options, and the parts within. The tree prints as it
is, so a failing example can be read and built again. Every class is what an author could have written: a constructor
that keeps its children in attributes, lists or dicts, and a forward with branches.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from tests.common import randomise

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
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


# -- convolution, normalisation, activation ---------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "leaky in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "prelu": nn.PReLU,
    "F.relu": lambda: F.relu,
    "F.relu in place": lambda: relu_in_place,
    "torch.relu": lambda: torch.relu,
    "swish": lambda: swish,
    "clamp": lambda: clamped,
    "none": nn.Identity,
    None: lambda: None,
}


def relu_in_place(x):
    return F.relu(x, inplace=True)


def swish(x):
    return x * torch.sigmoid(x)


def clamped(x):
    return x.clamp(-1, 3)


def normalisation(kind, rank, channels):
    if kind == "batch":
        return BATCH_NORMS[rank](channels)
    if kind == "instance":
        return INSTANCE_NORMS[rank](channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(channels if channels % 2 else 2, channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else None


class Unit(nn.Module):
    """Convolution, normalisation, activation, dropout, in an order of its own; some of them may be missing."""

    def __init__(
        self, rank, channels, out, kernel=3, groups=1, stride=1, norm="batch", act="relu", first="conv", drop=0.0
    ):
        super().__init__()
        self.conv = CONVS[rank](channels, out, kernel, stride, kernel // 2, groups=groups, bias=norm is None)
        self.norm = normalisation(norm, rank, out if first == "conv" else channels)
        self.act = ACTIVATIONS[act]()
        self.first = first
        self.drop = drop

    def forward(self, x):
        if self.first == "conv":
            x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.act is not None:
            x = self.act(x)
        if self.drop > 0:
            x = F.dropout(x, self.drop, self.training)
        if self.first != "conv":
            x = self.conv(x)
        return x


def sequential_unit(rank, channels, out, kernel=3, groups=1, stride=1, norm="batch", act="relu", **_):
    activation = ACTIVATIONS[act]()
    steps = [CONVS[rank](channels, out, kernel, stride, kernel // 2, groups=groups), normalisation(norm, rank, out)]
    steps += [activation if isinstance(activation, nn.Module) else nn.ReLU()]
    return nn.Sequential(*(step for step in steps if step is not None))


def separable(rank, channels, out, kernel=3, **_):
    return nn.Sequential(
        CONVS[rank](channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
        BATCH_NORMS[rank](channels),
        nn.ReLU6(inplace=True),
        CONVS[rank](channels, out, 1, bias=False),
        BATCH_NORMS[rank](out),
        nn.ReLU6(inplace=True),
    )


class OwnWeights(nn.Module):
    """A convolution written with ``torch.nn.functional`` and parameters in a dict."""

    def __init__(self, rank, channels, out, kernel=3, **_):
        super().__init__()
        self.rank, self.kernel = rank, kernel
        self.weights = nn.ParameterDict({"weight": torch.randn(out, channels, *[kernel] * rank) / channels})
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return F.relu(FUNCTIONS[self.rank](x, self.weights["weight"], self.bias, padding=self.kernel // 2))


class Gated(nn.Module):
    """WaveNet's unit: the product of two convolutions, one through tanh, the other through a sigmoid."""

    def __init__(self, rank, channels, out, kernel=3, **_):
        super().__init__()
        self.conv = CONVS[rank](channels, 2 * out, kernel, padding=kernel // 2)

    def forward(self, x):
        content, gate = self.conv(x).chunk(2, dim=1)
        return torch.tanh(content) * torch.sigmoid(gate)


# -- units of several convolutions ------------------------------------------------------------------------


class Residual(nn.Module):
    """Branch and shortcut, put together in one of many ways."""

    def __init__(self, rank, channels, out, branch, how="x + f", act="relu", projection=False):
        super().__init__()
        self.branch = branch
        self.shortcut = None
        if projection or channels != out:
            self.shortcut = nn.Sequential(CONVS[rank](channels, out, 1, bias=False), BATCH_NORMS[rank](out))
        self.how = how
        self.act = ACTIVATIONS[act]()
        self.gamma = nn.Parameter(torch.randn(out, *[1] * rank)) if how == "gamma" else None
        self.drop_path = StochasticDepth(0.3, "row") if how == "drop path" else nn.Identity()

    def forward(self, x):
        out = self.branch(x)
        skip = x if self.shortcut is None else self.shortcut(x)
        if self.how == "x + f":
            out = skip + out
        elif self.how == "f + x":
            out = out + skip
        elif self.how == "f += x":
            out += skip
        elif self.how == "x += f":
            skip = skip.clone()
            skip += out
            out = skip
        elif self.how == "input += f":
            skip += out
            out = skip
        elif self.how == "torch.add":
            out = torch.add(skip, out)
        elif self.how == "alpha":
            out = torch.add(skip, out, alpha=0.5)
        elif self.how == "add_":
            out.add_(skip)
        elif self.how == "scaled":
            out = skip + 0.3 * out
        elif self.how == "gamma":
            out = skip + out * self.gamma
        elif self.how == "sum":
            out = sum([skip, out])
        else:
            out = skip + self.drop_path(out)
        return out if self.act is None else self.act(out)


class Joined(nn.Module):
    """Branches, concatenated or summed, with a convolution behind or without."""

    def __init__(self, rank, channels, out, *branches, how="cat", merge=False):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.how, self.rank = how, rank
        self.merge = Unit(rank, out, out, kernel=1) if merge else None

    def forward(self, x):
        if self.how == "cat":
            x = torch.cat([branch(x) for branch in self.branches], 1)
        elif self.how == "cat from the end":
            x = torch.cat(tuple(branch(x) for branch in self.branches), dim=-1 - self.rank)
        elif self.how == "cat list":
            outs = []
            for branch in self.branches:
                outs.append(branch(x))
            x = torch.cat(outs, dim=1)
        elif self.how == "sum":
            x = sum(branch(x) for branch in self.branches)
        else:
            total = self.branches[0](x)
            for branch in self.branches[1:]:
                total += branch(x)
            x = total
        return x if self.merge is None else self.merge(x)


class Partial(nn.Module):
    """C2f: half of the channels goes through the blocks, and every value on the way is kept."""

    def __init__(self, rank, channels, out, *blocks, how="chunk", half=4):
        super().__init__()
        self.cv1 = Unit(rank, channels, 2 * half, kernel=1, act="silu")
        self.cv2 = Unit(rank, (2 + len(blocks)) * half, out, kernel=1, act="silu")
        self.m = nn.ModuleList(blocks)
        self.how, self.half = how, half

    def forward(self, x):
        y = self.cv1(x)
        if self.how == "chunk":
            y = list(y.chunk(2, 1))
        elif self.how == "split":
            y = list(y.split((self.half, self.half), 1))
        else:
            y = [y[:, : self.half], y[:, self.half :]]
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Shuffled(nn.Module):
    """ShuffleNet V2: one half is left alone, then the channels are shuffled."""

    def __init__(self, rank, channels, out, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        n, c, *size = x.shape
        return x.view(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)


class Dense(nn.Module):
    """DenseNet: every layer sees what all before it made."""

    def __init__(self, rank, channels, out, *layers, how="names"):
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(f"layer{number}", layer)
        self.names, self.how = [f"layer{number}" for number in range(len(layers))], how

    def forward(self, x):
        features = [x]
        for layer in self.children() if self.how == "children" else [getattr(self, name) for name in self.names]:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Hourglass(nn.Module):
    """Down, something, up again, and a skip connection around it."""

    def __init__(self, rank, channels, out, inner, how="cat", up="interpolate"):
        super().__init__()
        self.inner = inner
        self.rank, self.how = rank, how
        self.up = TRANSPOSED[rank](out, channels, 2, 2) if up == "transposed" else None
        self.match = CONVS[rank](out, channels, 1)
        self.after = Unit(rank, 2 * channels, out) if how == "cat" else Unit(rank, channels, out)

    def forward(self, x):
        y = self.inner(POOLS[self.rank](x, 2))
        y = self.up(y) if self.up is not None else F.interpolate(self.match(y), size=x.shape[2:])
        return self.after(torch.cat([x, y], 1) if self.how == "cat" else x + y)


class Attended(nn.Module):
    """A block with a gate of its own already."""

    def __init__(self, rank, channels, out, inner):
        super().__init__()
        self.inner = inner
        self.fc = CONVS[rank](out, out, 1)
        self.dims = list(range(2, rank + 2))

    def forward(self, x):
        x = self.inner(x)
        return x * self.fc(x.mean(self.dims, keepdim=True)).sigmoid()


# -- how authors wire things ------------------------------------------------------------------------------


class Chain(nn.Module):
    """One after the other, kept in a list, a dict or attributes."""

    def __init__(self, rank, channels, out, *parts, how="list"):
        super().__init__()
        self.how = how
        if how == "dict":
            self.parts = nn.ModuleDict({f"part{number}": part for number, part in enumerate(parts)})
        elif how == "sequential":
            self.parts = nn.Sequential(*parts)
        else:
            self.parts = nn.ModuleList(parts)

    def forward(self, x):
        if self.how == "sequential":
            return self.parts(x)
        if self.how == "numbers":
            for number in range(len(self.parts)):
                x = self.parts[number](x)
            return x
        for part in self.parts.values() if self.how == "dict" else self.parts:
            x = part(x)
        return x


def sequential(rank, channels, out, *parts, **_):
    return nn.Sequential(*parts)


class Again(nn.Module):
    """One module called several times."""

    def __init__(self, rank, channels, out, inner, times=2):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x):
        for _ in range(self.times):
            x = self.inner(x)
        return x


class Tied(nn.Module):
    """One module under two parents."""

    def __init__(self, rank, channels, out, inner):
        super().__init__()
        self.one, self.other = Around(inner), Around(inner)

    def forward(self, x):
        return self.one(x) + self.other(x.flip(-1))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return F.relu(self.inner(x))


class Moody(nn.Module):
    """Another way in training."""

    def __init__(self, rank, channels, out, inner, how="dropout"):
        super().__init__()
        self.inner, self.how = inner, how
        self.dropout = [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d][rank - 1](0.2)

    def forward(self, x):
        if self.how == "noise" and self.training:
            x = x + 0.1 * torch.randn_like(x)
        x = self.inner(x)
        if self.how == "dropout":
            return self.dropout(x)
        if self.how == "functional":
            return F.dropout(x, 0.2, training=self.training)
        if not self.training:
            return x
        return x * 0.9


class Told(nn.Module):
    """Its inner block is told what to do by keyword; what the class says may be said again by an instance."""

    scale: float | None = 1.0
    flag = False

    def __init__(self, rank, channels, out, inner, scale=None, flag=True):
        super().__init__()
        self.body = Obedient(inner)
        if flag:
            self.scale, self.flag = scale, flag

    def forward(self, x, unused=None):
        return self.body(x, scale=self.scale, flag=self.flag)


class Obedient(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, mask=None, *, scale=1.0, flag=False, **other):
        if mask is not None:
            x = x * mask
        x = self.inner(x)
        if scale is not None:
            x = x * scale
        return F.relu(x) if flag else x


class Paired(nn.Module):
    """Its inner block returns several things."""

    def __init__(self, rank, channels, out, inner, how="tuple"):
        super().__init__()
        self.body, self.how = Returning(inner, how), how

    def forward(self, x):
        if self.how == "dict":
            found = self.body(x)
            return found["out"] + found["mean"]
        out, mean = self.body(x)
        return out + mean


class Returning(nn.Module):
    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        x = self.inner(x)
        mean = x.mean(dim=1, keepdim=True)
        return {"out": x, "mean": mean} if self.how == "dict" else (x, mean)


class Shaped(nn.Module):
    """Looks at shapes before it does something."""

    def __init__(self, rank, channels, out, inner):
        super().__init__()
        self.inner, self.channels = inner, channels

    def forward(self, x):
        if x.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got {x.shape[1]}")
        y = self.inner(x)
        if y.shape == x.shape:
            return y * 0.5
        b = y.size(0)
        return y.reshape(b, -1).view(b, *y.shape[1:])


class Recomputed(nn.Module):
    """Its activations are computed again in the backward pass."""

    def __init__(self, rank, channels, out, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.training else self.inner(x)


class Net(nn.Module):
    """A stem, parts one after the other, and a head; inputs and outputs of several forms."""

    def __init__(self, rank, stem, parts, head, *, inputs, outputs):
        super().__init__()
        self.stem = stem
        self.parts = nn.ModuleList(parts)
        self.head = head
        self.inputs, self.outputs, self.dims = inputs, outputs, list(range(2, rank + 2))

    def forward(self, x, other=None, *, scale=None):
        if self.inputs == "dict":
            x = x["image"]
        x = self.stem(x)
        if other is not None:
            x = torch.abs(x - self.stem(other))
        seen = []
        for part in self.parts:
            x = part(x)
            seen.append(x)
        out = self.head(x.mean(self.dims))
        if scale is not None:
            out = out * scale
        if self.outputs == "tuple":
            return out, *seen
        if self.outputs == "dict":
            return {"out": out, "features": seen}
        if self.outputs == "more in training" and self.training:
            return out, seen[0]
        return out


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
