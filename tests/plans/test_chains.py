"""Several blocks in one plan: others in other stages, and chains at one site, where every block must act."""

import pickle

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import se_inject as si
from se_inject.blocks import registry as blocks
from se_inject.errors import AlreadyInjected, OptionError, SurgeryError
from se_inject.plans.value import Plan
from tests.common import randomise

POSITIONS = ["standard", "pre", "post", "identity", "conv3x3"]
X = torch.empty(2, 3, 32, 32, device="meta")


class Affine(nn.Module):
    """a·x + b: two of these in another order, or one of them missing, give another number."""

    def __init__(self, channels: int, *, a: float = 2.0, b: float = 1.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.b = nn.Parameter(torch.tensor(b))

    def forward(self, x):
        return self.a * x + self.b


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(blocks._registered, "affine", Affine)


def affine(network, a, b, **options):
    return si.plan(network, options.pop("x", X), block="affine", a=a, b=b, init="paper", **options)


def resnet(seed=0):
    torch.manual_seed(seed)
    return randomise(torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1]), seed).eval()


class Unit(nn.Module):
    """A residual unit as a formula can be written for it: F(x) = c·x, S(x) = x."""

    def __init__(self, c: float, projects: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.conv.weight, c)
        self.shortcut = nn.Conv2d(1, 1, 1, bias=False) if projects else nn.Identity()

    def forward(self, x):
        y = self.conv(x)
        y += self.shortcut(x)
        return y


def numbers(network):
    with torch.no_grad():
        return float(network(torch.full((1, 1, 4, 4), 5.0, dtype=torch.double)).mean())


# -- every block acts, in the order of addition ------------------------------------------------------------


@pytest.mark.parametrize("position", ["standard", "pre", "post", "identity"])
def test_blocks_at_one_value_act_one_after_the_other(position):
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), Unit(3.0)).double().eval()
    nn.init.ones_(network[0].weight)
    x = torch.empty(1, 1, 4, 4, device="meta", dtype=torch.double)
    links = [(2.0, 1.0), (3.0, -4.0), (0.5, 7.0)]
    gates = [(lambda v, a=a, b=b: a * v + b) for a, b in links]

    def chain(v, order):
        for number in order:
            v = gates[number](v)
        return v

    seen = set()
    for order in [(0, 1), (1, 0), (0, 1, 2), (2, 1, 0), (1, 2, 0)]:
        plan, *others = [affine(network, *links[number], at="1.*", position=position, x=x) for number in order]
        for other in others:
            plan = plan + other
        here = lambda place, v, order=order: chain(v, order) if place == position else v  # noqa: E731
        expected = here("post", here("standard", 3 * here("pre", 5.0)) + here("identity", 5.0))
        injected = plan.apply(network)
        assert numbers(injected) == pytest.approx(expected, abs=1e-12)
        assert numbers(pickle.loads(pickle.dumps(injected))) == pytest.approx(expected, abs=1e-12)
        assert numbers(Plan.from_json(plan.to_json()).apply(network)) == pytest.approx(expected, abs=1e-12)
        assert numbers(si.plan_of(injected).apply(network)) == pytest.approx(expected, abs=1e-12)
        seen.add(expected)
    assert len(seen) == 5


def test_blocks_at_all_positions_of_one_unit_at_once():
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), Unit(3.0)).double().eval()
    nn.init.ones_(network[0].weight)
    x = torch.empty(1, 1, 4, 4, device="meta", dtype=torch.double)
    links = {"post": (2.0, 1.0), "identity": (3.0, -4.0), "pre": (0.5, 7.0), "standard": (1.5, 2.0)}
    plan, *others = [affine(network, *link, at="1.*", position=position, x=x) for position, link in links.items()]
    for other in others:
        plan = plan + other
    pre = 0.5 * 5 + 7
    standard = 1.5 * (3 * pre) + 2
    identity = 3 * 5 - 4
    assert numbers(plan.apply(network)) == pytest.approx(2 * (standard + identity) + 1, abs=1e-12)


class Flat(nn.Module):
    """Two units in one forward: what the first returns is what the second reads twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 1, 1, bias=False)
        self.two = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.one.weight, 3.0)
        nn.init.constant_(self.two.weight, 0.25)

    def forward(self, x):
        x = x + self.one(x)
        return x + self.two(x)


@pytest.mark.parametrize("first", ["post", "pre"])
@pytest.mark.parametrize("in_turns", [False, True])
def test_a_block_for_all_stands_before_one_for_some(first, in_turns):
    network = Flat().double().eval()
    x = torch.empty(1, 1, 4, 4, device="meta", dtype=torch.double)
    plans = {
        "post": affine(network, 2.0, 1.0, at="one", position="post", x=x),
        "pre": affine(network, 3.0, -4.0, at="two", position="pre", x=x, name="gate"),
    }
    second = {"post": "pre", "pre": "post"}[first]
    if in_turns and first == "post":  # the second site's input is another value by then: it must be planned again
        injected = plans["post"].apply(network)
        injected = affine(injected, 3.0, -4.0, at="two", position="pre", x=x, name="gate").apply(injected)
    elif in_turns:
        injected = plans["post"].apply(plans["pre"].apply(network))
    else:
        injected = (plans[first] + plans[second]).apply(network)
    middle = 2 * (5 + 15) + 1
    assert numbers(injected) == pytest.approx(middle + 0.25 * (3 * middle - 4), abs=1e-12)


# -- other blocks in other stages --------------------------------------------------------------------------


def test_se_in_one_stage_and_cbam_in_another():
    network = resnet()
    first, second = si.plan(network, X, stages=[3]), si.plan(network, X, stages=[4], block="cbam")
    plan = second + first
    assert [(step.stage, step.block, step.block_name) for step in plan.steps] == [(3, "se", "se"), (4, "cbam", "se")]
    injected = plan.apply(network)
    assert si.verify(network, injected, X).passed
    assert [type(module).__name__ for module in (injected.layer3[0].se, injected.layer4[0].se)] == [
        "SqueezeExcitation",
        "ConvolutionalBlockAttention",
    ]
    assert plan.cost().added == first.cost().added + second.cost().added
    assert [row.block for row in plan.cost().rows] == ["se", "cbam"]


def test_a_chain_has_a_row_a_name_and_parameters_for_each_link():
    network = resnet()
    links = [
        si.plan(network, X, stages=[4], reduction=4),
        si.plan(network, X, stages=[3, 4], block="eca"),
        si.plan(network, X, stages=[4], reduction=8),
    ]
    plan = links[0] + links[1] + links[2]
    assert [step.path for step in plan.steps] == ["layer3.0.se", "layer4.0.se", "layer4.0.se_2", "layer4.0.se_3"]
    cost = plan.cost()
    assert len(cost.rows) == 4
    assert cost.added == sum((link.cost().added for link in links[1:]), links[0].cost().added)
    injected = plan.apply(network)
    assert cost.added.params == sum(p.numel() for p in si.injected_parameters(injected))
    assert si.verify(network, injected, X).passed
    assert si.plan_of(injected).steps == plan.steps
    text = str(plan)
    assert "layer4.0.se_3" in text
    before = {key: value.clone() for key, value in network.state_dict().items()}
    kinds = [type(module) for module in network.modules()]
    back = si.eject_(injected)
    assert list(back.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in back.state_dict().items())
    assert [type(module) for module in back.modules()] == kinds


def test_a_number_that_the_owner_has_is_left_out():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), Other())
    x = torch.empty(1, 3, 8, 8, device="meta")
    plan = si.plan(network, x, at="1.*") + si.plan(network, x, at="1.*", block="eca")
    assert [step.path for step in plan.steps] == ["1.se", "1.se_3"]
    assert si.verify(network, plan.apply(network), x).passed


class Other(nn.Module):
    """It has a child of the name that a second block would get."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.se_2 = nn.ReLU()

    def forward(self, x):
        return self.se_2(x + self.conv(x))


@pytest.mark.parametrize("stored", [(True, False), (False, True), (True, True)])
def test_stored_plans_add_up_too(stored):
    network = resnet()
    plans = [si.plan(network, X, stages=[4]), si.plan(network, X, stages=[3, 4], block="eca")]
    expected = (plans[0] + plans[1]).steps
    one, other = (Plan.from_json(p.to_json()) if flag else p for p, flag in zip(plans, stored, strict=True))
    both = one + other
    assert (both.trace is None) == all(stored)
    assert both.fitted(network).steps == expected
    assert si.plan_of(both.apply(network)).steps == expected


def test_a_plan_of_a_scrambled_network_is_in_data_flow_order():
    class Scrambled(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = BasicBlock(8, 8)
            self.first = BasicBlock(8, 8)
            self.stem = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.last(self.first(self.stem(x)))

    network = Scrambled()
    plan = si.plan(network, X)
    told = si.plan_of(plan.apply(network), X)
    assert [step.site for step in told.steps] == [step.site for step in plan.steps] == ["first.bn2", "last.bn2"]


# -- what does not add up ----------------------------------------------------------------------------------


def test_plans_for_different_networks_or_inputs():
    network = resnet()
    plan = si.plan(network, X, stages=[4])
    with pytest.raises(OptionError, match="different networks") as caught:
        plan + si.plan(resnet(1), X, stages=[3])
    assert "another ResNet" in caught.value.seen
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(OptionError, match="different networks"):
        plan + si.plan(tiny, X)
    with pytest.raises(OptionError, match="different inputs"):
        plan + si.plan(network, torch.empty(2, 3, 64, 64, device="meta"), stages=[3])
    with pytest.raises(TypeError):
        plan + 3


def test_a_stored_plan_that_does_not_fit_the_other():
    network = resnet()
    deep = torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1])
    stored = Plan.from_json(si.plan(deep, X, stages=[1]).to_json())
    with pytest.raises(SurgeryError, match=r"step 4 of the plan .*`layer1.1.bn2`"):
        si.plan(network, X, stages=[3, 4]) + stored


def test_a_chain_is_planned_at_once():
    network = resnet()
    first = si.plan(network, X, stages=[4])
    second = Plan.from_json(si.plan(network, X, stages=[4], block="eca", name="eca").to_json())
    injected = first.apply(network)
    keys = list(injected.state_dict())
    with pytest.raises(AlreadyInjected, match="hold blocks") as caught:
        second.apply_(injected)
    assert "add their plans up" in caught.value.hint
    assert list(injected.state_dict()) == keys


def test_two_blocks_of_one_name():
    network = resnet()
    plan = si.plan(network, X, stages=[4])
    twice = Plan((*plan.steps, *plan.steps), plan.model, plan.inputs)
    kinds = [type(module) for module in network.modules()]
    with pytest.raises(SurgeryError, match=r"`layer4.0.se` is to become two blocks"):
        twice.apply_(network)
    assert [type(module) for module in network.modules()] == kinds
