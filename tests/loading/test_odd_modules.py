"""Networks of library classes that lack something, or have two things of one name: refused with the module's place."""

import contextlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import InjectError, LoadError
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


KINDS = sorted({kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}, key=str)


class _Stored:
    """A tensor of any type of numbers in a file, made of bytes there."""

    def __init__(self, kind, like):
        self.kind, self.like = kind, like

    def __reduce__(self):
        numbers = torch.zeros(max(1, self.like.numel()) * 16, dtype=torch.uint8).untyped_storage()
        storage = torch.storage.TypedStorage(wrap_storage=numbers, dtype=torch.uint8, _internal=True)
        shape = tuple(self.like.shape), tuple(self.like.stride())
        return torch._utils._rebuild_tensor_v3, (storage, 0, *shape, False, OrderedDict(), self.kind, {})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_numbers_of_any_type_are_refused_or_dealt_with(kind, tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.zeros(1, 3, 8, 8)
    net[1]._buffers["num_batches_tracked"] = _Stored(kind, net[1].num_batches_tracked)
    torch.save(net, tmp_path / "net.pt")
    with contextlib.suppress(InjectError):
        found = si.load(tmp_path / "net.pt")
        injected = si.plan(found, x, at="*").apply(found)
        assert si.verify(found, injected, x).passed


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if str(kind).startswith(("torch.q", "torch.bits", "torch.uint4"))]
)
def test_numbers_that_torch_cannot_copy_are_refused(kind, tmp_path):
    net = network()
    net[1]._buffers["running_mean"] = _Stored(kind, net[1].running_mean)
    torch.save(net, tmp_path / "net.pt")
    with pytest.raises(LoadError, match="can't be right") as caught:
        si.load(tmp_path / "net.pt")
    assert "can't even copy" in caught.value.seen
    assert "it is `1`" in caught.value.seen
