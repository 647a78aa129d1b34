"""The conformance kit finds what it says it finds: one broken block for each of its checks."""

import pickle

import pytest
import torch
from torch import nn

from se_inject.errors import InjectError, OptionError
from se_inject.testing import CHECKS, ConformanceError, check_block

EXPORTS = ("pt2", "onnx")


class Scale(nn.Module):
    """A block that keeps to the contract: y = x · (1 + w)."""

    def __init__(self, channels, *, rank: int = 2):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, *[1] * rank))

    def identity_init(self):
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return x * (1 + self.weight)


class _Broken(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))


class Narrows(_Broken):
    def forward(self, x):
        return (x * self.weight)[:, 1:]


class Doubles(_Broken):
    def forward(self, x):
        return x.double() * self.weight.double()


class Spoils(_Broken):
    def forward(self, x):
        with torch.no_grad():
            x.add_(1)
        return x * self.weight


class ReturnsTwo(_Broken):
    def forward(self, x):
        return x * self.weight, x


class BakedSize(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 9, 8))

    def forward(self, x):
        return x * self.weight


class TooFewPositions(_Broken):
    def forward(self, x):
        return x * self.weight / (1 + x.var([2, 3], keepdim=True))


class OverTheBatch(_Broken):
    def forward(self, x):
        return x * self.weight - x.mean(0)


class Contiguous(_Broken):
    def forward(self, x):
        return (x * self.weight).contiguous()


class KeepsFloat32(_Broken):
    def forward(self, x):
        return x * self.weight.to(torch.float32 if x.dtype != torch.float64 else x.dtype)


class Overflows(_Broken):
    def forward(self, x):
        energy = x.square().sum([1, 2, 3], keepdim=True)
        return x * self.weight * (energy / (energy + 1))


class Idle(_Broken):
    def __init__(self, channels):
        super().__init__(channels)
        self.idle = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


class Detaches(_Broken):
    def forward(self, x):
        return x.detach() * self.weight


class NearlyIdentity(_Broken):
    def identity_init(self):
        nn.init.constant_(self.weight, 10.0)

    def forward(self, x):
        return x * torch.sigmoid(self.weight)


class StuckIdentity(_Broken):
    def __init__(self, channels):
        super().__init__(channels)
        self.other = nn.Parameter(torch.ones(channels, 1, 1))

    def identity_init(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.other)

    def forward(self, x):
        return x * (1 + self.weight * self.other)


class Miscounts(_Broken):
    @staticmethod
    def count(channels):
        return 2 * channels

    def forward(self, x):
        return x * self.weight


class Remembers(_Broken):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.weight


class Dice(_Broken):
    def forward(self, x):
        return x * self.weight * torch.rand(1)


class Closure(_Broken):
    def __init__(self, channels):
        super().__init__(channels)
        self.gate = lambda x: x.sigmoid()

    def forward(self, x):
        return x * self.gate(self.weight)


class Forgets(_Broken):
    def __init__(self, channels):
        super().__init__(channels)
        self.factor = float(torch.rand(1)) + 1

    def forward(self, x):
        return x * self.weight * self.factor


class Looks(_Broken):
    def forward(self, x):
        return x * self.weight if float(x.sum()) < 1e9 else x


class Generator(_Broken):
    def forward(self, x):
        return x * sum(weight for weight in (self.weight, self.weight) if weight is not None)


class RowByRow(_Broken):
    def forward(self, x):
        return torch.stack([row * self.weight for row in x])


class GatesOtherwise(_Broken):
    def gate(self, x):
        return self.weight

    def forward(self, x):
        return x * (1 + self.weight)


class GateOfLogits(_Broken):
    def gate(self, x):
        return torch.cat([self.weight, self.weight])

    def forward(self, x):
        return x * self.weight


def not_a_module(channels):
    return lambda x: x


CASES = [
    (Narrows, "shape", "became (1, 31, 9, 8)"),
    (GatesOtherwise, "gate", "differs"),
    (GateOfLogits, "gate", "(64, 1, 1)"),
    (Doubles, "shape", "float64"),
    (Spoils, "shape", "in place"),
    (ReturnsTwo, "shape", "tuple"),
    (BakedSize, "sizes", "size"),
    (TooFewPositions, "sizes", "NaN"),
    (OverTheBatch, "independent", "differs"),
    (Contiguous, "channels_last", "strides"),
    (KeepsFloat32, "half", "float32"),
    (Overflows, "half", "NaN"),
    (Idle, "gradients", "idle"),
    (Detaches, "gradients", "input"),
    (NearlyIdentity, "identity", "not exact"),
    (StuckIdentity, "identity", "no parameter gets a gradient"),
    (Miscounts, "count", "64 parameters, there are 32"),
    (Remembers, "repeatable", "calls"),
    (Dice, "repeatable", "two results"),
    (Closure, "copies", "lambda"),
    (Forgets, "copies", "state dict"),
    (Looks, "meta", "meta"),
    (Generator, "script", "supported"),
    (RowByRow, "onnx", "batch"),
    (RowByRow, "pt2", "batch"),
]


@pytest.mark.parametrize(("block", "check", "words"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_each_breach_is_found_by_its_check(block, check, words):
    skip = [name for name in EXPORTS if name != check]
    with pytest.raises(ConformanceError) as info:
        check_block(block, skip=skip)
    found = {failure.check: failure for failure in info.value.failures}
    assert check in found
    assert words in found[check].seen
    assert found[check].hint
    assert block.__name__ in str(info.value) and found[check].hint in str(info.value)


def test_every_check_has_its_broken_block():
    assert {check for _, check, _ in CASES} == set(CHECKS)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_good_block_passes_and_nothing_global_changes(rank):
    state = torch.get_rng_state()
    check_block(Scale, channels=8, rank=rank, skip=() if rank == 2 else EXPORTS)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_failures_are_told_at_once():
    with pytest.raises(AssertionError) as info:
        check_block(Miscounts, channels=4, skip=[name for name in CHECKS if name != "count"])
    assert isinstance(info.value, InjectError)
    assert str(info.value).startswith("`Miscounts` fails 1 of 1 checks\nseen: count: ")

    class Both(Miscounts, Dice):
        pass

    with pytest.raises(ConformanceError) as info:
        check_block(Both, skip=EXPORTS)
    assert {"count", "copies"} <= {failure.check for failure in info.value.failures}


@pytest.mark.parametrize(
    ("factory", "options", "words"),
    [
        (not_a_module, {}, "returned a function"),
        (Miscounts, {"rank": 3}, "no parameter `rank`"),
        (Scale, {"colour": 3}, "colour"),
    ],
)
def test_what_cannot_be_built_is_one_failure(factory, options, words):
    with pytest.raises(ConformanceError) as info:
        check_block(factory, **options)
    (failure,) = info.value.failures
    assert failure.check == "builds"
    assert words in failure.seen


def test_a_block_by_name_and_by_file(tmp_path):
    file = tmp_path / "gates.py"
    file.write_text("from torch import nn\n\nclass Nothing(nn.Identity):\n    pass\n")
    with pytest.raises(ConformanceError, match="Nothing"):  # it returns its very input, as channels_last never minds
        check_block(f"{file}:Nothing", skip=[name for name in CHECKS if name != "repeatable"], rank=1)
    check_block("se", channels=16, skip=EXPORTS, reduction=4)


@pytest.mark.parametrize("options", [{"skip": ["onyx"]}, {"rank": 4}])
def test_wrong_questions(options):
    with pytest.raises(OptionError):
        check_block(Scale, **options)
    with pytest.raises(OptionError, match="no block is called"):
        check_block("skale")


def test_the_error_survives_a_process_boundary():
    with pytest.raises(ConformanceError) as info:
        check_block(not_a_module)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
