"""Operators that a process registers with ``torch.library`` are called by its own networks, and by no stranger's file."""

import copy
import io
import json
import sys

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import LoadError, UntrustedGlobals
from se_inject.forwards import function_name, function_named
from tests.common import randomise
from tests.files import hostile

X = torch.rand(2, 3, 16, 16)


@torch.library.custom_op("se_tests::bent", mutates_args=())
def bent(value: torch.Tensor, slope: float) -> torch.Tensor:
    return torch.where(value > 0, value, value * slope)


bent.register_fake(lambda value, slope: torch.empty_like(value))
bent.register_autograd(
    lambda ctx, grad: (torch.where(ctx.saved_tensors[0] > 0, grad, grad * ctx.slope), None),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(inputs[0]), setattr(ctx, "slope", inputs[1]))[0],
)
LIBRARY = torch.library.Library("_se__tests", "DEF")
LIBRARY.define("halved__sum(Tensor value, Tensor other) -> Tensor")
LIBRARY.impl("halved__sum", lambda value, other: (value + other) / 2, "CompositeImplicitAutograd")


class Called(nn.Module):
    """The unit's own forward calls the function that ``custom_op`` gave."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return bent(self.norm(self.conv(x)), 0.1) + x


class Packet(Called):
    def forward(self, x):
        return torch.ops.se_tests.bent(self.norm(self.conv(x)) + x, slope=0.1)


class Overload(Called):
    def forward(self, x):
        return torch.ops.se_tests.bent.default(
            torch.ops._se__tests.halved__sum(self.norm(self.conv(x)), 0.5 * self.conv(x)) + x, 0.1
        )


def network(unit):
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), unit(), unit())).eval()


@pytest.mark.parametrize("unit", [Called, Packet, Overload])
def test_a_network_of_this_process_may_call_them(unit, tmp_path):
    plain = network(unit)
    injected = si.inject(plain, X)
    assert not si.find_sites(plain, X).refused
    assert torch.equal(injected(X), plain(X))
    assert si.verify(plain, injected, X).passed
    trained = copy.deepcopy(injected)
    for child in trained[1:]:
        for parameter in child.se.parameters():
            nn.init.normal_(parameter)
    stream = io.BytesIO()
    torch.save(trained, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert torch.equal(again(X), trained(X))
    assert not torch.equal(trained(X), plain(X))
    path = tmp_path / "network.pt"
    torch.save(trained, path)
    with pytest.raises(UntrustedGlobals):
        si.load(path)
    assert torch.equal(si.load(path, trust=__name__.partition(".")[0])(X), trained(X))
    si.eject_(again)
    assert torch.equal(again(X), plain(X))


@pytest.mark.parametrize("name", ["ops:se_tests.bent", "ops:se_tests.bent.default", "ops:_se__tests.halved__sum"])
def test_a_strangers_file_may_not_name_them(name, tmp_path):
    assert function_name(function_named(name)) == name
    arguments = ["set", ["y"], name, [{"node": "input"}, 0.1], {}]
    body = {"steps": [], "was_none": {}, "lines": [arguments, ["return", {"node": "y"}]]}
    path = tmp_path / "network.pt"
    path.write_bytes(hostile.saved(hostile.Injected(json.loads(json.dumps(body)))))
    with pytest.raises(LoadError, match=f"uses the function `{name}`") as caught:
        si.load(path)
    assert "operators of torch and torchvision alone" in caught.value.hint


def test_an_operator_that_nobody_registered_leaves_nothing_behind():
    with pytest.raises(LoadError, match="`nobodys::operator`, which is not registered"):
        function_named("ops:nobodys.operator.default")
    assert "nobodys" not in vars(torch.ops)
    assert "torch.ops.nobodys" not in sys.modules


@pytest.mark.parametrize("name", ["ops:image.read_file", "ops:load_library.x", "ops:aten.__and__", "ops:aten", "ops:"])
def test_some_operators_nobody_may_call(name):
    with pytest.raises(LoadError):
        function_named(name)


@pytest.mark.parametrize("name", ["ops:se_tests.bent", "ops:aten.set_data"])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_a_fused_forward_was_before_is_looked_at_too(name, depth, tmp_path):
    """Taking the fusion back would make it the forward."""
    harmless = {"steps": [], "was_none": {}, "lines": [["return", {"node": "input"}]]}
    body = {**harmless, "lines": [["set", ["y"], name, [{"node": "input"}, 0.1], {}], ["return", {"node": "y"}]]}
    for _ in range(depth):
        body = {**harmless, "fused": {"before": body, "tails": {}}}
    path = tmp_path / "network.pt"
    path.write_bytes(hostile.saved(hostile.Injected(body)))
    with pytest.raises(LoadError, match=f"uses the function `{name}`"):
        si.load(path)


@pytest.mark.parametrize(
    "before", [{"lines": 1}, {"lines": [["set"]]}, {"lines": [[]]}, {"fused": 1}, {"fused": {"a": 1}}]
)
def test_what_a_fused_forward_was_before_may_be_damaged(before, tmp_path):
    body = {"steps": [], "was_none": {}, "lines": [["return", {"node": "input"}]]}
    path = tmp_path / "network.pt"
    path.write_bytes(hostile.saved(hostile.Injected({**body, "fused": {"before": before, "tails": {}}})))
    with pytest.raises(LoadError, match="unknown form"):
        si.load(path)


class Merged(Called):
    def forward(self, x):
        return torch.relu(torch.ops._se__tests.halved__sum(self.norm(self.conv(x)), x))


def test_an_operator_that_merges_is_named_and_its_branch_has_an_address():
    plain = network(Merged)
    refused = si.find_sites(plain, X).refused
    assert [each.address for each in refused] == ["1.halved__sum", "2.halved__sum"]
    assert "custom operator `_se__tests.halved__sum`" in refused[0].reason
    injected = si.inject(plain, X, at="1.norm")
    assert torch.equal(injected(X), plain(X))
    assert si.verify(plain, injected, X).passed
