"""Where blocks go in networks of unusual forms, what is said where none can, and the strides of their stages."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import se_inject as si
from se_inject.errors import NoSites, OptionError, SiteNotFound
from se_inject.sites.site import HeldBack
from tests.networks import kin, layouts  # noqa: F401 - add to PLACES
from tests.networks.places import PLACES, C, branch, conv

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PLACES)
def test_the_blocks_are_where_an_expert_puts_them(name):
    places = PLACES[name]
    network = places.make().eval()
    found = si.find_sites(network, X)
    assert tuple(site.address for site in found) == places.chosen
    attended = [site.address for site in found.all_sites if site.held_back is HeldBack.ATTENTION]
    assert tuple(attended) == places.attended
    if places.missed:
        assert len(found.missed) == 2 and all(places.missed in item.reason for item in found.missed)
        with pytest.raises(NoSites, match="2 units") as caught:
            si.plan(network, X)
        assert places.missed in str(caught.value)
    if not places.chosen and not places.missed:
        with pytest.raises(NoSites):
            si.plan(network, X)
    if not places.chosen:
        return
    after = si.inject(network, X)
    verdict = si.verify(network, after, X, fresh=True)
    assert [check for check in verdict.checks if check.passed is False] == []
    with torch.no_grad():
        assert torch.equal(after(X), network(X))


@pytest.mark.parametrize("name", ["ReversedDifference", "Lerp", "StackAndMean", "Streams", "PreActivation"])
@pytest.mark.parametrize("position", ["pre", "post", "identity"])
def test_positions_of_unusual_units(name, position):
    network = PLACES[name].make().eval()
    if (name, position) == ("PreActivation", "pre"):
        with pytest.raises(OptionError, match="shared with its shortcut"):
            si.plan(network, X, position=position)
        return
    after = si.inject(network, X, position=position)
    assert si.verify(network, after, X, fresh=True).passed


class Half(nn.Module):
    """A unit that two of three can take a block."""

    def __init__(self, refuses):
        super().__init__()
        self.branch, self.refuses = branch(), refuses

    def forward(self, x):
        y = self.branch(x)
        if self.refuses and float(y.mean()) > 99:
            return x
        return F.relu(x + y)


def test_units_without_a_block_are_counted_in_the_plan_and_the_verdict():
    network = nn.Sequential(conv(3), Half(False), Half(True), Half(False), Half(True), Half(False))
    plan = si.plan(network, X)
    assert [step.site for step in plan.steps] == ["1.branch", "3.branch", "5.branch"]
    assert any(note.startswith("2 of 5 units can take no block, most often: ") for note in plan.notes)
    (line,) = (
        check.detail
        for check in si.verify(network, plan.apply(network), X).checks
        if check.name == "blocks where units are"
    )
    assert line.startswith("3 of 5 residual units; 2 can take none, most often: ")
    partly = si.inject(network, X, at="1.*")
    line = next(c.detail for c in si.verify(network, partly, X).checks if c.name == "blocks where units are")
    assert line.startswith("1 of 5 residual units; 2 not chosen; 2 can take none")


def test_a_verdict_does_not_pass_over_a_network_whose_units_have_none():
    network = nn.Sequential(conv(3), Half(True), Half(True))
    after = si.inject(network, X, at="0.*")
    check = next(c for c in si.verify(network, after, X).checks if c.name == "blocks where units are")
    assert check.passed is None and check.detail.startswith("0 of 2 units; 2 can take none, most often: ")


class Stem(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.stem, self.unit = first, nn.LazyConv2d(C, 3, padding=1), PLACES["Lerp"].make()[1]

    def forward(self, x):
        return self.unit(self.stem(self.first(x)))


class Slices(nn.Module):
    def forward(self, x):
        return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


class Patches(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, c, h // 8, 8, w // 8, 8).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 64, h // 8, w // 8)


class LastFirst(nn.Module):
    """The image comes with its channels last."""

    def forward(self, x):
        return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("first", "stride", "shape"),
    [
        (nn.PixelUnshuffle(2), 2, (1, 3, 64, 64)),
        (Slices(), 2, (1, 3, 64, 64)),
        (Patches(), 8, (1, 3, 64, 64)),
        (nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(3, 3, 5, 2)), 4, (1, 3, 97, 97)),
        (nn.ZeroPad2d(9), 1, (1, 3, 40, 40)),
        (nn.Upsample(scale_factor=2), 0.5, (1, 3, 32, 32)),
        (nn.ConvTranspose2d(3, 3, 4, 2, 1), 0.5, (1, 3, 32, 32)),
        (LastFirst(), 1, (1, 48, 32, 3)),
        (nn.AdaptiveAvgPool2d(16), 4, (1, 3, 64, 64)),
    ],
)
def test_strides_are_counted_from_the_networks_input(first, stride, shape):
    network = Stem(first)
    network(torch.zeros(shape))
    (stage,) = si.find_sites(network, torch.zeros(shape)).table
    assert stage.strides == ((stride, stride),)


def test_functions_and_dilation_without_padding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C, 3, 3, 3))
            self.unit = PLACES["Lerp"].make()[1]

        def forward(self, x):
            x = F.avg_pool2d(F.conv2d(x, self.weight, None, 2), 3, 2)
            x = F.max_pool2d(F.conv2d(x, self.weight.repeat(1, 6, 1, 1)[:, :C], dilation=2), 2)
            return self.unit(x)

    (stage,) = si.find_sites(Net().eval(), torch.zeros(1, 3, 127, 127)).table
    assert stage.strides == ((8.0, 8.0),) and stage.aliases == ("C3",)


def levels():
    def stage(inputs, outputs):
        unit = PLACES["Lerp"].make()[1]
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2), *unit)

    return nn.Sequential(nn.Conv2d(3, C, 3, 2), *(stage(C, C) for _ in range(3)))


def test_stages_are_chosen_by_level_and_as_the_last():
    network = levels()
    found = si.find_sites(network, torch.zeros(1, 3, 111, 111))
    assert [stage.aliases for stage in found.table] == [("C2",), ("C3",), ("C4",)]
    assert {site.stage for site in found.stages("C3")} == {2}
    assert {site.stage for site in found.stages("last")} == {3}
    assert {site.stage for site in found.stages("C2", "last")} == {1, 3}
    with pytest.raises(SiteNotFound, match="C5"):
        found.stages("C5")
    plan = si.plan(network, torch.zeros(1, 3, 111, 111), stages="C4")
    assert {step.stage for step in plan.steps} == {3}


def test_sites_are_chosen_by_a_predicate():
    network, example = levels(), torch.zeros(1, 3, 111, 111)
    found = si.find_sites(network, example)
    late = found.where(lambda site: site.stage > 1)
    assert {site.stage for site in late} == {2, 3}
    assert {site.stage for site in late.where(lambda site: site.stride[0] == 16)} == {3}
    plan = si.plan(network, example, at=lambda site: site.stage == 2)
    assert {step.stage for step in plan.steps} == {2}
    plan = si.plan(network, example, at=["1.1.*", lambda site: site.stage == 3])
    assert {step.stage for step in plan.steps} == {1, 3}
    with pytest.raises(SiteNotFound, match="predicate"):
        found.where(lambda site: False)
    with pytest.raises(SiteNotFound, match="predicate"):
        si.plan(network, example, at=lambda site: site.channels > 9999)


def test_a_buffer_is_gated_when_it_is_full():
    network = PLACES["Buffer"].make().eval()
    after = si.inject(network, X)
    block = next(module for path, module in after.named_modules() if path.startswith("1.0.se"))
    seen = []
    block.register_forward_hook(lambda _, args, out: seen.append((args[0].clone(), out)))
    with torch.no_grad():
        block.fc2.bias.fill_(3.0)
        x = after[0](X)
        y = network[1][0].branch(x)
        full = torch.cat([y[:, : C // 2], y[:, C // 2 :] + 0.5 * y[:, : C // 2]], 1)
        result = after[1][0](x)
        assert torch.equal(seen[0][0], full) and not torch.equal(seen[0][1], full)
        assert torch.equal(result, torch.relu(x + seen[0][1]))


@pytest.mark.parametrize(
    "name", ["PartsThatAreNoUnits", "LayersWithinWhatCannotBeTraced", "UnitsThatHalve", "DualPaths"]
)
def test_no_unit_is_missed_that_has_all_its_blocks(name):
    found = si.find_sites(PLACES[name].make().eval(), X)
    assert found.missed == () and not found.shortfall()


def test_a_dual_path_has_its_block_on_what_is_added():
    network = PLACES["DualPaths"].make().eval()
    after = si.inject(network, X, init="paper").eval()
    x = after[1](after[0](X))
    for unit in after[2]:
        y = unit.last(unit.body(torch.cat(x, 1)))
        x = x[0] + unit.se(y[:, :C]), torch.cat([x[1], y[:, C:]], 1)
    assert torch.equal(after(X), after[3:](x))
