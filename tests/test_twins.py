"""Networks that others publish with attention, and the same ones without it: ours put into these must give those.

The twin's weights go in through a key map, strictly, and every output is equal to the twin's bit for bit, in eval and
in train. There is no tolerance: wherever timm and torchvision have a block, ours does the same operations in an order
that rounds alike. (Theirs multiply by the gate from one side or the other, which is the same.)
"""

import re
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.layers import GatherExcite, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.ops import SqueezeExcitation

import se_inject as si
from tests.common import TIMM_NAMES, build, outputs, randomise

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def stirred(model):
    """No norm, and no last layer of a block, is zero or one."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(getattr(module, "gain", None), nn.Parameter):  # of standardised convolutions
            nn.init.uniform_(module.gain, 0.5, 1.5)
    return randomise(model)


def assert_twins(ours, theirs, base, rename=lambda key: key):
    """The same parameters, under names that ``rename`` makes theirs; the same outputs; and not those without blocks."""
    weights = theirs.state_dict()
    renamed = {key: rename(key) for key in ours.state_dict()}
    assert sorted(renamed.values()) == sorted(weights)
    ours.load_state_dict({key: weights[name] for key, name in renamed.items()}, strict=True)
    assert parameters(ours) == parameters(theirs)
    base.load_state_dict({key: weights[renamed[key]] for key in base.state_dict()}, strict=True)
    for training in (False, True):
        wanted = outputs(theirs.train(training), X)
        assert wanted[0].isfinite().all()
        for one, other in zip(outputs(ours.train(training), X), wanted, strict=True):
            assert torch.equal(one, other), (one - other).abs().max()
        assert not torch.equal(outputs(base.train(training), X)[0], wanted[0])


def replaced(text, table):
    for pattern, by in table.items():
        text = re.sub(pattern, by, text)
    return text


# -- timm's ResNet takes any attention layer: every option has its twin ---------------------------------------------


def small(attention=None, unit=Bottleneck):
    args = {"block_args": {"attn_layer": attention}} if attention else {}
    return ResNet(unit, (1, 2, 1, 1), channels=(16, 32, 48, 64), num_classes=10, **args)


def se(**options):
    return partial(SEModule, **options)


ATTENTION: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "se": ("se", "se", {"divisor": 8}),
    "se without rounding": (se(rd_divisor=1), "se", {}),
    "se r=4": (se(rd_ratio=1 / 4), "se", {"reduction": 4, "divisor": 8}),
    "se width": (se(rd_channels=5), "se", {"width": 5}),
    "se without biases": (se(bias=False), "se", {"divisor": 8, "bias": False}),
    "se avg+max": (se(add_maxpool=True), "se", {"divisor": 8, "squeeze": "avg+max"}),
    "se norm": (se(norm_layer=nn.BatchNorm2d), "se", {"divisor": 8, "norm": True}),
    "se hard sigmoid": (se(gate_layer="hard_sigmoid"), "se", {"divisor": 8, "gate": "hard_sigmoid"}),
    "se tanh": (se(gate_layer=nn.Tanh), "se", {"divisor": 8, "gate": "tanh"}),
    "se relu": (se(gate_layer=nn.ReLU), "se", {"divisor": 8, "gate": "relu"}),
    "se silu": (se(act_layer=nn.SiLU), "se", {"divisor": 8, "activation": "silu"}),
    "se gelu": (se(act_layer=nn.GELU), "se", {"divisor": 8, "activation": "gelu"}),
    "se hard swish": (se(act_layer=nn.Hardswish), "se", {"divisor": 8, "activation": "hard_swish"}),
    "se everything": (
        se(
            rd_channels=6,
            bias=False,
            add_maxpool=True,
            norm_layer=nn.BatchNorm2d,
            gate_layer=nn.Tanh,
            act_layer=nn.SiLU,
        ),
        "se",
        {"width": 6, "bias": False, "squeeze": "avg+max", "norm": True, "gate": "tanh", "activation": "silu"},
    ),
    "torchvision's": (
        lambda channels, device=None, dtype=None: SqueezeExcitation(channels, channels // 4),
        "se",
        {"reduction": 4},
    ),
    "ese": ("ese", "ese", {}),
    "eca": ("eca", "eca", {}),
    "cbam": ("cbam", "cbam", {"bias": False}),
    "gca": ("gca", "gc", {"reduction": 8, "epsilon": 1e-6}),
    "gc": ("gc", "gc", {"reduction": 8, "epsilon": 1e-6, "fuse": "scale"}),
    "coord": ("coord", "coord", {"bias": False, "reduction": 24, "divisor": 8}),
    "ge": (partial(GatherExcite, use_mlp=False), "ge", {"kind": "minus"}),
    "ge extent 2": (partial(GatherExcite, use_mlp=False, extent=2), "ge", {"kind": "minus", "extent": 2}),
}
"""timm's layer, our block, our options. Of timm's gather-excite the variants with weights can't be built: their
constructors take one argument too few."""


@pytest.mark.parametrize(
    ("unit", "name"), [(Bottleneck, name) for name in ATTENTION] + [(BasicBlock, name) for name in ("se", "gc", "cbam")]
)
def test_timms_resnet_with_any_attention(unit, name):
    attention, block, options = ATTENTION[name]
    base, theirs = small(unit=unit), stirred(small(attention, unit))
    names = TIMM_NAMES.get("gc scale" if name == "gc" else block, {})
    ours = si.inject(base, X, block=block, init="paper", **options)
    assert_twins(
        ours,
        theirs,
        base,
        lambda key: replaced(key, {rf"\.se\.{our}\.": f".se.{their}." for our, their in names.items()}),
    )


def test_timms_gather_excite_with_weights_is_broken():
    """If this fails, it has been repaired: then θ and θ⁺ belong into the table above."""
    with pytest.raises(TypeError):
        GatherExcite(64)


# -- networks published with and without ----------------------------------------------------------------------------


class Pair(NamedTuple):
    base: str
    twin: str
    block: str
    options: dict[str, Any]
    rename: dict[str, str] = {}  # noqa: RUF012 -- never changed
    without: dict[str, Any] = {}  # noqa: RUF012


IN_UNIT = {r"\.se\.": ".attn."}
GC = {rf"\.se\.{our}\.": f".attn.{their}." for our, their in TIMM_NAMES["gc"].items()}
PUBLISHED = [
    Pair("resnet26t", "ecaresnet26t", "eca", {"init": "paper"}),
    Pair("resnet50d", "ecaresnet50d", "eca", {"init": "paper"}),
    Pair("resnext26ts", "seresnext26ts", "se", {"init": "paper", "divisor": 8, "position": "conv3x3"}, IN_UNIT),
    Pair("resnext26ts", "eca_resnext26ts", "eca", {"init": "paper", "position": "conv3x3"}, IN_UNIT),
    Pair(
        "resnext26ts",
        "gcresnext26ts",
        "gc",
        {"init": "paper", "reduction": 8, "epsilon": 1e-6, "position": "conv3x3"},
        GC,
    ),
    Pair(
        "ese_vovnet39b",
        "ese_vovnet39b",
        "ese",
        {"init": "paper", "at": ["stages.[01].blocks.0.conv_concat", "stages.[23].blocks.1.conv_concat"]},
        {r"(\.conv_concat)?\.se\.": ".attn."},
        {"attn": ""},
    ),
    # these two double the gate, as our identity start does
    Pair("nf_resnet26", "nf_ecaresnet26", "eca", {"init": "identity"}, {r"\.se\.": ".attn_last."}),
    Pair("nf_resnet50", "nf_seresnet50", "se", {"init": "identity", "divisor": 8}, {r"\.se\.": ".attn_last."}),
]


@pytest.mark.parametrize("pair", PUBLISHED, ids=lambda pair: pair.twin)
def test_networks_that_timm_publishes_with_and_without(pair):
    base, theirs = timm.create_model(pair.base, **pair.without), stirred(timm.create_model(pair.twin))
    ours = si.inject(base, X, block=pair.block, **pair.options)
    assert_twins(ours, theirs, base, lambda key: replaced(key, pair.rename))


# -- mobile networks and RegNets: a width of its own at each site ---------------------------------------------------


def without(network, kind, keep=()):
    """A copy with each module of this class replaced by an identity, but those whose paths start so."""
    network = deepcopy(network)
    for path, module in list(network.named_modules()):
        if isinstance(module, kind) and not path.startswith(keep or "-"):
            network.set_submodule(path, nn.Identity())
    return network


def regnet(se_ratio):
    """torchvision's regnet_y_400mf, or with None the same network without SE."""
    return RegNet(
        BlockParams.from_init_params(depth=16, w_0=48, w_a=27.89, w_m=2.09, group_width=8, se_ratio=se_ratio),
        num_classes=10,
    )


def without_and_with(name, kind=SqueezeExcite, keep=()):
    theirs = build(name)
    return without(theirs, kind, keep), theirs


IN_SEQUENCE = {r"block\.0\.2\.se\.": "block.1.", r"block\.1\.2\.se\.": "block.2."}  # MBConv without, with expansion
BESIDE = {r"\.se_block\.fc1": ".se.conv_reduce", r"\.se_block\.fc2": ".se.conv_expand"}
OWN_WIDTHS = {
    "torchvision mobilenet_v3_small": (
        lambda: without_and_with("torchvision:mobilenet_v3_small", SqueezeExcitation),
        {"gate": "hard_sigmoid"},
        IN_SEQUENCE,
    ),
    "torchvision mobilenet_v3_large": (
        lambda: without_and_with("torchvision:mobilenet_v3_large", SqueezeExcitation),
        {"gate": "hard_sigmoid"},
        IN_SEQUENCE,
    ),
    "torchvision efficientnet_b0": (
        lambda: without_and_with("torchvision:efficientnet_b0", SqueezeExcitation),
        {"activation": "silu"},
        IN_SEQUENCE,
    ),
    "torchvision regnet_y_400mf": (lambda: (regnet(None), regnet(0.25)), {}, {r"\.b\.2\.se\.": ".se."}),
    "timm mobilenetv3_small_050": (
        lambda: without_and_with("timm:mobilenetv3_small_050", keep="blocks.0"),
        {"gate": "hard_sigmoid"},
        BESIDE,
    ),
    "timm efficientnet_b0": (
        lambda: without_and_with("timm:efficientnet_b0", keep="blocks.0"),
        {"activation": "silu"},
        BESIDE,
    ),
    "timm regnety_002": (
        lambda: (timm.create_model("regnety_002", se_ratio=0.0), timm.create_model("regnety_002")),
        {},
        {r"\.se_block\.": ".se."},
    ),
}
"""Without and with SE, our options, our names → theirs. The first stage of timm's mobile networks keeps its own SE: it
gates a depthwise convolution that is in no residual unit."""


@pytest.mark.parametrize("name", OWN_WIDTHS)
def test_networks_whose_se_has_a_width_of_its_own_at_each_site(name):
    made, options, names = OWN_WIDTHS[name]
    base, theirs = made()
    stirred(theirs)
    weights = theirs.state_dict()
    plan = si.plan(base, X, position="conv3x3", init="paper", **options)
    first = [(step, weights.get(replaced(f"{step.path}.fc1.weight", names))) for step in plan.steps]
    steps = [replace(step, options=options | {"width": len(w)}) for step, w in first if w is not None]
    ours = replace(plan, steps=tuple(steps)).apply(base)
    assert_twins(ours, theirs, base, lambda key: replaced(key, names))


def test_timms_legacy_networks():
    """Their SE squeezes to C // 16 without rounding, under the name that pretrainedmodels gave it."""
    base, theirs = without_and_with("timm:legacy_seresnet18", timm.models.senet.SEModule)
    ours = si.inject(base, X, init="paper")
    assert_twins(ours, stirred(theirs), base, lambda key: key.replace(".se.", ".se_module."))
