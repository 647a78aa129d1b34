"""A trace is a value: asking it for more does not change it, and what is counted is what the observed call did."""

import dataclasses

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.tracing import Counts, Untraceable, float_like, observe_model, returns_alike, training_graph

X = torch.rand(2, 3, 8, 8)


class Auxiliary(nn.Module):
    """Calls a part in training alone, as GoogLeNet does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.aux = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

    def forward(self, x):
        y = self.conv(x)
        return y + self.aux(y) if self.training else y


class Again(nn.Module):
    """Calls its unit ``times`` times in training, once in eval."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + self.c2(torch.relu(self.c1(x)))

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.stem, self.unit, self.last = nn.Conv2d(3, 8, 3, padding=1), self.Unit(), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.unit(self.stem(x))
        for _ in range(self.times - 1 if self.training else 0):
            y = self.unit(y)
        return y + self.last(torch.relu(y))


def contents(trace):
    return {
        field.name: dict(value) if hasattr(value := getattr(trace, field.name), "items") else value
        for field in dataclasses.fields(trace)
        if field.name != "known"
    }


def test_asking_for_the_training_graph_changes_nothing():
    trace = observe_model(Auxiliary(), X)
    before = contents(trace)
    graph, _ = training_graph(trace, trace.graphs[""])
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["conv", "aux"]
    assert contents(trace) == before
    assert "aux" not in trace.calls
    assert training_graph(trace, trace.graphs[""])[0] is graph


def test_a_trace_is_frozen():
    trace = observe_model(Auxiliary(), X)
    with pytest.raises(dataclasses.FrozenInstanceError):
        trace.macs = 0
    for name in ("graphs", "failures", "calls", "kinds", "canonical"):
        with pytest.raises(TypeError):
            getattr(trace, name)["new"] = 1


def test_a_training_graph_that_cannot_be_written_down_is_refused_each_time():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return y * torch.rand(1).item() if self.training else y

    trace = observe_model(Draws(), X)
    for _ in range(2):
        with pytest.raises(Untraceable, match="in training: "):
            training_graph(trace, trace.graphs[""])


@pytest.mark.parametrize("times", [2, 3])
def test_cost_is_that_of_eval_however_often_training_calls_a_unit(times):
    costs = []
    for again in (1, times):
        torch.manual_seed(0)
        plan = si.plan(Again(again).eval(), X)
        costs.append(({row.site: row.cost for row in plan.cost().rows}, plan.cost().before))
        assert plan.trace.calls["unit"] == 1
    assert costs[0] == costs[1]


def test_nodes_know_the_path_and_the_work_of_the_child_they_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(3, 3, 3, padding=1)
            self.other = self.one

        def forward(self, x):
            return self.other(self.one(x))

    trace = observe_model(nn.Sequential(Shared()), X)
    calls = [node for node in trace.graphs["0"].graph.nodes if node.op == "call_module"]
    assert [node.meta["path"] for node in calls] == ["0.one", "0.one"]
    assert [node.meta["counts"] for node in calls] == [Counts(1, 2 * 3 * 64 * 27)] * 2
    assert trace.child("0", "other") == "0.one"
    assert trace.calls["0.one"] == 2


def test_float_like_is_the_first_floating_parameter():
    assert float_like(nn.Sequential(nn.ReLU(), nn.Linear(2, 2).half())).dtype == torch.float16
    assert float_like(nn.ReLU()).dtype == torch.float32
    assert float_like(nn.Linear(2, 2, device="meta")).is_meta


def test_a_network_by_name_has_the_same_weights_each_time():
    """What a detector computes depends on its weights: equal commands give equal figures."""
    from se_inject.user_code import from_zoo

    state = torch.get_rng_state()
    one, other = (from_zoo("torchvision", "squeezenet1_1").state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(torch.get_rng_state(), state)


class Doubled(nn.Module):
    """Returns two values in training, if it has been set so."""

    def __init__(self, pair, norm):
        super().__init__()
        self.pair = pair
        self.norm = norm

    def forward(self, x):
        y = self.norm(x)
        if self.training and (self.pair or self.norm.weight is None or x.shape[-1] == 4):
            return y, x
        return y


@pytest.mark.parametrize("order", [1, -1])
def test_modules_that_return_alike_in_training_differ_in_nothing_that_is_read(order):
    """One of each kind is observed in training; what an attribute, a parameter or a size decides is of another kind."""
    kinds = [
        (False, nn.BatchNorm2d(3), True),
        (False, nn.BatchNorm2d(3), True),
        (True, nn.BatchNorm2d(3), False),
        (False, nn.BatchNorm2d(3, affine=False), False),
        (True, nn.BatchNorm2d(3), False),
        (False, nn.BatchNorm2d(3), True),
    ][::order]
    parts = [Doubled(pair, norm) for pair, norm, _ in kinds] + [nn.AvgPool2d(2), Doubled(False, nn.BatchNorm2d(3))]
    trace = observe_model(nn.Sequential(*parts).eval(), torch.rand(2, 3, 8, 8))
    assert [returns_alike(trace, str(number)) for number in range(len(kinds))] == [alike for *_, alike in kinds]
    assert not returns_alike(trace, str(len(parts) - 1))
