"""Networks of stages whose units are free, gated already, refused, or attention: what is said about those that get no block."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.networks.axes import GroupsInDimensionOne as Folded

C = 16


def layer(inputs=C, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, C, 3, stride, 1), nn.BatchNorm2d(C), nn.ReLU())


class Free(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.gate = layer(), nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)

    def forward(self, x):
        return F.relu(x + self.two(self.one(x)))


class Gated(Free):
    def forward(self, x):
        y = self.two(self.one(x))
        return F.relu(x + y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))


class Refused(Free):
    def forward(self, x):
        y = self.two(self.one(x))
        return F.relu(x + y) if float(y.mean()) < 99 else x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(C, 3 * C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        return x + self.out((v @ (q.mT @ k).softmax(-1)).view_as(x))


def network(*stages):
    layers = [layer(3)]
    for number, stage in enumerate(stages):
        layers += [layer(stride=2)] * (number > 0) + [nn.Sequential(*(unit() for unit in stage))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4)).eval()


def attended_and_refused():
    return network([Gated, Gated], [Refused, Gated, Refused])


def refused():
    return network([Refused, Refused], [Folded, Folded, Folded])


def free_and_refused():
    return network([Free, Free], [Refused, Folded])


def mixed():
    return network([Free, Refused], [Gated, Gated, Folded])


def attention_and_gated():
    return network([Attention, Attention], [Gated])


def attention_and_free():
    return network([Free, Attention], [Attention])
