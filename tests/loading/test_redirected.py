"""Networks saved after a library bound another forward on the instance: the same results, or an error that says why."""

import importlib
import sys

import pytest
import torch
from timm.models.fasternet import Partial_conv3
from torch import nn

import se_inject as si
from tests.common import randomise

IMAGES = torch.rand(2, 8, 12, 12)
NET = """
from torch import nn

class Act(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(x) + 1

    def forward_fuse(self, x):
        return self.act(x)
"""


def own(folder):
    (folder / "mynets.py").write_text(NET)
    sys.modules.pop("mynets", None)
    return importlib.import_module("mynets").Act()


def net_of(activation):
    return randomise(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 4, 1))).eval()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_bound_on_the_instance(when, tmp_path, monkeypatch):
    """The block acts on what the module returns, whichever forward that is; in the file as well."""
    monkeypatch.syspath_prepend(str(tmp_path))
    net = net_of(own(tmp_path))
    if when == "before":
        net[2].forward = net[2].forward_fuse
    net = si.plan(net, IMAGES, at="*", init="paper").apply(net)
    blocks = [path for path, _ in net.named_modules() if path.endswith(".se")]
    assert ("2.se" in blocks) == (when == "after")
    if when == "after":
        net[2].forward = net[2].forward_fuse
    expected = net(IMAGES)
    torch.save(net, tmp_path / "net.pt")
    found = si.load(tmp_path / "net.pt", trust=["mynets"])
    assert torch.equal(found(IMAGES), expected)
    with torch.no_grad():
        found.get_submodule(blocks[0]).fc2.bias += 1
    assert not torch.equal(found(IMAGES), expected)  # it acts
    with pytest.raises(si.InjectError, match="mynets"):
        si.load(tmp_path / "net.pt")


@pytest.mark.parametrize("name", ["forward_slicing", "forward_split_cat"])
def test_a_librarys_class_that_chooses_its_forward(name, tmp_path):
    net = randomise(nn.Sequential(Partial_conv3(8, 2, "split_cat"), nn.Conv2d(8, 4, 1), nn.ReLU())).eval()
    net[0].forward = getattr(net[0], name)
    net = si.plan(net, IMAGES, at="*").apply(net)
    torch.save(net, tmp_path / "net.pt")
    assert torch.equal(si.load(tmp_path / "net.pt")(IMAGES), net(IMAGES))
