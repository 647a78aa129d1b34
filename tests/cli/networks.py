"""Networks that the command is tried on, and what its tests ask of files and outputs."""

import json
from pathlib import Path

import torch

NETS = '''
"""Networks of a user's own. ``tiny`` is made of public classes only, so its pickle needs nobody's trust."""
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock


def plain(i, o, size=3, stride=1):
    return [nn.Conv2d(i, o, size, stride, size // 2, bias=False), nn.BatchNorm2d(o)]


def tiny():
    """Four residual units: 16 channels in `one`, 32 in `two`."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*plain(3, 16), nn.ReLU()),
            one=nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)),
            two=nn.Sequential(BasicBlock(16, 32, 2, nn.Sequential(*plain(16, 32, 1, 2))), BasicBlock(32, 32)),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )
    )


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, x):
        return self.net(x)


class Picky(Own):
    def forward(self, x):
        if x.shape[-1] != 40:
            raise ValueError("forty pixels, no more and no less")
        return super().forward(x)


class Undecided(nn.Module):
    """A unit whose way depends on the data, behind one that is as it should be."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*plain(3, 16), nn.ReLU())
        self.good = BasicBlock(16, 16)
        self.odd = Odd()

    def forward(self, x):
        return self.odd(self.good(self.stem(x)))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        self.last = x
        return x + self.conv(x)


def cifar():
    """Its linear layer takes 32×32 images alone, so that other sizes are tried in vain before."""
    layers = [*plain(3, 8), nn.ReLU(), nn.MaxPool2d(4), *plain(8, 16), nn.ReLU(), nn.MaxPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 2 * 2, 10))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))


def ill():
    network = tiny()
    with torch.no_grad():
        network.head[2].weight[0, 0] = float("nan")
    return network


def explodes():
    raise ValueError("no luck today")


def number():
    return 3
'''

SITES = ["one.0.bn2", "one.1.bn2", "two.0.bn2", "two.1.bn2"]
SMALL = ("--input", "3x16x16")


def files():
    return {path.name for path in Path().iterdir() if path.name not in ("nets.py", "__pycache__")}


def document(text):
    """The one JSON document that a text is."""
    assert text.startswith("{")
    return json.loads(text)


def same(one, other, shape=(2, 3, 16, 16)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))
