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
