"""Networks of library classes that lack something, or have two things of one name: refused with the module's place."""

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import LoadError
from tests.common import randomise


def network():
    return randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(2, 2)), nn.ReLU6())
    ).eval()


def without_a_buffer(net):
    del net[1]._buffers["running_mean"]


def without_hooks(net):
    del vars(net[2][0])["_backward_hooks"]


def child_called_as_a_table(net):
    net[2]._modules["_modules"] = nn.ReLU()


def child_called_as_a_setting(net):
    net[1]._modules["eps"] = nn.ReLU()


def parameter_and_child(net):
    net[0]._modules["weight"] = nn.ReLU()


def weight_that_is_none(net):
    vars(net[2][0])["weight"] = net[2][0]._parameters.pop("weight").tolist()


def bounds_the_wrong_way_round(net):
    net[3].min_val = 9.0


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (bounds_the_wrong_way_round, "3"),
        (without_a_buffer, "1"), (without_hooks, "2.0"), (child_called_as_a_table, "2"), (child_called_as_a_setting, "1"),
        (parameter_and_child, "0"), (weight_that_is_none, "2.0"),
    ],
)  # fmt: skip
def test_the_module_is_named(spoil, place, tmp_path):
    net = network()
    torch.save(net, tmp_path / "net.pt")
    si.load(tmp_path / "net.pt")
    spoil(net)
    torch.save(net, tmp_path / "net.pt")
    with pytest.raises(LoadError) as caught:
        si.load(tmp_path / "net.pt")
    assert f"it is `{place}`" in caught.value.seen
