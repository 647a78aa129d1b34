"""A compiled, scripted or quantised child costs its own places, not the network."""

import warnings

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import UnsupportedModel
from tests.common import randomise

X = torch.rand(2, 3, 16, 16)


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def network():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, padding=1), Unit(), Unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return randomise(nn.Sequential(*parts)).eval()


def compiled(module):
    return torch.compile(module, backend="eager")


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def quantised(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {nn.Linear})[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [compiled, scripted, quantised])
def test_a_foreign_head_leaves_all_places(wrap):
    model = network()
    model[5] = wrap(model[5])
    with torch.no_grad():
        expected = model(X)
    before = [(type(module), sorted(vars(module)), module.training) for module in model.modules()]
    plan = si.plan(model, X)
    assert [step.path for step in plan.steps] == ["1.se", "2.se"]
    assert [(type(module), sorted(vars(module)), module.training) for module in model.modules()] == before
    after = plan.apply(model)
    with torch.no_grad():
        assert torch.equal(after(X), expected)
    assert si.verify(model, after, X).passed
    for block in (after.get_submodule(step.path) for step in plan.steps):
        nn.init.normal_(block.fc2.weight)
    with torch.no_grad():
        assert not torch.equal(after(X), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("wrap", "kind"), [(compiled, "compiled"), (scripted, "TorchScript")])
def test_a_foreign_unit_is_left_alone_with_the_reason(wrap, kind):
    model = network()
    model[1] = wrap(model[1])
    sites = si.find_sites(model, X)
    assert [site.owner for site in sites] == ["2"]
    assert [(item.address, kind in item.reason) for item in sites.refused] == [("1", True)]
    after = si.inject(model, X)
    with torch.no_grad():
        assert torch.equal(after(X), model(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [compiled, scripted])
def test_a_network_of_nothing_else_is_refused(wrap):
    model = nn.Sequential(wrap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), nn.ReLU())
    with pytest.raises(UnsupportedModel, match="its `0` is"):
        si.plan(model, X)


def test_wrappers_are_refused_wherever_they_are():
    model = network()
    model[5] = nn.DataParallel(model[5])
    with pytest.raises(UnsupportedModel, match="its `5` is wrapped in DataParallel"):
        si.plan(model, X)


# -- unflattened programs ----------------------------------------------------------------------------------


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


class Generates(nn.Module):
    """A unit whose branch comes from a generator."""

    def __init__(self):
        super().__init__()
        self.body = Yields()

    def forward(self, x):
        first, second = self.body(x)
        return torch.relu(x + first + 0 * second)


class Yields(Gate):
    def forward(self, x):
        x = self.conv(x)
        yield x
        yield x * 2


@pytest.fixture(scope="module")
def unflattened():
    return torch.export.unflatten(torch.export.export(Gate().eval(), (torch.rand(2, 8, 16, 16),)))


def test_an_unflattened_program_is_refused_by_what_it_is(unflattened):
    with pytest.raises(UnsupportedModel, match="it is an unflattened exported program") as caught:
        si.plan(unflattened, torch.rand(2, 8, 16, 16))
    assert "program.module()" in caught.value.hint


def test_as_a_child_it_costs_its_own_places(unflattened):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Gate(), unflattened, Gate()).eval()
    image = torch.rand(2, 3, 16, 16)
    plan = si.plan(network, image)
    assert [step.owner.partition(".")[0] for step in plan.steps] == ["1", "3"]
    si.verify(network, plan.apply(network), image).expect_passed()


def test_what_a_child_generates_is_no_tensor():
    found = si.find_sites(nn.Sequential(nn.Conv2d(3, 8, 3), Generates()).eval(), torch.rand(2, 3, 16, 16))
    assert any("iterates over a generator" in str(refused) for refused in (*found.refused, *found.missed))
