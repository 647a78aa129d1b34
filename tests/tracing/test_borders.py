"""Values across a forward's border: an injected network returns and changes what the original does, or the reason is true."""

import types
from collections import Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import se_inject as si
from se_inject.errors import InjectError
from tests.common import randomise

X = torch.rand(2, 3, 8, 8)


class Indexed(OrderedDict):
    """A dict that numbers index as well, as transformers' outputs are."""

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Box(dict):
    __getattr__ = dict.__getitem__


@dataclass
class Record:
    y: Tensor
    n: int = 3


class Plain:
    def __init__(self, y):
        self.y = y

    def __eq__(self, other):
        return torch.equal(self.y, other.y)


Named = namedtuple("Named", "y n")


class TupleOfOne(tuple):
    @property
    def y(self):
        return self[0]


class ListOfOne(list):
    pass


def defaulted(y):
    result = defaultdict(list)
    result["y"] = y
    return result


RETURNED = {
    "OrderedDict": lambda y: OrderedDict(y=y),
    "subclass of OrderedDict": lambda y: Indexed(y=y),
    "subclass of dict": lambda y: Box(y=y),
    "defaultdict": defaulted,
    "dataclass": Record,
    "object": Plain,
    "named tuple": lambda y: Named(y, 3),
    "subclass of tuple": lambda y: TupleOfOne((y,)),
    "subclass of list": lambda y: ListOfOne([y]),
    "namespace": lambda y: types.SimpleNamespace(y=y),
    "dict": lambda y: {"y": y, "z": [y, (y, None)]},
}


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Returns(nn.Module):
    """A place in the forward that returns the container, and one in a child."""

    def __init__(self, make):
        super().__init__()
        self.make, self.stem, self.unit = make, nn.Conv2d(3, 8, 3, padding=1), Unit()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.unit(self.stem(x))
        return self.make(x + F.relu(self.conv(x)))


def tensors(value):
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in tensors(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in tensors(item)]
    return [value.y] if hasattr(value, "y") else []


def same(one, other):
    """The same types, keys and bits."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one.keys()) == list(other.keys())
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)


def network(build):
    torch.manual_seed(0)
    return randomise(build()).eval()


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_forward_returns_keeps_its_class(name):
    model = network(lambda: Returns(RETURNED[name]))
    sites = si.find_sites(model, X)
    assert "unit.norm" in [site.address for site in sites]
    after = si.plan(model, X, at="*").apply(model)
    same(model(X), after(X))
    assert si.verify(model, after, X).passed
    if "relu" not in [site.address for site in sites]:
        (reason,) = (item.reason for item in sites.refused if item.address in ("relu", "(the network)"))
        assert type(model(X)).__name__ in reason


class ExtendsNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, names):
        names.extend(["p6"])
        return x + F.relu(self.conv(x))


class Appends(ExtendsNames):
    def forward(self, x, out):
        y = x + F.relu(self.conv(x))
        out.append(y * 2)
        return y


class Adds(ExtendsNames):
    def forward(self, x, seen):
        seen.add("unit")
        return x + F.relu(self.conv(x))


class Counts(ExtendsNames):
    def forward(self, x, counter):
        counter["unit"] += 1
        return x + F.relu(self.conv(x))


class Fills(ExtendsNames):
    def forward(self, x, cache):
        cache["inner"]["y"] = x
        return x + F.relu(self.conv(x))


class Replaces(ExtendsNames):
    def forward(self, x, pair):
        pair[0] = pair[0] * 2
        return x + F.relu(self.conv(x))


class Caller(nn.Module):
    """Calls a unit that changes what it is given, and returns that too."""

    def __init__(self, unit, make):
        super().__init__()
        self.stem, self.unit, self.make = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), unit(), make
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        given = self.make(x)
        y = self.unit(x, given)
        y = y + F.relu(self.last(y))
        return dict.fromkeys(sorted(given), y) if isinstance(given, set | Counter) else [y, given]


CHANGED = {
    "a list of texts": (ExtendsNames, lambda x: ["p5"]),
    "an empty list": (Appends, lambda x: []),
    "a list of tensors": (Appends, lambda x: [x]),
    "a set": (Adds, lambda x: set()),
    "a counter": (Counts, lambda x: Counter()),
    "a dict in a dict": (Fills, lambda x: {"inner": {}}),
    "an item": (Replaces, lambda x: [x, x]),
}


@pytest.mark.parametrize("at", [None, "*"])
@pytest.mark.parametrize("name", CHANGED)
def test_arguments_that_a_forward_changes(name, at):
    unit, make = CHANGED[name]
    model = network(lambda: Caller(unit, make))
    expected = model(X)
    try:
        after = si.plan(model, X, at=at).apply(model)
    except InjectError:
        reasons = [item.reason for item in si.find_sites(model, X).refused]
        assert reasons and all(
            "change" in reason or "put into" in reason or "holds" in reason or "`Counter`" in reason
            for reason in reasons
        )
        return
    seen = after(X)
    assert type(seen) is type(expected)
    assert str(jsonable(seen)) == str(jsonable(expected))
    assert si.verify(model, after, X).passed


def jsonable(value):
    if isinstance(value, Tensor):
        return [list(value.shape), value.double().sum().item()]
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value


def test_a_caller_that_reads_only_its_own_items_keeps_its_places():
    class Reads(Caller):
        def forward(self, x):
            x = self.stem(x)
            given = [x]
            y = self.unit(x, given)
            return F.relu(self.last(y)) + given[0]

    model = network(lambda: Reads(Appends, None))
    plan = si.plan(model, X, at="*")
    assert "" in plan.trace.graphs
    assert list(plan.trace.failures) == []
    after = plan.apply(model)
    assert torch.equal(after(X), model(X))


@pytest.mark.parametrize("how", ["keyword", "value", "attribute"])
def test_calls_that_fail_first_and_are_made_again(how):
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), Unit(), Unit()])

        def forward(self, x):
            for unit in self.units:
                try:
                    x = {
                        "keyword": lambda unit=unit, x=x: unit(x, lengths=None),
                        "value": lambda unit=unit, x=x: unit(x.flatten()),
                        "attribute": lambda unit=unit, x=x: unit.forward_first(x),
                    }[how]()
                except (TypeError, RuntimeError, ValueError, AttributeError):
                    x = unit(x)
            return x

    model = network(Tries)
    plan = si.plan(model, X)
    assert [step.owner for step in plan.steps] == ["units.1", "units.2"]
    after = plan.apply(model)
    assert torch.equal(after(X), model(X))
    assert si.verify(model, after, X).passed
    assert plan.trace.calls["units.1"] == 1


def test_an_encoder_whose_output_numbers_index():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = nn.ModuleList([Unit(), Unit()])

        def forward(self, x):
            for unit in self.units:
                x = unit(x)
            return Indexed(last=x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.encoder = nn.Conv2d(3, 8, 3, padding=1), Encoder()

        def forward(self, x):
            return self.encoder(self.stem(x))[0]

    model = network(Outer)
    plan = si.plan(model, X)
    assert [step.owner for step in plan.steps] == ["encoder.units.0", "encoder.units.1"]
    after = plan.apply(model)
    assert torch.equal(after(X), model(X))
    assert type(after.encoder(torch.rand(1, 8, 8, 8))) is Indexed


class TupleInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return (self.conv(x), x) if self.training else self.conv(x)


class HandsOn(nn.Module):
    """Does not look at its mode; its child does."""

    def __init__(self):
        super().__init__()
        self.inner = TupleInTraining()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("head", [TupleInTraining, HandsOn])
def test_a_child_that_returns_a_tuple_in_training_alone(head):
    model = network(lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), head()))
    after = si.plan(model, X, at="*").apply(model)
    assert torch.equal(after(X), model(X))
    model.train(), after.train()
    same(model(X), after(X))
    assert any("in training" in item.reason for item in si.find_sites(model, X).refused)


def test_features_that_hooks_take_are_no_dead_end():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.units = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList([Unit(), Unit()])
            self.taken = {}
            for index, unit in enumerate(self.units):
                unit.register_forward_hook(self.take(index))

        def take(self, index):
            def hook(module, args, output):
                self.taken[index] = output

            return hook

        def forward(self, x):
            self.taken.clear()
            x = self.stem(x)
            for unit in self.units:
                x = unit(x)
            return list(self.taken.values())

    model = network(Hooked)
    expected = model(X)
    plan = si.plan(model, X)
    assert [step.owner for step in plan.steps] == ["units.0", "units.1"]
    assert [leaf.is_meta for leaf in model.taken.values()] == [False, False]
    after = plan.apply_(network(Hooked))
    assert all(torch.equal(a, b) for a, b in zip(expected, after(X), strict=True))
