"""An injected network is held to the plain attributes that its forwards read: changed later, they raise, and are never ignored."""

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import se_inject as si
from tests.networks.places import conv

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Configuration:
    scale: float = 2.0
    unread: float = 1.0


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(8, 8), conv(8, 8, act=False)
        self.scale, self._private, self.absent = 2.0, 2.0, None
        self.table, self.listed, self.pair = {"scale": 2.0}, [2.0], (2.0, 1)
        self.namespace, self.config = types.SimpleNamespace(scale=2.0), Configuration()
        self.one.strength = 2.0
        self.unread = 1.0

    def factor(self):
        raise NotImplementedError

    def forward(self, x):
        return F.relu(x + self.two(self.one(x)) * self.factor())


READS = {
    "a number": (lambda self: self.scale, lambda self: setattr(self, "scale", 0.5)),
    "a private number": (lambda self: self._private, lambda self: setattr(self, "_private", 0.5)),
    "nothing": (lambda self: 2.0 if self.absent is None else 0.5, lambda self: setattr(self, "absent", 1)),
    "a dict": (lambda self: self.table["scale"], lambda self: self.table.update(scale=0.5)),
    "a list": (lambda self: self.listed[0], lambda self: self.listed.__setitem__(0, 0.5)),
    "a tuple": (lambda self: self.pair[0], lambda self: setattr(self, "pair", (0.5, 1))),
    "a namespace": (lambda self: self.namespace.scale, lambda self: setattr(self.namespace, "scale", 0.5)),
    "a dataclass": (lambda self: self.config.scale, lambda self: setattr(self.config, "scale", 0.5)),
    "another dataclass": (lambda self: self.config.scale, lambda self: setattr(self, "config", Configuration(0.5))),
    "a child's": (lambda self: self.one.strength, lambda self: setattr(self.one, "strength", 0.5)),
}


def network_reading(factor):
    kind = type("Reading", (Unit,), {"factor": factor})
    return nn.Sequential(conv(3, 8), kind(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("name", READS)
def test_a_changed_attribute_raises(name):
    factor, change = READS[name]
    network = network_reading(factor)
    injected = si.inject(network, X)
    with torch.no_grad():
        before = network(X)
        assert torch.equal(injected(X), before)
        change(injected[1])
        with pytest.raises(RuntimeError, match="was edited for"):
            injected(X)
        change(network[1])
        assert not torch.equal(network(X), before)
        assert torch.equal(si.eject_(injected)(X), network(X))


@pytest.mark.parametrize(
    "change", [lambda unit: setattr(unit, "unread", 5.0), lambda unit: setattr(unit.config, "unread", 5.0)]
)
def test_what_the_forward_does_not_read_may_change(change):
    network = network_reading(READS["a dataclass"][0])
    injected = si.inject(network, X)
    change(injected[1])
    with torch.no_grad():
        assert torch.equal(injected(X), network(X))


class Dropping(Unit):
    def forward(self, x):
        y = self.two(self.one(x))
        return F.relu(x + (y * self.scale if self.training and self.scale > 0 else y))


def test_a_setting_that_only_training_reads():
    network = nn.Sequential(conv(3, 8), Dropping(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).train()
    injected = si.inject(network, X)
    assert si.plan_of(injected).steps[0].owner == "1"
    assert torch.equal(injected(X), network(X))
    injected[1].scale = 0.5
    with pytest.raises(RuntimeError, match="was edited for"):
        injected(X)


def test_a_block_may_take_the_name_of_what_was_nothing():
    class Named(Unit):
        def __init__(self):
            super().__init__()
            self.se = None

        def forward(self, x):
            y = self.two(self.one(x))
            y = y if self.se is None else self.se(y)
            return F.relu(x + y)

    network = nn.Sequential(conv(3, 8), Named(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    assert si.verify(network, si.inject(network, X), X).passed


def test_a_setting_that_differs_from_itself_is_no_change():
    network = network_reading(lambda self: 2.0 if self.pad != self.pad else 0.5)
    network[1].pad = float("nan")
    network[1].pads = [float("nan")]
    injected = si.inject(network, X)
    with torch.no_grad():
        assert torch.equal(injected(X), network(X))


# -- children that are added or replaced ----------------------------------------------------------------------


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.listed = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.named = nn.ModuleDict({"one": nn.Conv2d(8, 8, 3, padding=1)})
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for each in (*self.listed, *self.named.values()):
            x = torch.relu(x + each(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["listed", "named"])
def test_a_child_that_is_added_to_a_list_raises(name):
    plain = Lists().eval()
    model = si.inject(plain, X)
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    children = getattr(model, name)
    children.append(nn.Conv2d(8, 8, 1)) if name == "listed" else children.update({"two": nn.Conv2d(8, 8, 1)})
    with pytest.raises(RuntimeError, match=rf"was edited for len\(self\.{name}\)"):
        model(X)
    back = si.eject_(model)
    back(X)


def test_a_child_that_is_replaced_is_called_as_it_is():
    plain = Lists().eval()
    model = si.inject(plain, X)
    other = nn.Conv2d(8, 8, 1)
    plain.listed[1] = model.listed[1] = other
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
