"""A call that has to be made with numbers: what is kept of it are shapes."""

import gc
import sys

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.tracing import observe_model
from tests.fuzz.run import peak_bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read in /proc")
LAYERS, SIDE = 16, 192


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class Deciding(nn.Module):
    """Its control flow depends on the numbers, so it can't be observed without them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.units = nn.ModuleList([Unit() for _ in range(LAYERS)])

    def forward(self, x):
        x = self.stem(x)
        for unit in self.units:
            x = unit(x)
        return x[x > 0].sum() if bool((x > 0).any()) else x.sum()


IMAGES = torch.rand(2, 3, SIDE, SIDE)
VALUE = 2 * 8 * SIDE**2 * 4
"""Bytes of one value in it."""


def peak_of(act):
    gc.collect()
    peak_bytes()
    before = peak_bytes()
    kept = act()
    return peak_bytes() - before, kept


def test_a_real_call_takes_as_much_memory_as_a_plain_one():
    net = Deciding().eval()
    with torch.no_grad():
        net(IMAGES)
        plain, _ = peak_of(lambda: net(IMAGES))
    taken, trace = peak_of(lambda: observe_model(net, IMAGES))
    assert trace.how == "real"
    assert len(trace.graphs) >= LAYERS
    assert taken < plain + 8 * VALUE < 4 * LAYERS * VALUE  # each unit has four values
    assert all(
        value.is_meta
        for graph in trace.graphs.values()
        for node in graph.graph.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor)
    )


def test_blocks_are_put_in_and_verified_all_the_same():
    net = Deciding().eval()
    injected = si.inject(net, IMAGES, reduction=4)
    assert si.verify(net, injected, IMAGES).passed
