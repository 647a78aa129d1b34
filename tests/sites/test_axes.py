"""Dimensions that are divided and put together: the block gates the channels of each example, computed independently; or the reason is true."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import se_inject as si
from se_inject.errors import NoSites
from se_inject.sites.axes import Part, parts_of_reshape
from se_inject.surgery import injected_blocks
from tests.common import randomise
from tests.networks import axes
from tests.networks.axes import UNITS

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def made(unit, seed=0):
    torch.manual_seed(seed)
    return randomise(axes.network(unit)).eval()


def by_hand(network, blocks, x):
    """The network's output with each branch gated, the branch computed by the untouched unit's own method."""
    x = network[0](x)
    for unit, block in zip(network[1], blocks, strict=True):
        y = unit.branch(x)
        s = torch.sigmoid(block.fc2(F.relu(block.fc1(y.mean((2, 3), keepdim=True)))))
        x = F.relu(x + y * s)
    return network[2:](x)


@pytest.mark.parametrize("name", UNITS)
def test_the_block_gates_each_examples_channels(name):
    network = made(UNITS[name])
    assert torch.equal(si.inject(network, X)(X), network(X))
    after = randomise(si.inject(network, X, init="paper"), seed=3).eval()
    after.load_state_dict({**after.state_dict(), **network.state_dict()})
    blocks = [block for _, block in injected_blocks(after)]
    assert [block.fc1.in_channels for block in blocks] == [axes.C] * 2
    with torch.no_grad():
        for x in (X, X[:1], torch.cat([X, X[:1] + 1])):
            torch.testing.assert_close(after(x), by_hand(network, blocks, x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(after(X), network(X), rtol=1e-3)
        together, alone = after(X), torch.cat([after(each[None]) for each in X])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["KernelsOfExamples", "Shuffled", "Frames", "SumOfGroups"])
def test_an_example_of_one_image_finds_the_same_places(name):
    places = [[site.address for site in si.find_sites(made(UNITS[name]), x)] for x in (X, X[:1])]
    assert places[0] == places[1] and len(places[0]) == 2


@pytest.mark.parametrize(
    ("unit", "examples", "reason"),
    [
        (axes.InTheFold, 2, "its batch and its channels are together in dimension 1 of (1, 32, 16, 16)"),
        (axes.GroupsInDimensionOne, 2, "its channels are in dimensions 1 and 2 of (2, 4, 4, 16, 16)"),
        (axes.WithoutABatch, 1, "its channels are not dimension 1 of (16, 16, 16)"),
        (axes.Uneven, 2, "a reshape cut its channels unevenly: they are in no one dimension of (2, 16, 16, 16)"),
    ],
)
def test_what_is_not_of_the_form_is_refused_with_the_true_reason(unit, examples, reason):
    network, x = made(unit), X[:examples]
    missed = si.find_sites(network, x).missed
    assert len(missed) == 2 and all(item.reason.endswith(reason) for item in missed)
    with pytest.raises(NoSites, match="2 units"):
        si.plan(network, x)


def test_a_sum_with_frames_in_dimension_one_has_its_block_where_the_channels_are():
    network = made(axes.FramesInDimensionOne)
    after = si.inject(network, X, init="paper").eval()
    (_, block), _ = injected_blocks(after)
    sizes = []
    block.register_forward_hook(lambda module, args, output: sizes.append(tuple(args[0].shape)))
    after(X)
    assert sizes == [(2 * 16, axes.C, 16)]


def test_a_tensor_that_gives_its_form_alone_is_no_shortcut():
    class AsItIs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(axes.C, axes.C, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x).type_as(x).reshape_as(x).expand_as(x)

    found = si.find_sites(made(AsItIs), X)
    assert [site.unit for site in found] == ["1.0", "1.1"] and not found.missed


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ((6, 1, 5), (2, 3, 5), [[(0, True, True)], [(0, True, False)], [(2, False, True)]]),
        ((2, 3, 5), (1, 6, 5), [[], [(0, False, True), (1, False, True)], [(2, False, True)]]),
        ((4, 6), (2, 3, 4, 1), [[(0, True, True)], None, None, []]),
        ((4, 6), (8, 3), [[(0, False, True), (1, True, True)], [(1, True, False)]]),
        ((1, 1, 5), (1, 5), [[(0, False, True)], [(2, False, True)]]),
        ((1, 1, 5), (1, 1, 5), [[(0, False, True)], [(1, False, True)], [(2, False, True)]]),
        ((24,), (2, 3, 4), [[(0, True, True)], [(0, True, False)], [(0, True, False)]]),
    ],
)
def test_the_parts_of_a_reshape(before, after, parts):
    found = parts_of_reshape(before, after)
    assert found == [None if each is None else [Part(*part) for part in each] for each in parts]
    numbers = torch.arange(torch.Size(before).numel())
    indices = torch.unravel_index(numbers, before)
    new = torch.unravel_index(numbers, after)
    for axis, each in enumerate(found):
        if each is None:
            continue
        for old, index in enumerate(indices):  # an index that has no part in a new one says nothing about it
            depends = torch.stack([new[axis].reshape(before).select(old, i) for i in range(before[old])]).unique(dim=0)
            assert (len(depends) > 1) == any(part.axis == old and before[old] > 1 for part in each), (axis, index[:1])
