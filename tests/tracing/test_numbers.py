"""``int``, ``float`` and ``len`` of sizes in a forward, tensors that are unpacked, and results that are None."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import se_inject as si
from tests.common import randomise
from tests.networks.places import C, branch


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = branch()

    def forward(self, x):
        return F.relu(x + self.body(self.made(x)))


def rounded_up(size, step):
    """A function of the author's module, which the method below calls."""
    return int(math.ceil(size / step) * step)


class Resized(Unit):
    """MobileViT's way: a size is rounded up to whole patches."""

    def sizes(self, x):
        return rounded_up(x.shape[2], 4), rounded_up(x.shape[3], 4)

    def made(self, x):
        height, width = self.sizes(x)
        big = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        return F.interpolate(
            big, size=(int(x.shape[2]), int(0.6 * x.shape[3]) + int(x.shape[3]) - int(x.shape[3] * 0.6))
        )


class Scaled(Unit):
    def made(self, x):
        number = float(x.shape[-1]) / len(x)
        return x * (number if isinstance(number, float) and not isinstance(number, int) else 0) + float(len(x) > 1)


class Negative(Unit):
    """Towards zero, not down: -2.5 becomes -2."""

    def made(self, x):
        return torch.roll(x, int(-x.shape[2] / 6), 2)


class Masked(Unit):
    def made(self, x):
        lengths = torch.ones(x.shape[0]) * x.shape[3]
        mask = torch.arange(x.shape[3]).expand(len(lengths), x.shape[3]) < lengths[:, None] - 2
        return x * mask[:, None, None]


class Unpacked(Unit):
    """Three values side by side in a dimension of their own, and a parameter that is gone through."""

    def __init__(self):
        super().__init__()
        self.three, self.weights = nn.Conv2d(C, 3 * C, 1), nn.Parameter(torch.rand(2, C, 1, 1))

    def made(self, x):
        n, c, h, w = x.shape
        q, k, v = self.three(x).reshape(n, 3, c, h, w).transpose(0, 1)
        for weight in self.weights:
            q = q * weight
        return q + k * len(self.weights) + v


class Halves(nn.Module):
    def __init__(self, both):
        super().__init__()
        self.conv, self.both = nn.Conv2d(C, C, 1), both

    def forward(self, x):
        y = self.conv(x)
        return y, (y * 2 if self.both else None)


class PerhapsNone(Unit):
    """The second result of a child is None, and the forward asks."""

    def __init__(self, both=False):
        super().__init__()
        self.halves = Halves(both)

    def made(self, x):
        one, other = self.halves(x)
        if other is not None:
            one = one + other
        return one


class Both(PerhapsNone):
    def __init__(self):
        super().__init__(True)


def network(kind):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, C, 3, padding=1), nn.Sequential(kind(), kind()), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(C, 4))).eval()


KINDS = (Resized, Scaled, Negative, Masked, Unpacked, PerhapsNone, Both)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_computed_anew_for_every_input(kind):
    net = network(kind)
    after = si.inject(net, torch.rand(2, 3, 15, 17))
    assert [step.site for step in si.plan_of(after).steps] == ["1.0.body", "1.1.body"]
    assert {type(unit).__mro__[1] for unit in after[1]} == {kind}
    with pytest.raises(si.errors.AlreadyInjected):  # its forward is read again
        si.plan(after, torch.rand(2, 3, 15, 17))
    for shape in ((2, 3, 15, 17), (1, 3, 16, 16), (5, 3, 9, 22)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(net(x), after(x))
        net.train(), after.train()
        assert torch.equal(net(x), after(x))
        net.eval(), after.eval()


@pytest.mark.parametrize("kind", [Resized, Negative, Unpacked])
def test_they_are_in_every_file(kind, tmp_path):
    net = network(kind)
    x = torch.rand(2, 3, 16, 16)
    after = si.inject(net, x)
    torch.save(after, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    for size in (16, 11):
        y = torch.randn(3, 3, size, size)
        assert torch.equal(loaded(y), net(y))
    program = torch.export.export(after, (x,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},)).module()
    y = torch.randn(5, 3, 16, 16)
    assert torch.allclose(program(y), net(y), atol=1e-5)


def test_the_authors_code_is_as_before_and_other_threads_never_see_another_int():
    forward, method, function = Resized.forward, Resized.sizes, rounded_up
    seen, done = [], threading.Event()

    def look():
        while not done.is_set():
            seen.append(rounded_up.__globals__.get("int", int) is int and Resized.sizes is method)

    thread = threading.Thread(target=look)
    thread.start()
    net = network(Resized)
    si.plan(net, torch.rand(2, 3, 15, 17))
    done.set()
    thread.join()
    assert all(seen) and seen
    assert (Resized.forward, Resized.sizes, rounded_up) == (forward, method, function)
    assert all(type(unit) is Resized for unit in net[1]) and int is int


class UsesItOtherwise(Unit):
    """``type(…) is int`` would be answered otherwise: such a forward is refused as before."""

    def made(self, x):
        return x * (2 if type(int(x.shape[2] * 0.5)) is int else 3)


class GoesThroughTheBatch(Unit):
    def made(self, x):
        return torch.stack([each * 2 for each in x])


class UnpacksTheBatch(Unit):
    """The author's own code takes two examples, no more: so does the injected network."""

    def made(self, x):
        one, other = x
        return x * (one.mean() - other.mean())


@pytest.mark.parametrize(
    ("kind", "reason"), [(UsesItOtherwise, "Python number"), (GoesThroughTheBatch, "iterates over a tensor")]
)
def test_what_is_still_refused(kind, reason):
    with pytest.raises(si.errors.NoSites) as caught:
        si.plan(network(kind), torch.rand(2, 3, 16, 16))
    assert reason in str(caught.value)


def test_a_number_of_examples_that_the_author_takes_is_checked():
    net = network(UnpacksTheBatch)
    after = si.inject(net, torch.rand(2, 3, 16, 16))
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(net(x), after(x))
    for each in (net, after):
        with pytest.raises(Exception):  # noqa: B017 - ValueError of Python's, and ours
            each(torch.randn(3, 3, 12, 12))
