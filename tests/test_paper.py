"""The paper's numbers and the public SE networks, exactly: other people's counts and code as oracles."""

import pytest
import timm
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import se_inject as si
from tests.common import build, outputs, randomise

BASE = 25_557_032
PER_STAGE = {1: (24_576, 25_392), 2: (131_072, 133_248), 3: (786_432, 792_960), 4: (1_572_864, 1_579_392)}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("reduction", "without_bias", "with_bias"),
    [
        (2, 45_676_584, 45_699_240),
        (4, 35_616_808, 35_635_688),
        (8, 30_586_920, 30_603_912),
        (16, 28_071_976, 28_088_024),
        (32, 26_814_504, 26_830_080),
    ],
)
def test_table_10_reduction_ratios_of_resnet50(reduction, without_bias, with_bias):
    network = build("torchvision:resnet50")
    assert parameters(network) == BASE
    for bias, expected in ((False, without_bias), (True, with_bias)):
        plan = si.plan(network, reduction=reduction, bias=bias)
        cost = plan.cost()
        assert cost.before.params == BASE
        assert cost.after.params == expected
        if reduction == 16:
            assert parameters(plan.apply(network)) == expected


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_table_13_one_stage_at_a_time(stage, bias):
    network = build("torchvision:resnet50")
    injected = si.inject(network, stages=[stage], bias=bias)
    assert parameters(injected) - BASE == PER_STAGE[stage][bias]


@pytest.mark.parametrize(
    ("name", "base", "added", "sites"),
    [
        ("resnet18", 11_689_512, 89_080, 8),
        ("resnet34", 21_797_672, 161_196, 16),
        ("resnet101", 44_549_160, 4_777_712, 33),
        ("resnet152", 60_192_808, 6_629_040, 50),
        ("resnext50_32x4d", 25_028_904, 2_530_992, 16),
    ],
)
def test_counts_of_the_released_networks(name, base, added, sites):
    plan = si.plan(build(f"torchvision:{name}"))
    cost = plan.cost()
    assert (len(plan), cost.before.params, cost.added.params) == (sites, base, added)


def test_vgg16_has_thirteen_sites_after_the_non_linearities():
    network = build("torchvision:vgg16_bn")
    plan = si.plan(network, bias=False)
    assert len(plan) == 13
    assert plan.cost().added.params == 226_304
    assert si.plan(network).cost().added.params == 230_792
    assert all(type(network.get_submodule(step.owner)) is torch.nn.ReLU for step in plan.steps)


@pytest.mark.parametrize("name", ["torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:vgg16"])
@pytest.mark.parametrize("reduction", [4, 16])
def test_macs_are_2cw_for_each_site_and_agree_with_torchs_counter(name, reduction):
    network = build(name).eval()
    plan = si.plan(network, reduction=reduction)
    cost = plan.cost()
    for row in cost.rows:
        assert row.width == max(4, row.channels // reduction)  # the paper's are never narrower
        assert row.cost.macs == 2 * row.channels * row.width
        assert row.cost.params == 2 * row.channels * row.width + row.channels + row.width
    x = torch.empty(1, 3, 224, 224, device="meta")
    totals = []
    for model in (network, plan.apply(network)):
        counter = FlopCounterMode(display=False)
        with counter:
            model.to("meta")(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == cost.before.flops
    assert totals[1] == cost.after.flops
    assert totals[1] - totals[0] == cost.added.flops


def test_rows_stages_and_total_add_up():
    cost = si.plan(build("torchvision:resnet50")).cost()
    for field in ("params", "macs", "elementwise", "bytes"):
        total = getattr(cost.after, field) - getattr(cost.before, field)
        assert sum(getattr(row.cost, field) for row in cost.rows) == total
        assert sum(getattr(stage, field) for stage in cost.stages.values()) == total


def test_activation_traffic_of_one_block_by_hand():
    """Squeeze reads x, scale reads x and writes y; the rest is the vectors in between."""
    row = si.plan(build("torchvision:resnet50"), stages=[4], reduction=16).cost().rows[-1]
    c, w, hw = 2048, 128, 49
    squeeze = (c * hw + c) * 4
    bottleneck = (c + w + w + w + w + c) * 4  # fc1, ReLU, fc2
    gate = (c + c + c + c) * 4  # σ, times 2
    scale = (c * hw + c + c * hw) * 4
    assert row.cost.bytes == squeeze + bottleneck + gate + scale
    assert row.cost.elementwise == c * hw + w + c + c + c * hw


@pytest.mark.parametrize(
    ("source", "twin"),
    [
        ("timm:resnet18", "seresnet18"),
        ("torchvision:resnet34", "seresnet34"),
        ("timm:resnet50", "seresnet50"),
        ("torchvision:resnet50", "seresnet50"),
        ("torchvision:resnet101", "seresnet101"),
        ("timm:resnext50_32x4d", "seresnext50_32x4d"),
        ("torchvision:resnext50_32x4d", "seresnext50_32x4d"),
    ],
)
def test_timms_se_twin_has_the_same_keys_weights_and_outputs(source, twin):
    theirs = randomise(timm.create_model(twin))
    ours = si.inject(build(source), init="paper", divisor=8)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(2, 3, 64, 64)
        for one, other in zip(outputs(ours, x), outputs(theirs, x), strict=True):
            assert torch.equal(one, other)
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


NAMED = [
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:resnet152",
    "torchvision:resnext50_32x4d",
    "torchvision:wide_resnet50_2",
    "torchvision:mobilenet_v2",
    "torchvision:convnext_tiny",
    "torchvision:vgg16",
    "torchvision:vgg16_bn",
    "torchvision:fcn_resnet50",
    "timm:resnet50",
    "timm:resnetv2_50",
    "timm:convnext_tiny",
]


@pytest.mark.parametrize("name", NAMED)
def test_identity_start_is_bit_equal_in_eval_and_in_train(name):
    network = randomise(build(name))
    injected = si.inject(network)
    assert isinstance(injected, type(network))
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        network.train(training)
        injected.train(training)
        expected = outputs(network, x)
        seen = outputs(injected, x)
        assert expected
        assert len(seen) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(expected, seen, strict=True))


def test_the_paper_start_is_no_identity():
    network = randomise(build("torchvision:resnet18")).eval()
    injected = si.inject(network, init="paper").eval()
    x = torch.randn(2, 3, 64, 64)
    assert not torch.allclose(network(x), injected(x))
    assert torchvision.models.ResNet in type(injected).__mro__
