"""No unit of a block is born dead, and the check of trainability finds those that are off."""

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.surgery import injected_blocks

X = torch.empty(2, 3, 16, 16, device="meta")


class Unit(nn.Module):
    def __init__(self, c, scale=None):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), scale
        self.gamma = nn.Parameter(torch.full((c, 1, 1), scale or 1.0))

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) * self.gamma + x)


class Net(nn.Module):
    def __init__(self, c=16, scale=None):
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.body = nn.Sequential(*(Unit(c, scale) for _ in range(4)))
        self.head = nn.Linear(c, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def network(seed, **options):
    """A network whose norms have offsets, as a trained one's have."""
    torch.manual_seed(seed)
    net = Net(**options).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.5)
    return net


def line(before, after, example=X):
    return next(check for check in si.verify(before, after, example).checks if check.name == "blocks trainable")


def units_off(after):
    """How many inner units are off for all of many inputs."""
    on = {}
    hooks = [
        block.act.register_forward_hook(
            lambda _, __, out, path=path: on.__setitem__(path, on.get(path, False) | (out > 0).any(0).flatten())
        )
        for path, block in injected_blocks(after)
    ]
    with torch.no_grad():
        for _ in range(3):
            after(torch.rand(16, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    return sum(int((~each).sum()) for each in on.values())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"width": 1}, {"activation": "silu"}])
def test_every_block_can_learn_from_the_start(options):
    for seed in range(3):
        before = network(seed)
        after = si.inject(before, X, **options)
        assert line(before, after).passed
        if "bias" not in options:
            assert units_off(after) == 0
        with torch.no_grad():
            x = torch.rand(2, 3, 16, 16)
            assert torch.equal(before(x), after(x))
        optimizer = torch.optim.SGD(si.injected_parameters(after), lr=0.5)
        start = [block.fc1.weight.detach().clone() for _, block in injected_blocks(after)]
        for _ in range(3):
            x, y = torch.rand(8, 3, 16, 16), torch.randint(10, (8,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(after(x), y).backward()
            optimizer.step()
        assert not any(
            torch.equal(old, block.fc1.weight) for old, (_, block) in zip(start, injected_blocks(after), strict=True)
        )


def test_a_block_that_is_off_is_a_failure_and_one_partly_off_is_named():
    before = network(0)
    after = si.inject(before, X)
    with torch.no_grad():
        after.body[1].se.fc1.bias.fill_(-1000)
    check = line(before, after)
    assert check.passed is False and "body.1.se" in check.detail
    with torch.no_grad():
        after.body[1].se.fc1.bias[1:].fill_(1)
    check = line(before, after)
    assert check.passed and check.detail.endswith("partly off: body.1.se (1 of 4 units)")


def test_a_unit_that_is_on_for_some_inputs_alone_is_found_in_one_of_the_draws():
    before = network(0)
    after = si.inject(before, X)
    assert line(before, after).detail == "gradients reach all 16 new parameters of 4 blocks"


def test_small_gradients_in_half_precision_are_no_failure():
    before = network(1, scale=1e-6).half()
    assert line(before, si.inject(before, X.half()), X.half()).passed


def test_the_narrowest_bottleneck_is_four_wide_and_the_plan_says_so():
    before = network(0)
    plan = si.plan(before, X)
    assert {block.width for _, block in injected_blocks(plan.apply(before))} == {4}
    assert any(note.startswith("r = 16 is too much for the 16 channels of some sites") for note in plan.notes)
    assert {block.width for _, block in injected_blocks(si.inject(before, X, width=2))} == {2}
    assert not any("too much" in note for note in si.plan(before, X, reduction=4).notes)


class Rounds(nn.Module):
    """A network whose first half no gradient reaches: its output is rounded to bytes, as an autoencoder's code may be."""

    def __init__(self, detaches=True):
        super().__init__()
        self.detaches = detaches
        self.stem, self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), Unit(16), Unit(16)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.first(self.stem(x))
        if self.detaches:
            x = (x * 255).round().to(torch.int16).to(x.dtype) / 255
        return self.head(self.second(x))


def test_a_network_that_passes_no_gradient_itself_is_no_fault_of_the_blocks_and_is_named():
    torch.manual_seed(0)
    before = Rounds().eval()
    check = line(before, si.inject(before, X))
    assert check.passed is None
    assert check.detail == (
        "without blocks, too, the network passes no gradient back to 1 place: first.se; gradients reach the other 1 block"
    )
    before.detaches = False
    assert line(before, si.inject(before, X)).passed


def test_a_block_that_cuts_the_gradient_itself_is_a_failure_in_such_a_network_too():
    torch.manual_seed(0)
    before = Rounds().eval()
    after = si.inject(before, X)
    block, forward = after.second.se, type(after.second.se).forward
    block.forward = lambda x: forward(block, x).detach()
    check = line(before, after)
    assert check.passed is False and "second.se" in check.detail


def test_a_gradient_of_zero_in_the_network_is_a_failure_and_is_said():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), Unit(16), Unit(16)

        def forward(self, x):
            x = self.stem(x)
            return self.first(x) * 0 + self.second(x)

    torch.manual_seed(0)
    before = Net().eval()
    check = line(before, si.inject(before, X))
    assert check.passed is False
    assert check.detail.endswith("in `first.se`; without blocks, too, the gradient at its place is zero")


@pytest.mark.parametrize("factor", [1e2, 1e5])
def test_values_of_any_size_leave_a_unit_on(factor):
    """Networks without normalisation have values of thousands: of the first two inner units one is on for each example."""
    for seed in range(4):
        torch.manual_seed(seed)
        before = Net()
        with torch.no_grad():
            before.stem.weight.mul_(factor)
        for unit in before.body:
            unit.norm = nn.Identity()
        after = si.inject(before.eval(), X)
        assert line(before, after).passed
        for _, block in injected_blocks(after):
            hidden = block.fc1(factor * torch.randn(64, 16, 1, 1))
            assert bool((hidden[:, :2] > 0).any(1).all())
