"""Verification: every check can fail, and what is broken is found by exactly the checks that look at it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock
from torchvision.ops import StochasticDepth

import se_inject as si
from se_inject.errors import SurgeryError, VerificationError
from se_inject.plans.planner import plan
from se_inject.verification import gradients
from se_inject.verification.verdicts import Check, Verdict
from tests.common import randomise

CHECKS = [
    "weights kept",
    "settings kept",
    "same output as before",
    "same output without the blocks",
    "blocks where units are",
    "blocks trainable",
]
X = torch.empty(2, 3, 16, 16, device="meta")


class Net(nn.Module):
    """Two residual units with everything the checks look at."""

    def __init__(self, zero_last=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.units = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 10)
        if zero_last:
            for unit in self.units:
                nn.init.zeros_(unit.bn2.weight)

    def forward(self, x):
        return self.head(self.dropout(self.units(self.stem(x)).mean((2, 3))))


def pair(**options):
    torch.manual_seed(0)
    network = randomise(Net())
    return network, si.inject(network, X, **options)


def failed(verdict):
    return [check.name for check in verdict.checks if check.passed is False]


def test_all_pass_on_what_was_just_injected():
    network, injected = pair()
    verdict = si.verify(network, injected, X)
    assert [check.name for check in verdict.checks] == CHECKS
    assert [check.passed for check in verdict.checks] == [True] * 6
    assert verdict.passed
    assert verdict.expect_passed() is verdict
    assert verdict.notes == ("numeric checks on 1 input of 3×3×16×16",)


def test_verifying_changes_neither_network():
    network, injected = pair()
    network.stem.eval()
    injected.stem.eval()
    kept = [
        ({key: value.clone() for key, value in model.state_dict().items()}, [m.training for m in model.modules()])
        for model in (network, injected)
    ]
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    si.verify(network, injected, X)
    assert torch.equal(torch.rand(3), expected)
    for model, (state, modes) in zip((network, injected), kept, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())


# -- sabotage ----------------------------------------------------------------------------------------------


def weight(network):
    with torch.no_grad():
        network.head.weight[0, 0] += 1


def statistic(network):
    network.units[0].bn1.running_mean[0] += 1


def counter(network):
    network.units[0].bn1.num_batches_tracked += 1


def foreign_key(network):
    network.units.register_buffer("visitor", torch.zeros(1))


def foreign_module(network):
    network.units.visitor = nn.Linear(1, 1)
    network.units.forward = lambda x: network.units[1](network.units[0](x))


def lost_key(network):
    network.head.bias = None


def other_dtype(network):
    network.double()


def training_flag(network):
    network.units[0].bn1.training = False


def requires_grad(network):
    network.stem[0].weight.requires_grad_(False)


def forward_hook(network):
    network.stem.register_forward_hook(lambda *_: None)


def backward_hook(network):
    network.stem.register_full_backward_hook(lambda *_: None)


class OtherReLU(nn.Module):
    def forward(self, x):
        return torch.relu(x)


def other_class(network):
    network.stem[2] = OtherReLU()


class SubReLU(nn.ReLU):
    """Passes for the original in an `isinstance`."""


def subclass(network):
    network.stem[2] = SubReLU()


def extra_module(network):
    network.units[0].add_module("visitor", nn.Identity())


def forgotten_statistics(network):
    """Batch statistics are used in training as before, and no longer remembered."""
    network.units[0].bn1.momentum = 0.0


def extra_operation(network):
    network.head.register_forward_hook(lambda module, args, output: output + 1)


def detached(network):
    network.units[0].se.forward = lambda x: x


def without_gradient(network):
    block = network.units[0].se
    forward = type(block).forward
    block.forward = lambda x: forward(block, x).detach()


def with_a_gradient_of_zero(network):
    block = network.units[0].se
    block.forward = lambda x: x + 0 * sum(parameter.sum() for parameter in block.parameters())


def with_an_idle_parameter(network):
    block = network.units[0].se
    bias = block.fc1.bias
    block.fc1.forward = lambda x: nn.functional.conv2d(x, block.fc1.weight, bias.detach())


def gate(network):
    with torch.no_grad():
        network.units[1].se.fc2.bias.fill_(1)


def eval_only(network):
    """A block that is an identity in training, and not in eval."""
    block = network.units[0].se
    forward = type(block).forward
    block.forward = lambda x: forward(block, x) * (1 if block.training else 2)


def another_module(network):
    network.units[0].se = nn.Identity()


def hollow(network):
    network.units[0].se.fc1, network.units[0].se.fc2 = nn.Identity(), nn.Identity()


def called_twice(network):
    """What happens to a block that its owner takes for one of its own layers."""
    unit = network.units[0]
    forward = type(unit).forward
    unit.forward = lambda x: unit.se(forward(unit, x))


SAME, WITHOUT = CHECKS[2], CHECKS[3]


@pytest.mark.parametrize(
    ("sabotage", "expected", "detail"),
    [
        (weight, ["weights kept", SAME, WITHOUT], "head.weight"),
        (statistic, ["weights kept", SAME, WITHOUT], "units.0.bn1.running_mean"),
        (counter, ["weights kept", SAME, WITHOUT], "num_batches_tracked"),
        (foreign_key, ["weights kept"], "new and not a block's: units.visitor"),
        (another_module, ["weights kept"], "not the block that was put there: units.0.se"),
        (hollow, ["weights kept"], "not the block that was put there: units.0.se"),
        (training_flag, ["settings kept"], "units.0.bn1: training"),
        (requires_grad, ["settings kept"], "stem.0.weight: requires_grad"),
        (forward_hook, ["settings kept"], "stem: _forward_hooks"),
        (backward_hook, ["settings kept"], "stem: _backward_hooks"),
        (other_class, ["settings kept"], "stem.2: class"),
        (subclass, ["settings kept"], "stem.2: class"),
        (extra_module, ["settings kept"], "units.0.visitor: a new module"),
        (forgotten_statistics, [SAME, WITHOUT], "train: `units.0.bn1.running_mean` is updated otherwise"),
        (extra_operation, ["settings kept", SAME, WITHOUT], "differs by up to 1"),
        (detached, ["blocks trainable"], "units.0.se"),
        (without_gradient, ["blocks trainable"], "no gradient reaches units.0.se"),
        (with_a_gradient_of_zero, ["blocks trainable"], "no gradient reaches units.0.se"),
        (with_an_idle_parameter, ["blocks trainable"], "no gradient reaches units.0.se.fc1.bias"),
        (called_twice, ["blocks trainable"], "called more often than their owners: units.0.se"),
        (gate, [SAME], "differs by up to"),
        (eval_only, [SAME], "eval: differs by up to"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_sabotage_is_found_by_the_checks_that_look_at_it(sabotage, expected, detail):
    network, injected = pair()
    sabotage(injected)
    verdict = si.verify(network, injected, X) if sabotage not in (gate, eval_only) else fresh(network, injected)
    assert failed(verdict) == expected
    assert any(detail in check.detail for check in verdict.checks if check.passed is False)
    assert not verdict.passed


def fresh(network, injected):
    """As the command line asks: right after the injection."""
    from se_inject.verification.checks import verify

    return verify(network, injected, trace=plan(network, X).trace, fresh=True)


def test_a_frozen_parameter_of_a_block_is_named():
    network, injected = pair()
    injected.units[0].se.fc1.weight.requires_grad_(False)
    (trainable,) = (check for check in si.verify(network, injected, X).checks if check.name == "blocks trainable")
    assert trainable.passed and "frozen: units.0.se.fc1.weight" in trainable.detail


@pytest.mark.parametrize("sabotage", [lost_key, other_dtype], ids=lambda function: function.__name__)
def test_what_is_lost_is_never_passed(sabotage):
    network, injected = pair()
    sabotage(injected)
    try:
        verdict = si.verify(network, injected, X)
    except RuntimeError:  # float against double: nothing could be compared
        assert sabotage is other_dtype
        return
    assert "weights kept" in failed(verdict)
    assert "settings kept" in failed(verdict)


def test_a_network_that_no_longer_runs_fails_a_check():
    network, injected = pair()
    injected.units[0].se.forward = lambda x: x.no_such_method()
    assert set(failed(si.verify(network, injected, X))) >= {SAME, "blocks trainable"}


def test_a_failure_is_an_error_that_names_the_checks():
    network, injected = pair()
    training_flag(injected)
    foreign_key(injected)
    with pytest.raises(VerificationError, match="failed 2 of 6 checks") as caught:
        si.verify(network, injected, X).expect_passed()
    assert "weights kept" in caught.value.seen
    assert "settings kept" in caught.value.seen
    assert caught.value.exit_code == 1


# -- what is meant to differ -------------------------------------------------------------------------------


def train(model, steps=2):
    optimizer = torch.optim.SGD(si.injected_parameters(model), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model.eval()(torch.randn(4, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    return model.train()


def test_trained_blocks_are_meant_to_differ():
    network, injected = pair()
    verdict = si.verify(network, train(injected), X)
    answers = {check.name: check for check in verdict.checks}
    assert verdict.passed
    assert answers[SAME].passed is None
    assert "meant to differ" in answers[SAME].detail
    assert answers[WITHOUT].passed is True


def test_the_papers_start_is_meant_to_differ():
    network, injected = pair(init="paper")
    verdict = si.verify(network, injected, X)
    assert [check.passed for check in verdict.checks] == [True, True, None, True, True, True]


def test_a_block_without_parameters_has_no_gradients_to_miss():
    network, injected = pair(block="simam")
    verdict = si.verify(network, injected, X)
    assert verdict.passed
    assert verdict.checks[2].passed is None


def test_a_block_without_parameters_must_be_called():
    network, injected = pair(block="simam")
    unit = injected.units[0]
    authors = BasicBlock.forward.__get__(unit)
    with pytest.raises(SurgeryError, match="would pass by the block `se`"):
        unit.forward = authors
    vars(unit)["forward"] = authors
    verdict = si.verify(network, injected, X)
    assert failed(verdict) == ["blocks trainable"]
    assert verdict.checks[-1].detail == "not called: units.0.se"


def test_only_what_was_added_is_asked_about():
    _, first = pair(stages="units.0")
    train(first)
    second = si.inject(first, X)
    verdict = si.verify(first, second, X)
    assert [check.passed for check in verdict.checks] == [True] * 6
    assert "4 new parameters of 1 block" in verdict.checks[-1].detail


def test_a_network_without_blocks_is_itself():
    network, _ = pair()
    assert si.verify(network, network, X).passed


# -- odd networks ------------------------------------------------------------------------------------------


def test_branches_that_start_at_zero_are_no_fault():
    network = Net(zero_last=True)
    assert si.verify(network, si.inject(network, X), X).passed


def test_weights_that_are_no_numbers_are_told():
    network, _ = pair()
    with torch.no_grad():
        network.head.weight[0, 0] = float("nan")
    verdict = si.verify(network, si.inject(network, X), X)
    assert verdict.passed
    assert any("NaN" in note for note in verdict.notes)


def test_an_output_without_a_finite_number_is_told():
    network, _ = pair()
    nn.init.constant_(network.head.bias, float("inf"))
    verdict = si.verify(network, si.inject(network, X), X)
    assert verdict.passed
    assert any("equal outputs tell nothing" in note for note in verdict.notes)


def test_a_large_network_that_takes_no_small_input_is_checked_on_a_large_one():
    class Picky(Net):
        def forward(self, x):
            if x.shape[-1] < 400:
                raise ValueError("too small")
            return super().forward(x)

    network = randomise(Picky())
    x = torch.empty(2, 3, 400, 400, device="meta")
    verdict = si.verify(network, si.inject(network, x), x)
    assert verdict.passed
    assert verdict.notes == ("numeric checks on 1 input of 3×3×400×400",)


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda y: torch.complex(y, y + 1), "differs by up to 1"),
        (lambda y: [torch.complex(y, y)], "another structure"),
        (lambda y: torch.complex(y, y)[:1], "became"),
        (lambda y: torch.complex(y, y * float("nan")), "differs by up to inf"),
    ],
)
def test_outputs_of_any_kind_are_compared(change, detail):
    network, injected = pair()
    network.head.register_forward_hook(lambda module, args, y: torch.complex(y, y))
    injected.head.register_forward_hook(lambda module, args, y: change(y))
    verdict = si.verify(network, injected, X)
    assert failed(verdict) == [SAME, WITHOUT]
    assert all(detail in check.detail for check in verdict.checks if check.passed is False)


def test_every_output_counts_for_the_gradients():
    class Two(Net):
        def forward(self, x):
            return self.stem(x).sum() + self.head.weight.sum(), super().forward(x)

    network = randomise(Two())
    assert si.verify(network, si.inject(network, X), X).passed


def test_a_large_network_is_checked_on_a_small_input():
    network, injected = pair()
    verdict = si.verify(network, injected, torch.empty(2, 3, 400, 400, device="meta"))
    assert verdict.passed
    assert verdict.notes == ("numeric checks on 1 input of 3×3×64×64",)


def test_a_network_that_does_not_train_is_compared_in_eval():
    class Refuses(Net):
        def forward(self, x):
            if self.training:
                raise NotImplementedError("for inference alone")
            return super().forward(x)

    network = randomise(Refuses()).eval()
    verdict = si.verify(network, si.inject(network, X), X)
    assert verdict.passed
    assert "train: not run: for inference alone" in verdict.checks[2].detail
    assert "eval: bit-equal" in verdict.checks[2].detail


def test_a_network_that_runs_again_in_its_backward_pass():
    class Recomputed(Net):
        def forward(self, x):
            x = self.stem(x)
            for unit in self.units:
                x = checkpoint(unit, x, use_reentrant=False) if self.training else unit(x)
            return self.head(x.mean((2, 3)))

    network = randomise(Recomputed()).eval()  # and is trained for the check
    assert si.verify(network, si.inject(network, X), X).passed


def test_a_check_that_does_not_apply_is_no_failure():
    verdict = Verdict((Check("a", True, ""), Check("b", None, "")))
    assert verdict.passed
    assert not Verdict((*verdict.checks, Check("c", False, ""))).passed


def test_a_branch_that_was_dropped_at_random_is_asked_again(monkeypatch):
    network = randomise(Net()).eval()
    for unit in network.units:
        unit.bn2 = nn.Sequential(unit.bn2, StochasticDepth(0.8, "batch"))
    injected = si.inject(network, X)
    assert si.verify(network, injected, X).passed
    monkeypatch.setattr(gradients, "DRAWS", 1)
    failed = [check.name for check in si.verify(network, injected, X).checks if check.passed is False]
    assert failed == ["blocks trainable"]  # each draw drops one of the two


class Detector(Net):
    """It wants targets in training; in eval what it returns need not come from everywhere."""

    def forward(self, x):
        if self.training:
            raise ValueError("targets should not be none")
        return self.head(self.units[0](self.stem(x)).mean((2, 3)) + 0 * self.units[1](self.stem(x)).mean((2, 3)))


def test_gradients_are_not_told_where_a_network_cannot_be_trained():
    network = randomise(Detector()).eval()
    check = si.verify(network, si.inject(network, X), X).checks[-1]
    assert (check.name, check.passed) == ("blocks trainable", None)
    assert "not checked" in check.detail and "units.1.se" in check.detail


def test_gradients_that_do_not_arrive_in_training_are_a_failure():
    class Trains(Detector):
        def forward(self, x):
            return self.head(self.units[0](self.stem(x)).mean((2, 3)) + 0 * self.units[1](self.stem(x)).mean((2, 3)))

    network = randomise(Trains()).eval()
    check = si.verify(network, si.inject(network, X), X).checks[-1]
    assert check.passed is False and "units.1.se" in check.detail


class Codebook(nn.Module):
    """Vectors that training moves by hand: a parameter without a gradient, written into by ``data``."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Embedding(4, 8)
        self.codes.weight.requires_grad_(False)

    def forward(self, x):
        nearest = torch.cdist(x.flatten(2).mT, self.codes.weight[None]).argmin(-1)
        if self.training:
            self.codes.weight.data.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return x + (self.codes(nearest).mT.reshape(x.shape) - x).detach()


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.unit, self.codebook = nn.Conv2d(3, 8, 3, padding=1), Branch(8), Codebook()
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.codebook(torch.relu(x + self.unit(x))))


class Branch(nn.Sequential):
    def __init__(self, c):
        super().__init__(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c))


def test_a_codebook_that_training_moves_is_left_as_it_was():
    torch.manual_seed(0)
    network = randomise(Quantised()).eval()
    codes = network.codebook.codes.weight.clone()
    x = torch.randn(2, 3, 8, 8)
    injected = si.inject(network, x)
    assert si.verify(network, injected, x, fresh=True).passed
    for each in (network, injected):
        assert torch.equal(each.codebook.codes.weight, codes)


class MadeAnew(nn.Module):
    """A module that is built again when it is copied, as einops' layers are: it comes in training mode."""

    def __getstate__(self):
        return {}

    def __setstate__(self, state):
        self.__init__()

    def forward(self, x):
        return x.flatten(2).unflatten(2, x.shape[2:])


def test_the_mode_of_a_module_that_is_made_anew_is_kept():
    network = nn.Sequential(Quantised(), MadeAnew()).eval()
    x = torch.randn(2, 3, 8, 8)
    injected = si.inject(network, x)
    assert not any(module.training for module in injected.modules())
    assert si.verify(network, injected, x, fresh=True).passed
