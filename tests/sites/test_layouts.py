"""A block in a network of tokens acts where its address says: computed by hand. And which dimensions a reshape keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import se_inject as si
from se_inject.sites.axes import kept_axes, permutation
from se_inject.surgery import injected_blocks
from tests.common import randomise
from tests.networks import layouts
from tests.networks.places import PLACES

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def injected(name):
    """A network with blocks whose weights are random, and the blocks."""
    torch.manual_seed(0)
    network = randomise(PLACES[name].make()).eval()
    after = randomise(si.inject(network, X, init="paper"), seed=2).eval()
    after.load_state_dict({**after.state_dict(), **network.state_dict()})
    return after, [block for _, block in injected_blocks(after)]


def test_a_block_within_a_mixing_mlp_by_hand():
    after, (one, two) = injected("TokensWithAConvolution")
    x = after[0](X)
    for unit, block in zip(after[1], (one, two), strict=True):
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        mix = unit.mix
        y = mix.one(unit.norm(tokens)).transpose(1, 2).reshape(n, -1, h, w)
        y = nn.Conv2d.forward(mix.maps.dw, y)
        s = torch.sigmoid(block.fc2(F.relu(block.fc1(y.mean((2, 3), keepdim=True)))))
        y = mix.two(F.gelu((y * s).flatten(2).transpose(1, 2)))
        x = (tokens + y).transpose(1, 2).view(n, c, h, w)
    assert torch.equal(after(X), after[2:](x))


def test_a_block_between_permutations_by_hand():
    after, blocks = injected("StaysChannelsLast")
    x = after[0](X)
    for unit, block in zip(after[1], blocks, strict=True):
        y = torch.relu(unit.bn(unit.dw(x)))
        s = torch.sigmoid(block.fc2(F.relu(block.fc1(y.mean((2, 3), keepdim=True)))))
        y = unit.down(F.gelu(unit.up(unit.norm((y * s).permute(0, 2, 3, 1)))))
        x = (x.movedim(1, -1) + unit.scale * y).movedim(-1, 1)
    assert torch.equal(after(X), after[2:](x))


def test_two_branches_by_hand():
    after, blocks = injected("TwoBranchesInAStack")
    x = after[0](X)
    for unit, (one, two) in zip(after[1], (blocks[:2], blocks[2:]), strict=True):
        gated = []
        for part, block in ((unit.one, one), (unit.two, two)):
            y = part(x)
            gated.append(y * torch.sigmoid(block.fc2(F.relu(block.fc1(y.mean((2, 3), keepdim=True))))))
        x = F.relu(torch.stack([gated[0], x, gated[1]]).sum(0))
    assert torch.equal(after(X), after[2:](x))
    with pytest.raises(si.errors.OptionError, match="more than one branch"):
        si.plan(PLACES["TwoBranchesInAStack"].make().eval(), X, position="pre")


@pytest.mark.parametrize("name", ["TokensWithAConvolution", "StaysChannelsLast", "PositionsFirst", "Last"])
def test_the_block_is_as_wide_and_as_large_as_the_map(name):
    plan = si.plan(PLACES[name].make().eval(), X)
    rank = 1 if name == "PositionsFirst" else 2
    widths = {"TokensWithAConvolution": {32}, "Last": {16, 32}}.get(name, {16})
    assert {step.channels for step in plan.steps} == widths
    assert all(step.size == ((256,) if rank == 1 else (16, 16)) for step in plan.steps)


def test_positions_that_need_channels_in_front_are_refused_in_words():
    network = PLACES["TokensWithAConvolution"].make().eval()
    with pytest.raises(si.errors.OptionError, match="form \\(N, C"):
        si.plan(network, X, position="post")
    after = si.inject(network, X, position="conv3x3")
    assert si.verify(network, after, X, fresh=True).passed


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ((2, 8, 4, 4), (2, 8, 16), {0: 0, 1: 1}),
        ((2, 16, 8), (2, 4, 4, 8), {0: 0, 3: 2}),
        ((1, 16, 4, 4), (2, 8, 4, 4), {2: 2, 3: 3}),
        ((2, 8), (2, 8, 1, 1), {0: 0, 1: 1}),
        ((2, 1, 8), (2, 8), {0: 0, 1: 2}),
        ((2, 8, 6), (2, 48), {0: 0}),
        ((6, 5), (5, 6), {}),
    ],
)
def test_what_a_reshape_keeps(before, after, kept):
    assert kept_axes(torch.Size(before), torch.Size(after)) == kept
    for new, old in kept.items():  # a value that differs along the old dimension alone differs along the new one alone
        size = [1] * len(before)
        size[old] = before[old]
        ramp = torch.arange(before[old]).reshape(size).expand(before).reshape(after)
        assert all(
            torch.equal(each, ramp.movedim(new, 0)[number].flatten()[:1].expand_as(each))
            for number, each in enumerate(ramp.movedim(new, 0))
        )


@pytest.mark.parametrize(
    ("function", "order"),
    [
        (lambda x: x.permute(0, 2, 3, 1), (0, 2, 3, 1)),
        (lambda x: torch.permute(x, (3, 0, 1, 2)), (3, 0, 1, 2)),
        (lambda x: x.movedim(1, -1), (0, 2, 3, 1)),
        (lambda x: x.transpose(-1, 1), (0, 3, 2, 1)),
        (lambda x: x.mT, (0, 1, 3, 2)),
        (lambda x: torch.swapaxes(x, 0, 1), (1, 0, 2, 3)),
    ],
)
def test_the_order_of_dimensions(function, order):
    from se_inject.tracing import observe_model

    class Net(nn.Module):
        def forward(self, x):
            return function(x)

    owner = observe_model(Net(), torch.rand(2, 3, 4, 5)).graphs[""]
    node = next(node for node in owner.graph.nodes if node.op.startswith("call"))
    assert permutation(node) == order


class FromSamples(nn.Module):
    """Its input is one row of samples an example: (N, L), made (N, 1, L) in the forward."""

    def __init__(self):
        super().__init__()
        self.filters, self.shortcut = nn.Conv1d(1, 8, 8, stride=4), nn.Linear(16, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.norm(self.filters(x.unsqueeze(1))))
        return self.head(y.mean(2))


@pytest.mark.parametrize("shape", [(2, 64), (64,)])
def test_an_input_with_fewer_dimensions_than_a_map_is_no_obstacle(shape):
    network = FromSamples()
    if len(shape) == 1:

        class One(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = FromSamples()

            def forward(self, x):
                return self.net(x[None])

        network = One()
    x = torch.rand(shape)
    assert [site.address.rpartition(".")[2] for site in si.find_sites(network.eval(), x)] == ["relu"]


def test_every_kind_is_in_the_table():
    assert layouts.Last.__name__ in PLACES
