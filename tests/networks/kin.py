"""Networks whose units stand apart from their kin, hand structures on, or have parts that can't be traced: added to ``PLACES``."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.networks.places import C, branch, conv, network


class DualPath(nn.Module):
    """Reads a sum and a growing concatenation as a tuple, joins it whole, and hands both on."""

    def __init__(self, dense):
        super().__init__()
        self.body = branch(C + dense)
        self.last = nn.Conv2d(C + dense, C + 4, 1)

    def forward(self, x):
        y = self.last(self.body(torch.cat(x, 1)))
        return x[0] + y[:, :C], torch.cat([x[1], y[:, C:]], 1)


class Opened(nn.Module):
    def forward(self, x):
        return x, x[:, :4]


class Joined(nn.Module):
    def forward(self, x):
        return torch.cat(x, 1).mean((2, 3))


@network("2.0.getitem#2", "2.1.getitem#2", "2.2.getitem#2")
def DualPaths():
    return nn.Sequential(
        conv(3), Opened(), nn.Sequential(DualPath(4), DualPath(8), DualPath(12)), Joined(), nn.Linear(C + 16, 4)
    )


class Inverted(nn.Module):
    """A unit that has a shortcut where its shapes allow."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.up, self.depth = (
            conv(inputs, 2 * inputs, 1),
            nn.Conv2d(2 * inputs, 2 * inputs, 3, stride, 1, groups=2 * inputs),
        )
        self.act, self.down, self.same = nn.ReLU(), nn.Conv2d(2 * inputs, outputs, 1), stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.down(self.act(self.depth(self.up(x))))
        return x + y if self.same else y


class Stage(nn.Module):
    """Halves the resolution by a unit of its own, and goes on with others."""

    def __init__(self):
        super().__init__()
        self.halve, self.rest = Inverted(C, C, 2), conv()

    def forward(self, x):
        return self.rest(self.halve(x))


@network(
    "body.first.0.down",
    "body.first.1.down",
    "body.first.2.down",
    "body.stages.0.halve.down",
    "body.stages.1.halve.down",
)
class UnitsThatHalve(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.body = nn.ModuleDict({
            "first": nn.Sequential(Inverted(8, C), Inverted(C, C), Inverted(C, C)),
            "stages": nn.Sequential(Stage(), Stage()),
        })  # fmt: skip

    def forward(self, x):
        return self.body["stages"](self.body["first"](self.stem(x))).mean((2, 3))


class Keeps(nn.Module):
    """Two convolutions that are one: it keeps the kernel that it computes."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.one, self.two = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(inputs, outputs, 1)
        self.kernel = None

    def forward(self, x):
        self.kernel = self.one.weight + F.pad(self.two.weight, [1, 1, 1, 1])
        return F.conv2d(x, self.kernel, self.one.bias, padding=1)


class OfParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Keeps(C, C), Keeps(C, C)

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


@network("1.0.second", "1.1.second")
def PartsThatAreNoUnits():
    return nn.Sequential(Keeps(3, C), nn.Sequential(OfParts(), OfParts()), Keeps(C, C), nn.AdaptiveAvgPool2d(1))


class Asks(nn.Module):
    """Looks at its input's device; its layers are as they should be."""

    def __init__(self):
        super().__init__()
        self.one, self.two = conv(3), conv()

    def forward(self, x):
        return self.two(self.one(x)) if x.device.type != "xla" else x


@network("0.one.2", "0.two.2", "1.2", "2.2")
def LayersWithinWhatCannotBeTraced():
    return nn.Sequential(Asks(), conv(), conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4))
