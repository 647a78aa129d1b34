"""Small networks of a kind each, with the place where an expert would put the blocks: address → why others have none.

Each is a stem, some units of one form, and a head. ``PLACES`` is the table: what is chosen by default, in order.
"""

import dataclasses
import math
import random
import warnings
from collections.abc import Callable

import numpy
import torch
import torch.nn.functional as F
from torch import nn

C = 16


@dataclasses.dataclass(frozen=True)
class Places:
    """One network.

    Args:
        make: makes it.
        chosen: addresses of the sites chosen by default.
        attended: addresses of those that have attention already.
        missed: part of the reason why its units can take no block; empty if they can.
    """

    make: Callable[[], nn.Module]
    chosen: tuple[str, ...] = ()
    attended: tuple[str, ...] = ()
    missed: str = ""


PLACES: dict[str, Places] = {}


def conv(inputs=C, outputs=C, kernel=3, groups=1, act=True):
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


def branch(channels=C):
    return nn.Sequential(conv(channels, channels), conv(channels, channels, act=False))


def units(*values, attended=(), missed=""):
    """Put two units of a class between a stem and a head; the values are relative to the unit."""

    def register(unit):
        def make():
            return nn.Sequential(
                conv(3), nn.Sequential(unit(), unit()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4)
            )

        paths = ("1.0", "1.1")
        PLACES[unit.__name__] = Places(
            make,
            tuple(f"{path}.{value}" for path in paths for value in values),
            tuple(f"{path}.{value}" for path in paths for value in attended),
            missed,
        )
        return unit

    return register


def network(*values, attended=(), missed=""):
    def register(make):
        PLACES[make.__name__] = Places(make, values, attended, missed)
        return make

    return register


# -- bodies that return several values --------------------------------------------------------------------------


@units("getitem")
class PreActivation(nn.Module):
    """The body returns the branch and what its first activation gave, which the projection reads."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)

        def forward(self, x):
            start = F.relu(self.norm(x))
            return {"out": self.second(F.relu(self.first(start))), "start": start}

    def __init__(self):
        super().__init__()
        self.body, self.project = self.Body(), nn.Conv2d(C, C, 1)

    def forward(self, x):
        found = self.body(x)
        return found["out"] + self.project(found["start"])


@units("getitem#3")
class NestedResults(nn.Module):
    """A body within a body, each returning two values, the inner one's handed on as they are."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = self.Inner()

        def forward(self, x):
            return x, self.inner(x)

        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = branch()

            def forward(self, x):
                return x.mean(), self.conv(x)

    def __init__(self):
        super().__init__()
        self.body = self.Outer()

    def forward(self, x):
        _, pair = self.body(x)
        return F.relu(x + pair[1])


# -- more forms of residual -------------------------------------------------------------------------------------


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = branch()


@units("branch")
class ReversedDifference(Unit):
    def forward(self, x):
        return self.branch(x).sub(x)


@units("branch")
class InPlaceDifference(Unit):
    def forward(self, x):
        y = self.branch(x)
        y -= x
        return F.relu(y)


@units("branch")
class Alpha(Unit):
    def forward(self, x):
        return torch.add(x, self.branch(x), alpha=0.5)


@units("branch")
class Lerp(Unit):
    def forward(self, x):
        return torch.lerp(x, self.branch(x), 0.3)


@units("branch")
class StackAndMean(Unit):
    def forward(self, x):
        return torch.stack([self.branch(x), x], dim=1).mean(1)


@units("branch")
class PythonSum(Unit):
    def forward(self, x):
        return sum([x, self.branch(x)])


@units(attended=("branch",))
class GatedAddcmul(Unit):
    """The gate of a squeeze-and-excitation is the last factor."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Sigmoid())

    def forward(self, x):
        y = self.branch(x)
        return torch.addcmul(x, y, self.gate(y))


@units(attended=("einsum",))
class EinsumGate(Unit):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, x):
        y = self.branch(x)
        return x + torch.einsum("b c, b c h w -> b c h w", self.fc(y.mean((2, 3))).sigmoid(), y)


@units(attended=("out",))
class SelectiveKernels(nn.Module):
    """A softmax over branches, in the last dimension, and a module of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc, self.out = conv(), conv(kernel=5), nn.Linear(C, 2 * C), conv(kernel=1, act=False)
        self.choose = nn.Softmax(dim=-1)

    def forward(self, x):
        both = torch.stack([self.one(x), self.two(x)], -1)
        weights = self.choose(self.fc(both.sum(-1).mean((2, 3))).view(-1, C, 2))
        return F.relu(x + self.out((both * weights[:, :, None, None]).sum(-1)))


@units()
class Positions(nn.Module):
    """Attention between positions stays attention: nothing is put there."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(C, C, 1) for _ in range(3))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        q, k, v = (each(x).flatten(2) for each in (self.q, self.k, self.v))
        return x + (v @ self.softmax(q.transpose(1, 2) @ k).transpose(1, 2)).view(x.shape)


@units()
class Separable(nn.Module):
    """A depthwise and a pointwise convolution, each in a class of its own; the second pair is the first without an activation."""

    class Wrapped(nn.Module):
        def __init__(self, kernel, groups):
            super().__init__()
            self.conv = nn.Conv2d(C, C, kernel, padding=kernel // 2, groups=groups)
            self.norm = nn.BatchNorm2d(C)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x)))

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Sequential(self.Wrapped(3, C), self.Wrapped(1, 1)),
            nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU()),
        )

    def forward(self, x):
        return self.convs(x)


PLACES["Separable"] = dataclasses.replace(
    PLACES["Separable"], chosen=("0.2", "1.0.convs.0.1.relu", "1.0.convs.1.1", "1.1.convs.0.1.relu", "1.1.convs.1.1")
)


@network("1.0.f", "1.1.f")
def Streams():
    """Two streams in a list, of which each unit changes one."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = branch(C // 2)

        def forward(self, streams):
            a, b = streams
            return [b, a + self.f(b)]

    class Split(nn.Module):
        def forward(self, x):
            return list(x.chunk(2, 1))

    class Join(nn.Module):
        def forward(self, streams):
            return torch.cat(streams, 1).mean((2, 3))

    return nn.Sequential(nn.Sequential(conv(3), Split()), nn.Sequential(Pair(), Pair()), Join(), nn.Linear(C, 4))


@network("1.2.cat")
def DenseInLayers():
    """Layers that put what they compute first, and drop some of it."""

    class Layer(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 3, padding=1)

        def forward(self, x):
            return torch.cat((F.dropout(self.conv(F.relu(self.norm(x))), 0.1, self.training), x), dim=1)

    return nn.Sequential(conv(3), nn.Sequential(*(Layer(C + 8 * i) for i in range(3))), nn.Conv2d(C + 24, 4, 1))


# -- values that can't be gated ---------------------------------------------------------------------------------


@units(missed="gates real numbers")
class Integers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = branch()

    def forward(self, x):
        codes = (x * 8).round().int() + (self.conv(x) * 8).round().int()
        return codes.float() / 8


@network(*(f"net.{2 * i + 1}" for i in range(4)))
def Denoiser():
    """The whole network is the branch of an image: its plain convolutions are the places, not the image."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            hidden = [layer for _ in range(3) for layer in (nn.Conv2d(C, C, 3, padding=1), nn.ReLU())]
            self.net = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.ReLU(), *hidden, nn.Conv2d(C, 3, 3, padding=1))

        def forward(self, x):
            return (x - self.net(x)).clamp(-9, 9)

    return Net()


@network("0.2", "1.2")
def Scores():
    """The last convolution makes class scores, which are averaged."""
    return nn.Sequential(conv(3), conv(), conv(C, 10), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@units("zeros_like")
class Buffer(Unit):
    """The branch is written into a buffer, half by half, the second half from the first."""

    def forward(self, x):
        y = self.branch(x)
        out = torch.zeros_like(y)
        out[:, : C // 2] = y[:, : C // 2]
        out[:, C // 2 :] = y[:, C // 2 :] + 0.5 * out[:, : C // 2]
        return torch.relu(x + out)


@units("empty_like")
class BufferByViews(Unit):
    def forward(self, x):
        y = self.branch(x)
        out = torch.empty_like(y)
        out.narrow(1, 0, 4).copy_(y[:, :4])
        out[:, 4:].copy_(y[:, 4:])
        return x - out


@units(missed="written into after it was read")
class ReadTooEarly(Unit):
    def forward(self, x):
        y = self.branch(x)
        out = torch.zeros_like(y)
        out[:, :4] = y[:, :4]
        early = torch.relu(x + out)
        out[:, 4:] = y[:, 4:]
        return early


# -- silence ----------------------------------------------------------------------------------------------------


@units(missed="depends on the data")
class DataDecide(Unit):
    def forward(self, x):
        y = self.branch(x)
        return x + y if y.mean() > -99 else x


@units(missed="called several times")
class Recurrent(Unit):
    def forward(self, x):
        for _ in range(2):
            x = x + self.branch(x)
        return x


class Noisy(torch.autograd.Function):
    """Another gradient than its output tells."""

    @staticmethod
    def forward(ctx, x, rate):
        ctx.rate = rate
        return x * rate

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.rate * 0.5, None


@units("body")
class NoisyInTraining(nn.Module):
    """An autograd function that only training applies, by a name of the module's own."""

    def __init__(self):
        super().__init__()
        self.body = branch()
        self.noisy = Noisy.apply

    def forward(self, x):
        y = self.body(x)
        return F.relu(x + (self.noisy(y, 0.75) if self.training else y))


@units("norm")
class DroppedInPython(nn.Module):
    """Stochastic depth that is drawn in Python: the forward of training can't be written down, and the norm's output is gated."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        if self.training and torch.rand(1).item() < 0.5:
            return F.relu(x)
        return F.relu(x + self.norm(self.conv(x)))


@units(missed="turns a size or a tensor into a Python number")
class DroppedAndScaled(nn.Module):
    """The same where the branch is no module's output: there is nothing to gate."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        if self.training and int(x.mean()) > 3:
            return F.relu(x)
        return F.relu(x + torch.tanh(self.conv(x)))


@units("body", missed="")
class AsksItsDtype(nn.Module):
    """Text that is searched."""

    def __init__(self):
        super().__init__()
        self.body = branch()

    def forward(self, x):
        y = self.body(x)
        return F.relu(x + (y.float() if "Half" in x.type() else y))


# -- buffers that are filled in pieces, values that hide a branch ---------------------------------------------------


class _Halves(nn.Module):
    """A convolution for each half of the channels."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = conv(C // 2, C // 2), conv(C // 2, C // 2), nn.BatchNorm2d(C)


@units("norm")
class FilledBuffer(_Halves):
    """The second half reads what the first has written."""

    def forward(self, x):
        half = x.shape[1] // 2
        out = torch.empty_like(x)
        out[:, :half] = self.one(x[:, :half])
        out[:, half:] = self.two(x[:, half:] + out[:, :half])
        return F.relu(x + self.norm(out))


@units("zeros")
class AccumulatedBuffer(_Halves):
    def forward(self, x):
        half = x.shape[1] // 2
        out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        out[:, :half].copy_(self.one(x[:, :half]))
        out[:, half:] += self.two(x[:, half:])
        return F.relu(x + out)


@units("zeros_like")
class IndexedBuffer(_Halves):
    def forward(self, x):
        half = C // 2
        out = torch.zeros_like(x)
        out.index_copy_(1, torch.arange(half), self.one(x[:, :half]))
        out.index_copy_(1, torch.arange(half, C), self.two(x[:, half:]))
        return F.relu(x + out)


@units("relu")
class MeanOfThree(nn.Module):
    """Of more than two none is plainly the shortcut: what they add up to is gated."""

    def __init__(self):
        super().__init__()
        self.body = branch()

    def forward(self, x):
        return F.relu(torch.stack((x, self.body(x), x * -0.1)).mean(0))


@units("new_empty")
class NarrowedBuffer(_Halves):
    def forward(self, x):
        half = x.shape[1] // 2
        out = x.new_empty(x.shape)
        for index, part in enumerate((self.one, self.two)):
            out.narrow(1, index * half, half).copy_(part(x.narrow(1, index * half, half)))
        return F.relu(out.add_(x))


@units("norm")
class PartlyWritten(_Halves):
    """One half is the input's own."""

    def forward(self, x):
        out = x.clone()
        out[:, : C // 2] = self.one(x[:, : C // 2])
        return F.relu(x + self.norm(out))


class _Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(branch() for _ in range(2))
        self.router = nn.Linear(C, 2)

    def forward(self, x):
        weights = self.router(x.mean((2, 3))).softmax(-1)
        return sum(weights[:, index, None, None, None] * expert(x) for index, expert in enumerate(self.experts))


@units("body")
class Mixture(nn.Module):
    """A path without convolutions leads to the branch, through its weights."""

    def __init__(self):
        super().__init__()
        self.body = _Experts()

    def forward(self, x):
        return F.relu(x + self.body(x))


class _Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gate, self.weights = branch(), nn.Conv2d(C, C, 1), nn.Parameter(torch.ones(2))


@units("mul")
class Highway(_Weighted):
    def forward(self, x):
        carry = torch.sigmoid(self.gate(x))
        return carry * self.body(x) + (1 - carry) * x


@units("body")
class MixedByEinsum(_Weighted):
    def forward(self, x):
        return F.relu(torch.einsum("nbchw,n->bchw", torch.stack([x, self.body(x)]), self.weights.softmax(0)))


@units("body")
class MixedByProduct(_Weighted):
    def forward(self, x):
        weights = self.weights.softmax(0).view(-1, 1, 1, 1, 1)
        return F.relu((torch.stack([x, self.body(x)]) * weights).sum(0))


@units("body")
class SideBySide(_Weighted):
    def forward(self, x):
        return F.relu(torch.cat([x[:, None], self.body(x)[:, None]], 1).sum(1))


@network("1.0.f", "1.0.g", "1.1.f", "1.1.g")
def TwoStreamsInOneModule():
    """Each stream gets a branch of the other; the second reads the first's result."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = branch(), branch()

        def forward(self, pair):
            a = F.relu(pair[0] + self.f(pair[1]))
            b = F.relu(pair[1] + self.g(a))
            return a, b

    class Halves(nn.Module):
        def forward(self, x):
            return x, x.flip(-1)

    class Sum(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    stem, units = nn.Sequential(conv(3), Halves()), nn.Sequential(Pair(), Pair())
    return nn.Sequential(stem, units, Sum(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4))


@units("body")
class ScriptedBranch(nn.Module):
    """Its operator is gated without a look into it."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.body = torch.jit.script(branch())

    def forward(self, x):
        return F.relu(x + self.body(x))


# -- what a forward makes of plain numbers --------------------------------------------------------------------------


def _scaled(name, scale, value="body", missed=""):
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = branch()

        def forward(self, x):
            return F.relu(x + scale(self.body(x)))

    Unit.__name__ = name
    units(*(() if missed else (value,)), missed=missed)(Unit)


for _name, (_value, _scale) in {
    "ones": ("body", lambda y: y * torch.ones(1, C, 1, 1)),
    "arange": ("body", lambda y: y * torch.arange(C)[None, :, None, None]),
    "tensor": ("body", lambda y: y * torch.tensor([0.5])),
    "eye": ("einsum", lambda y: torch.einsum("bchw,cd->bdhw", y, torch.eye(C))),
    "flipped": ("getitem", lambda y: y[:, torch.arange(C - 1, -1, -1)]),
    "square root": ("truediv", lambda y: y / math.sqrt(y.shape[1])),
    "logarithm": ("body", lambda y: y * math.log2(y.size(1))),
    "number of NumPy": ("body", lambda y: y * numpy.float32(0.5)),
    "square root by NumPy": ("truediv", lambda y: y / numpy.sqrt(y.shape[1])),
    "remainder": ("body", lambda y: y * divmod(y.shape[2], 3)[0]),
    "channel by channel": ("cat", lambda y: torch.cat([y[:, i : i + 1] * (i + 1) for i in range(y.shape[1])], 1)),
    "key": ("body", lambda y: y * {f"k{C}": 2.0}[f"k{y.shape[1]}"]),
}.items():
    _scaled(f"scaled by {_name}", _scale, _value)

_scaled("scaled at random", lambda y: y * random.uniform(0.5, 1), missed="it draws random numbers in Python")
_scaled(
    "scaled at random by NumPy", lambda y: y * float(numpy.random.rand()), missed="it draws random numbers in Python"
)
_scaled("named by a size", lambda y: y * {"16": 2.0, "32": 2.0}[f"{y.shape[2]}"], missed="makes text of a size")
_scaled("mapped", lambda y: torch.vmap(lambda each: each * 2)(y), missed="a graph can't hold what")


class Closing(nn.Module):
    """The second half of a unit, which is given what the first half read as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2 * C, C, 1), nn.BatchNorm2d(C), nn.Dropout(0.1)

    def forward(self, x, y):
        return self.drop(self.norm(self.conv(y))) + x


@units("closing.norm")
class InTwoHalves(nn.Module):
    """Expansion and depthwise convolution in modules of their own, and the addition in the last one."""

    def __init__(self):
        super().__init__()
        self.opening, self.closing = nn.Sequential(conv(C, 2 * C, 1), conv(2 * C, 2 * C, 3, 2 * C)), Closing()

    def forward(self, x):
        return self.closing(x, self.opening(x))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2 * C, 4, 1), nn.Conv2d(4, 2 * C, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.two(F.relu(self.one(x.mean((2, 3), keepdim=True)))))


@units(attended=("closing.norm",))
class GatedInTwoHalves(nn.Module):
    """The same with attention in the caller's part."""

    def __init__(self):
        super().__init__()
        self.opening, self.gate, self.closing = conv(C, 2 * C, 1), Gate(), Closing()

    def forward(self, x):
        return self.closing(x, self.gate(self.opening(x)))


@units("one", "two")
class Reversible(nn.Module):
    """Two halves of the channels change one another in turn, as in RevNet: there is a way back only without a block behind the join."""

    def __init__(self):
        super().__init__()
        self.one, self.two = branch(C // 2), branch(C // 2)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        a = a + self.one(b)
        b = self.two(a) + b
        return torch.cat((a, b), 1)


@units("one", "two")
class ReversibleBySlices(Reversible):
    def forward(self, x):
        half = x.shape[1] // 2
        a = x[:, :half] - self.one(x[:, half:])
        return torch.cat([a, x[:, half:] + self.two(a)], dim=1)


@units("cat")
class CellOfHalves(nn.Module):
    """Sums of several branches from the halves, concatenated: a cell, which has one block."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (branch(C // 2) for _ in range(4))

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat((self.one(a) + self.two(b), self.three(a) + self.four(b)), 1)
