"""The blocks in ``plugins/``: their counts, what they compute, how they start, and the road by which they go in."""

import importlib.metadata
import inspect
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import nn

import se_inject as si
from se_inject.blocks.building import has_identity_start
from se_inject.blocks.registry import GROUP, block_names, block_options, find_block
from se_inject.errors import OptionError, PluginError
from se_inject.forwards import is_edited
from se_inject.testing import check_block
from tests.common import TIMM_NAMES, build, outputs, randomise

PLUGINS = {
    "bam": "1807.06514",
    "cbam": "1807.06521",
    "coord": "2103.02907",
    "eca": "1910.03151",
    "ese": "1911.06667",
    "fca": "2012.11879",
    "gc": "1904.11492",
    "gct": "1909.11519",
    "ge": "1810.12348",
    "nosqueeze": "1709.01507",
    "scse": "1803.02579",
    "simam": "PMLR 139",
    "srm": "1903.10829",
    "triplet": "2010.03045",
}
WITH_RANK = ["bam", "cbam", "eca", "ese", "gc", "gct", "nosqueeze", "scse", "simam", "srm"]
EXPORTS = ("pt2", "onnx")
WIDTHS = (64, 256, 512, 1024, 2048)


def made(name, channels, **options):
    factory = find_block(name)
    if "size" in inspect.signature(factory).parameters:
        options.setdefault("size", (9, 8))
    torch.manual_seed(0)
    return factory(channels, **options)


def stirred(block, seed=0):
    """Random weights and statistics everywhere, in float64."""
    generator = torch.Generator().manual_seed(seed)
    block = randomise(block.double())
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return block.eval()


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ---- what they are ---------------------------------------------------------------------------------------------------


def test_all_are_found_through_entry_points_and_only_so():
    names = block_names()
    assert {name: names[name] for name in PLUGINS} == dict.fromkeys(PLUGINS, "se-inject")
    files = {path.stem for path in (Path(__file__).parents[2] / "plugins").glob("[!_]*.py")}
    assert files == {*PLUGINS, "kernel_sizes"}  # what plug-ins share
    assert names["se"] == "se-inject"


@pytest.mark.parametrize("name", PLUGINS)
def test_the_card_says_what_where_how_many_who_and_when_not(name):
    factory = find_block(name)
    card = inspect.getdoc(factory)
    first, _, rest = card.partition("\n")
    assert (first.endswith(".") and ":" in first) or name in ("cbam", "bam", "scse", "coord")
    assert len(first) <= 120 and rest.startswith("\n")
    for heading in ("Where: ", "Parameters: ", "By: ", "Not when: ", "Start: ", "Args:", "Shape:"):
        assert f"\n{heading}" in card, heading
    assert PLUGINS[name] in card
    for option, parameter in block_options(name).items():
        assert f"    {option}: " in card
        assert parameter.default is not parameter.empty and parameter.annotation is not parameter.empty
    defaults = {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}
    inspect.signature(factory.count).bind(**defaults | {"channels": 64})


# ---- how many parameters ---------------------------------------------------------------------------------------------

COUNTS = [
    ("eca", {}, WIDTHS, (3, 5, 5, 5, 7)),
    ("cbam", {"bias": False}, WIDTHS, (612, 8_292, 32_868, 131_172, 524_388)),
    ("ese", {}, WIDTHS, (4_160, 65_792, 262_656, 1_049_600, 4_196_352)),
    ("gc", {"reduction": 8}, WIDTHS, (1_177, 16_993, 66_753, 264_577, 1_053_441)),
    (
        "coord",
        {"bias": False, "reduction": 24, "divisor": 8},
        WIDTHS,
        (1_552, 6_160, 36_912, 122_960, 540_848),
    ),
    ("nosqueeze", {"divisor": 8}, WIDTHS, (1_096, 8_464, 33_312, 132_160, 526_464)),
    ("fca", {"divisor": 8}, WIDTHS, (1_024, 8_192, 32_768, 131_072, 524_288)),
    ("bam", {}, (256, 512, 1024), (17_361, 68_513, 272_193)),
    ("scse", {}, (256, 2048), (8_464 + 257, 264_320 + 2_049 + 262_144)),
    ("scse", {"reduction": 2, "bias": False}, (64,), (64 * 64 + 65,)),
    ("triplet", {}, WIDTHS, (300,) * 5),
    ("gct", {}, WIDTHS, tuple(3 * c for c in WIDTHS)),
    ("srm", {}, WIDTHS, tuple(4 * c for c in WIDTHS)),
    ("simam", {}, WIDTHS, (0,) * 5),
    ("ge", {"kind": "minus"}, WIDTHS, (0,) * 5),
    ("ge", {"size": (7, 7)}, (256, 2048), (256 * 49 + 512, 2048 * 49 + 4096)),
    ("ge", {"extent": 4}, (256,), (2 * 11 * 256,)),
    ("ge", {"kind": "plus", "size": (7, 7)}, (256,), (256 * 49 + 512 + 8_464,)),
    ("coord", {}, (256, 1024), (3 * 256 * 8 + 24 + 512, 3 * 1024 * 32 + 96 + 2048)),
    ("cbam", {}, (256,), (8_464 + 100,)),
]


@pytest.mark.parametrize(
    ("name", "options", "channels", "expected"),
    [
        (name, options, channels, expected)
        for name, options, widths, counts in COUNTS
        for channels, expected in zip(widths, counts, strict=True)
    ],
)
def test_parameters_by_formula_as_built_and_as_published(name, options, channels, expected):
    with torch.device("meta"):
        block = made(name, channels, **options)
    assert parameters(block) == expected
    assert find_block(name).count(channels, **options) == expected


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", WITH_RANK)
def test_parameters_in_other_dimensions(name, rank):
    assert parameters(made(name, 48, rank=rank)) == find_block(name).count(48, rank=rank)


RESNET50 = [
    ("eca", {}, 86),  # timm's ecaresnet50d
    ("cbam", {}, 2_532_592),  # pytorchcv's cbam_resnet50
    ("bam", {"at": ["layer1.2*", "layer2.3*", "layer3.5*"]}, 358_067),  # pytorchcv's bam_resnet50
    ("nosqueeze", {}, 2_530_992),  # table 16: as SE
    ("fca", {}, 2_514_944),
    ("triplet", {}, 4_800),
    ("srm", {}, 60_416),  # 25.62 M
    ("gc", {"stages": "2-4"}, 2_521_741),  # 28.08 M
    ("ge", {}, 5_549_568),  # 31.1 M
    ("simam", {}, 0),
]


@pytest.fixture(scope="module")
def resnet50():
    with torch.device("meta"):
        return build("torchvision:resnet50")


@pytest.mark.parametrize(("name", "options", "added"), RESNET50)
def test_parameters_added_to_resnet50(resnet50, name, options, added):
    assert si.plan(resnet50, block=name, **options).cost().added.params == added


# ---- what they compute -----------------------------------------------------------------------------------------------


def gather_excite(extent):
    return timm.layers.GatherExcite(64, extent=extent, use_mlp=False)


def global_context():
    return timm.layers.GlobalContext(64, fuse_add=True, fuse_scale=False)


TIMM = [
    ("eca", {}, lambda: timm.layers.EcaModule(64), {}),
    ("cbam", {"bias": False}, lambda: CbamModule(64), TIMM_NAMES["cbam"]),
    ("gc", {"reduction": 8, "epsilon": 1e-6}, global_context, TIMM_NAMES["gc"]),
    (
        "gc",
        {"reduction": 8, "epsilon": 1e-6, "fuse": "scale"},
        lambda: timm.layers.GlobalContext(64),
        TIMM_NAMES["gc scale"],
    ),
    ("ese", {}, lambda: timm.layers.EffectiveSEModule(64), {}),
    ("coord", {"bias": False, "reduction": 24, "divisor": 8}, lambda: CoordAttn(64), TIMM_NAMES["coord"]),
    ("ge", {"kind": "minus", "extent": 2}, lambda: gather_excite(2), {}),
    ("ge", {"kind": "minus", "extent": 8}, lambda: gather_excite(8), {}),
    ("ge", {"kind": "minus"}, lambda: gather_excite(0), {}),
]


@pytest.mark.parametrize(("name", "options", "theirs", "names"), TIMM)
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_timm_with_the_same_weights(name, options, theirs, names, training):
    ours, theirs = stirred(made(name, 64, **options)), theirs().double()
    weights = theirs.state_dict()
    for key, value in ours.state_dict().items():
        module, _, attribute = key.rpartition(".")
        weights[f"{names.get(module, module)}.{attribute}"] = value
    assert len(weights) == len(ours.state_dict())
    theirs.load_state_dict(weights)
    x = torch.randn(4, 64, 9, 8, dtype=torch.float64)
    result = ours.train(training)(x)
    assert torch.equal(result, theirs.train(training)(x))
    assert (result - x).abs().max() > 0.1


def normed(norm, values):
    """Batch normalisation in eval mode, for values of (N, C, ...)."""
    shape = (1, -1, *[1] * (values.dim() - 2))
    standard = (values - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
    return standard * norm.weight.view(shape) + norm.bias.view(shape)


def matrix(layer):
    return layer.weight.flatten(1)


def bottleneck(first, second, z):
    """W2 δ(W1 z) for z of (N, C)."""
    hidden = z @ matrix(first).T + (0 if first.bias is None else first.bias)
    return hidden.clamp(min=0) @ matrix(second).T + (0 if second.bias is None else second.bias)


def plain_gct(block, x):
    norm = block.alpha.flatten() * (torch.einsum("nchw,nchw->nc", x, x) + 1e-5) ** 0.5
    hat = norm * x.size(1) ** 0.5 / ((norm**2).sum(1, keepdim=True) + x.size(1) * 1e-5) ** 0.5
    return torch.einsum("nchw,nc->nchw", x, 1 + torch.tanh(block.gamma.flatten() * hat + block.beta.flatten()))


def plain_scse(block, x):
    channel = torch.sigmoid(bottleneck(block.fc1, block.fc2, x.flatten(2).mean(2)))
    place = torch.sigmoid(torch.einsum("nchw,c->nhw", x, block.spatial.weight.flatten()) + block.spatial.bias)
    first, second = torch.einsum("nchw,nc->nchw", x, channel), torch.einsum("nchw,nhw->nchw", x, place)
    return first + second if block.combine == "sum" else torch.where(first > second, first, second)


def plain_srm(block, x):
    flat = x.flatten(2)
    deviation = (flat.var(2, correction=0) + 1e-5) ** 0.5
    z = flat.mean(2) * block.weight[:, 0] + deviation * block.weight[:, 1]
    return torch.einsum("nchw,nc->nchw", x, torch.sigmoid(normed(block.norm, z)))


def plain_simam(block, x):
    result = torch.empty_like(x)
    for n, c in torch.cartesian_prod(torch.arange(x.size(0)), torch.arange(x.size(1))):
        plane = x[n, c]
        distance = (plane - plane.mean()) ** 2
        energy = distance / (4 * (plane.var(correction=1) + 1e-4)) + 0.5
        result[n, c] = plane / (1 + torch.exp(-energy))
    return result


def plain_triplet(block, x):
    """As the paper draws it: the tensor is turned, gated in the plane it then shows, and turned back."""
    gated = []
    gates = (block.over_channels, block.over_height, block.over_width)
    for gate, turn in zip(gates, ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)), strict=True):
        turned = x.permute(turn)
        pooled = torch.stack([turned.max(1).values, turned.mean(1)], 1)
        plane = F.conv2d(pooled, gate.conv.weight, padding=3)
        back = [turn.index(axis) for axis in range(4)]
        gated.append((turned * torch.sigmoid(normed(gate.norm, plane))).permute(back))
    return sum(gated) / 3


def plain_bam(block, x):
    first, norm, _, last = block.channel
    z = normed(norm, x.flatten(2).mean(2) @ matrix(first).T + first.bias)
    channel = (z.clamp(min=0) @ matrix(last).T + last.bias)[:, :, None, None]
    y = x
    for i in (0, 3, 6):
        layer, width = block.spatial[i], 4 if i else 0
        y = F.conv2d(y, layer.weight, layer.bias, padding=width, dilation=max(width, 1))
        y = normed(block.spatial[i + 1], y).clamp(min=0)
    place = F.conv2d(y, block.spatial[9].weight, block.spatial[9].bias)
    both = channel * place if block.combine == "product" else channel + place
    return x + x * torch.sigmoid(both)


def plain_nosqueeze(block, x):
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.size(1))
    gate = torch.sigmoid(bottleneck(block.fc1, block.fc2, rows))
    return (rows * gate).view(x.size(0), x.size(2), x.size(3), -1).permute(0, 3, 1, 2)


def plain_ge(block, x):
    if block.extent:
        y = x
        for module in block.gather:
            if isinstance(module, nn.Conv2d):
                y = F.conv2d(y, module.weight, stride=2, padding=1, groups=x.size(1))
            else:
                y = normed(module, y) if isinstance(module, nn.BatchNorm2d) else y.clamp(min=0)
    else:
        y = torch.einsum("nchw,chw->nc", x, block.gather[0].weight.squeeze(1))[:, :, None, None]
        y = normed(block.gather[1], y)
    if block.kind == "plus":
        small = y.permute(0, 2, 3, 1)
        y = bottleneck(block.excite[0], block.excite[2], small.flatten(0, 2)).view(small.shape).permute(0, 3, 1, 2)
    rows = torch.arange(x.size(2)) * y.size(2) // x.size(2)
    columns = torch.arange(x.size(3)) * y.size(3) // x.size(3)
    return x * torch.sigmoid(y[:, :, rows][:, :, :, columns])


def plain_fca(block, x):
    """A whole two-dimensional DCT-II for each channel, of which one coefficient is taken."""

    def transform(length):
        rows = [[math.cos(math.pi * u * (i + 0.5) / length) for i in range(length)] for u in range(length)]
        scales = [math.sqrt((2 if u else 1) / length) for u in range(length)]
        return torch.tensor(rows, dtype=x.dtype) * torch.tensor(scales, dtype=x.dtype)[:, None]

    high, wide = transform(x.size(2)), transform(x.size(3))
    torch.testing.assert_close(high @ high.T, torch.eye(len(high), dtype=x.dtype))
    spectrum = torch.einsum("nchw,uh,vw->ncuv", x, high, wide)
    group = [c * len(block.vertical) // x.size(1) for c in range(x.size(1))]
    z = [
        spectrum[:, c, block.vertical[g] * x.size(2) // 7, block.horizontal[g] * x.size(3) // 7]
        for c, g in enumerate(group)
    ]
    return torch.einsum("nchw,nc->nchw", x, torch.sigmoid(bottleneck(block.fc1, block.fc2, torch.stack(z, 1))))


PLAIN = [
    ("gct", {}, plain_gct),
    ("scse", {}, plain_scse),
    ("scse", {"combine": "max", "bias": False, "reduction": 2}, plain_scse),
    ("srm", {}, plain_srm),
    ("simam", {}, plain_simam),
    ("triplet", {}, plain_triplet),
    ("bam", {}, plain_bam),
    ("bam", {"combine": "sum"}, plain_bam),
    ("nosqueeze", {}, plain_nosqueeze),
    ("ge", {}, plain_ge),
    ("ge", {"extent": 2}, plain_ge),
    ("ge", {"extent": 8}, plain_ge),
    ("ge", {"kind": "plus"}, plain_ge),
    ("ge", {"kind": "plus", "extent": 4}, plain_ge),
    ("fca", {}, plain_fca),
    ("fca", {"frequencies": 3, "bias": True}, plain_fca),
]


@pytest.mark.parametrize(("name", "options", "plain"), PLAIN)
def test_equal_to_a_plain_formulation(name, options, plain):
    block = stirred(made(name, 32, **options))
    x = torch.randn(3, 32, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        result = block(x)
        torch.testing.assert_close(result, plain(block, x), rtol=0, atol=1e-12)
    assert (result - x).abs().max() > 0.1


def test_every_block_has_an_oracle():
    assert {case[0] for case in (*TIMM, *PLAIN)} == set(PLUGINS)


def test_fca_takes_the_published_frequencies_at_the_published_sizes():
    """With one channel per frequency the squeeze is (u, v) of 7 × 7 scaled to the map, and n = 1 is √(HW) · mean."""
    block = made("fca", 16)
    assert sorted(zip(block.vertical, block.horizontal, strict=True))[:3] == [(0, 0), (0, 1), (0, 2)]
    assert len(set(zip(block.vertical, block.horizontal, strict=True))) == 16
    one = stirred(made("fca", 16, frequencies=1))
    x = torch.randn(2, 16, 14, 14, dtype=torch.float64)
    z = 14 * x.mean([2, 3])
    torch.testing.assert_close(one(x), x * torch.sigmoid(bottleneck(one.fc1, one.fc2, z))[:, :, None, None])


def test_ge_pools_other_sizes_to_its_own():
    block = stirred(made("ge", 8, size=(4, 4)))
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = block(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(block(twice), wanted)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", WITH_RANK)
def test_other_dimensions_agree_with_two(name, rank):
    """A line is an image of one column, and an image a volume of one layer: kernels sit in the middle."""
    flat, deep = (stirred(made(name, 32, rank=r)) for r in sorted((rank, 2)))
    weights = deep.state_dict()
    for key, value in flat.state_dict().items():
        if weights[key].dim() > value.dim():
            wide = torch.zeros_like(weights[key])
            wide[..., wide.size(-1) // 2] = value
            value = wide
        weights[key] = value
    deep.load_state_dict(weights)
    x = torch.randn(3, 32, *(9, 8)[: min(rank, 2)], dtype=torch.float64)
    torch.testing.assert_close(deep(x.unsqueeze(-1)).squeeze(-1), flat(x))


# ---- how they start, and the whole contract --------------------------------------------------------------------------

NO_IDENTITY = [("simam", {}), ("ge", {"kind": "minus"}), ("ge", {"kind": "minus", "extent": 4})]
VARIANTS = [
    ("ge", {"kind": "minus", "extent": 4}),
    ("ge", {"extent": 4}),
    ("ge", {"kind": "plus"}),
    ("scse", {"combine": "max"}),
    ("bam", {"combine": "sum"}),
    ("fca", {"frequencies": 3, "bias": True}),
    ("coord", {"bias": False}),
    ("cbam", {"bias": False, "kernel": 3}),
    ("gc", {"fuse": "scale"}),
]


@pytest.mark.parametrize("name", PLUGINS)
def test_contract(name):
    check_block(name)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_contract_of_variants(name, options):
    check_block(name, channels=20, skip=EXPORTS, **options)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", WITH_RANK)
def test_contract_in_other_dimensions(name, rank):
    check_block(name, rank=rank, skip=() if (name, rank) in (("cbam", 1), ("gc", 3)) else EXPORTS)


@pytest.mark.parametrize("name", PLUGINS)
def test_contract_with_one_channel(name):
    check_block(name, channels=1, skip=(*EXPORTS, "gradients"))


@pytest.mark.parametrize("name", PLUGINS)
def test_which_blocks_start_as_the_identity(name):
    """In particular also in training mode, and for what ``paper`` already starts so."""
    block = made(name, 32)
    assert has_identity_start(block) is (name != "simam")
    x = torch.randn(4, 32, 9, 8)
    assert torch.equal(block(x), x) is (name in ("gc", "gct"))
    if name == "simam":
        return
    block.identity_init()
    assert torch.equal(block(x), x)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        (block(x) * torch.randn(x.shape)).sum().backward()
        optimiser.step()
    # with the second step every weight learns; a bias before a norm can't, and GC's softmax knows no constant
    idle = {key for key, p in block.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {key for key in idle if key.endswith("weight")}


@pytest.mark.parametrize(("name", "options"), NO_IDENTITY)
def test_no_identity_where_nothing_can_be_set(name, options):
    block = made(name, 32, **options)
    assert not has_identity_start(block)
    assert parameters(block) == 0
    plan = si.plan(build("torchvision:resnet18"), stages=[4], block=name, **options)
    assert {step.init for step in plan.steps} == {"paper"}
    assert any("no identity start" in note for note in plan.notes)
    with pytest.raises(OptionError, match="no identity start"):
        si.plan(build("torchvision:resnet18"), stages=[4], block=name, init="identity", **options)


START = [
    ("bam", {}, 1.5),
    ("cbam", {}, 0.25),
    ("coord", {}, 0.25),
    ("eca", {}, 0.5),
    ("ese", {}, 0.5),
    ("fca", {}, 0.5),
    ("gc", {"fuse": "scale"}, 0.5),
    ("nosqueeze", {}, 0.5),
    ("scse", {}, 1.0),
    ("scse", {"combine": "max"}, 0.5),
    ("srm", {}, 0.5),
    ("triplet", {}, 0.5),
    ("ge", {}, 0.5),
]


@pytest.mark.parametrize(("name", "options", "factor"), START)
def test_start_factors_of_the_cards(name, options, factor):
    """What the block multiplies by with its last layer at zero and the gate as its authors have it."""
    block = made(name, 32, **options)
    block.identity_init()
    block.gain = 1
    block.scale = 1.0
    x = torch.randn(4, 32, 9, 8)
    # `maximum` of two equal halves, and products of gates, are exact: all factors are powers of two or 1.5
    assert torch.equal(block(x), factor * x)


def test_simam_never_lets_all_through():
    x = torch.randn(4, 32, 20, 20)
    factor = made("simam", 32)(x) / x
    assert factor.min() >= torch.sigmoid(torch.tensor(0.5)) - 1e-6
    assert 0.65 < factor.mean() < 0.70


WRONG = [
    ("eca", {"kernel": 4}),
    ("eca", {"gamma": 0}),
    ("eca", {"rank": 4}),
    ("cbam", {"kernel": 6}),
    ("triplet", {"kernel": 0}),
    ("scse", {"combine": "mean"}),
    ("bam", {"combine": "max"}),
    ("gc", {"fuse": "mul"}),
    ("ge", {"kind": "θ"}),
    ("ge", {"extent": 6}),
    ("ge", {"extent": -2}),
    ("ge", {"size": None}),
    ("fca", {"frequencies": 17}),
    ("gc", {"reduction": 0}),
    ("simam", {"rank": 0}),
]


@pytest.mark.parametrize(("name", "options"), WRONG)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(OptionError):
        find_block(name)(16, **options)


@pytest.mark.parametrize("name", sorted(set(PLUGINS) - set(WITH_RANK)))
def test_blocks_for_images_refuse_other_dimensions(name):
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 16, 3, padding=1)
            self.norm = nn.BatchNorm1d(16)
            self.relu = nn.ReLU()
            self.skip = nn.Conv1d(3, 16, 1)

        def forward(self, x):
            return self.relu(self.norm(self.conv(x)) + self.skip(x))

    with pytest.raises(OptionError, match="two spatial dimensions"):
        si.plan(Line(), torch.randn(2, 3, 24), block=name)
    si.plan(Line(), torch.randn(2, 3, 24), block="eca")


# ---- going in --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18():
    return randomise(build("torchvision:resnet18")).eval()


@pytest.mark.parametrize("name", PLUGINS)
def test_goes_into_resnet18_and_verifies(resnet18, name):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plan = si.plan(resnet18, x, stages=[4], block=name)
    injected = plan.apply(resnet18)
    verdict = si.verify(resnet18, injected, x)
    assert verdict.passed, verdict
    same = all(torch.equal(a, b) for a, b in zip(outputs(resnet18, x), outputs(injected, x), strict=True))
    assert same is (name != "simam")
    assert plan.cost().added.params == parameters(injected) - parameters(resnet18)
    again = si.Plan.from_json(plan.to_json()).apply(resnet18)
    assert parameters(again) == parameters(injected)


def untouched(network, before):
    now = network.state_dict()
    return (
        type(network).__name__ == "ResNet"
        and now.keys() == before.keys()
        and all(torch.equal(now[key], before[key]) for key in before)
        and not [module for module in network.modules() if is_edited(module)]
    )


FAULTY = """
import torch
from torch import nn

class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        {init}
    def forward(self, x):
        {forward}
"""


@pytest.mark.parametrize(
    ("init", "forward", "words"),
    [
        ("raise KeyError('colour')", "return x", "colour"),
        ("", "raise ArithmeticError('no gate today')", "no gate today"),
        ("", "return x[:, 1:]", "(2, 511, "),
        ("", "return x.double()", "float64"),
        ("", "return x, self.weight", "tuple"),
        ("", "return x if x.sum().item() > 0 else -x", "item"),
    ],
)
def test_a_fault_of_a_plugin_is_called_its_own_and_the_network_stays(tmp_path, resnet18, init, forward, words):
    (tmp_path / "faulty_gate.py").write_text(FAULTY.format(init=init or "pass", forward=forward))
    before = {key: value.clone() for key, value in resnet18.state_dict().items()}
    name = f"{tmp_path / 'faulty_gate.py'}:Gate"
    with pytest.raises(PluginError) as info:
        si.plan(resnet18, torch.randn(2, 3, 64, 64), stages=[4], block=name).apply_(resnet18)
    assert name in str(info.value)
    assert words in str(info.value)
    assert untouched(resnet18, before)


def test_a_broken_entry_point_does_not_stop_the_others(monkeypatch, resnet18):
    real = importlib.metadata.entry_points

    def with_broken(**selection):
        broken = [
            importlib.metadata.EntryPoint("moved", "a_package_that_is_not_there:Gate", GROUP),
            importlib.metadata.EntryPoint("renamed", "se_inject_plugins.eca:OldName", GROUP),
        ]
        found = list(real(**selection))
        if selection.get("group") == GROUP:
            found += [point for point in broken if selection.get("name") in (None, point.name)]
        return importlib.metadata.EntryPoints(found)

    monkeypatch.setattr(importlib.metadata, "entry_points", with_broken)
    assert {"moved", "renamed", *PLUGINS} <= set(block_names())
    for name, words in (("moved", "a_package_that_is_not_there"), ("renamed", "OldName")):
        with pytest.raises(PluginError, match=f"block `{name}`") as info:
            si.plan(resnet18, stages=[4], block=name)
        assert words in str(info.value)
    assert len(si.plan(resnet18, stages=[4], block="eca")) == 2


STRANGER = """
import sys
import torch, torchvision
import se_inject as si
from se_inject.forwards import is_edited
from se_inject.blocks.registry import block_names

torch.set_num_threads(1)
assert block_names()["loudness"] == "my-gates"
network = torchvision.models.resnet18().eval()
x = torch.randn(2, 3, 64, 64)
injected = si.inject(network, x, stages=[4], block="loudness", sharpness=2.0)
assert sum(p.numel() for p in injected.parameters()) - sum(p.numel() for p in network.parameters()) == 2 * 2 * 512
assert torch.equal(injected(x), network(x))
assert si.verify(network, injected, x).passed
assert len(si.export(injected, sys.argv[1], (x,)).checks) == 3
"""


def test_a_package_of_a_stranger_installs_is_listed_goes_in_verifies_and_exports(tmp_path):
    for tool, least in (("pip", 21), ("setuptools", 77)):
        if not any(int(d.version.split(".")[0]) >= least for d in importlib.metadata.distributions(name=tool)):
            pytest.skip(f"needs {tool} {least}, to install without an index")
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(Path(__file__).parents[2] / "examples" / "my_plugin", source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path = [str(target), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    for command in (
        ["-c", STRANGER, str(tmp_path / "net.onnx")],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(source)],
    ):
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
