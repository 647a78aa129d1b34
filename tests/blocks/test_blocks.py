"""SE and its options: against formulas written another way, its counts, its starts, and what it refuses."""

import itertools
import math

import pytest
import torch
from timm.layers import SEModule
from torch import nn
from torchvision.ops import SqueezeExcitation as TorchvisionSE

import se_inject as si
from se_inject.blocks.layers import ACTIVATIONS
from se_inject.blocks.registry import block_options, parsed_options
from se_inject.blocks.squeeze_excitation import GATES, SQUEEZES, SqueezeExcitation
from se_inject.errors import OptionError
from se_inject.testing import check_block
from tests.common import build, outputs, randomise

EXPORTS = ("pt2", "onnx")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def made(channels=32, **options):
    torch.manual_seed(0)
    return SqueezeExcitation(channels, **options)


def value(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- what it computes ------------------------------------------------------------------------------------------------

Z = {
    "avg": lambda u: sum(u) / len(u),
    "max": max,
    "avg+max": lambda u: (sum(u) / len(u) + max(u)) / 2,
    "std": lambda u: math.sqrt(sum((v - sum(u) / len(u)) ** 2 for v in u) / len(u) + 1e-5),
}
DELTA = {
    "relu": lambda a: max(a, 0.0),
    "silu": lambda a: a / (1 + math.exp(-a)),
    "gelu": lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2,
    "hard_swish": lambda a: a * min(max(a + 3, 0.0), 6.0) / 6,
}
SIGMA = {
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "hard_sigmoid": lambda a: min(max(a / 6 + 0.5, 0.0), 1.0),
    "tanh": lambda a: (math.exp(2 * a) - 1) / (math.exp(2 * a) + 1),
    "relu": lambda a: max(a, 0.0),
}
FROM_ONE = {
    "sigmoid": lambda a: 2 / (1 + math.exp(-a)),
    "hard_sigmoid": lambda a: min(max(1 + a / 3, 0.0), 2.0),
    "tanh": lambda a: 2 / (1 + math.exp(-2 * a)),
    "relu": lambda a: max(1 + a, 0.0),
}


def by_hand(block, x, squeeze="avg", activation="relu", gate=SIGMA["sigmoid"]):
    """Equations 2 to 4 with Python's numbers, one example, one channel at a time."""
    w1, w2 = block.fc1.weight.flatten(1).tolist(), block.fc2.weight.flatten(1).tolist()
    b1 = [0.0] * len(w1) if block.fc1.bias is None else block.fc1.bias.tolist()
    b2 = [0.0] * len(w2) if block.fc2.bias is None else block.fc2.bias.tolist()
    result = torch.empty_like(x)
    for n, example in enumerate(x):
        z = [Z[squeeze](channel.flatten().tolist()) for channel in example]
        hidden = [sum(w * v for w, v in zip(row, z, strict=True)) + b for row, b in zip(w1, b1, strict=True)]
        if block.bn is not None:
            bn = block.bn
            told = zip(
                hidden,
                *(t.tolist() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)),
                strict=True,
            )
            hidden = [(h - mean) / math.sqrt(var + 1e-5) * scale + shift for h, mean, var, scale, shift in told]
        hidden = [DELTA[activation](h) for h in hidden]
        for c, (row, b) in enumerate(zip(w2, b2, strict=True)):
            result[n, c] = example[c] * gate(sum(w * h for w, h in zip(row, hidden, strict=True)) + b)
    return result


def stirred(block):
    """Weights so large that every gate is used over more than its middle."""
    generator = torch.Generator().manual_seed(0)
    block = randomise(block.double()).eval()
    with torch.no_grad():
        for layer in (block.fc1, block.fc2):
            layer.weight.normal_(0, 1.5, generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, 1, generator=generator)
    return block


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("gate", GATES)
def test_squeezes_and_gates_by_hand(squeeze, gate, rank):
    block = stirred(made(8, reduction=2, squeeze=squeeze, gate=gate, rank=rank))
    x = value(3, 8, *(5, 4, 3)[:rank], dtype=torch.float64)
    for start, table in ((False, SIGMA), (True, FROM_ONE)):
        block.one_at_zero = start
        wanted = by_hand(block, x, squeeze, gate=table[gate])
        torch.testing.assert_close(block(x), wanted, rtol=0, atol=1e-12)
        assert (block(x) - x).abs().max() > 0.1


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_biases_and_norm_by_hand(activation, bias, norm):
    block = stirred(made(8, width=5, activation=activation, bias=bias, norm=norm))
    x = value(3, 8, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(block(x), by_hand(block, x, activation=activation), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 8, 1, 1), (4, 8, 6, 6)])
def test_the_deviation_of_a_constant_has_a_gradient(shape):
    block = made(8, squeeze="std", gate="tanh")
    x = torch.ones(shape, requires_grad=True)
    block(x).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *block.parameters()))
    torch.testing.assert_close(block.squeezed(x), torch.full((4, 8, 1, 1), math.sqrt(1e-5)))


# ---- how many parameters ---------------------------------------------------------------------------------------------

WIDTHS = (64, 256, 512, 1024, 2048)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"divisor": 8}, (1_096, 8_464, 33_312, 132_160, 526_464)),  # timm's
        ({"divisor": 8, "bias": False}, (1_024, 8_192, 32_768, 131_072, 524_288)),
        ({"bias": False}, tuple(2 * c * c // 16 for c in WIDTHS)),  # equation 5
        ({}, tuple(2 * c * c // 16 + c + c // 16 for c in WIDTHS)),
        ({"reduction": 4, "norm": True}, tuple(2 * c * c // 4 + c + c // 4 + c // 2 for c in WIDTHS)),
        ({"width": 6, "bias": False}, tuple(12 * c for c in WIDTHS)),
        ({"width": 6, "norm": True}, tuple(12 * c + c + 6 + 12 for c in WIDTHS)),
        ({"squeeze": "avg+max", "gate": "tanh", "activation": "gelu"}, (580, 8_464, 33_312, 132_160, 526_464)),
    ],
    ids=str,
)
def test_parameters_by_formula_as_built_and_as_published(options, counts):
    for channels, expected in zip(WIDTHS, counts, strict=True):
        with torch.device("meta"):
            assert parameters(SqueezeExcitation(channels, **options)) == expected
        assert SqueezeExcitation.count(channels, **options) == expected


INCEPTION = {256: 16, 320: 20, 576: 36, 608: 38, 1056: 66, 1024: 64}
TIMM = {64: 8, 160: 8, 192: 16, 240: 16, 320: 24, 480: 32, 576: 40, 608: 40, 672: 40, 960: 64, 1056: 64}


def test_widths_of_the_released_networks():
    assert {c: SqueezeExcitation(c).width for c in INCEPTION} == INCEPTION
    assert {c: SqueezeExcitation(c, divisor=8).width for c in TIMM} == TIMM
    assert SqueezeExcitation(64, width=11).width == 11


def test_the_names_in_the_state_dict_are_timms_and_torchvisions():
    names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert list(made().state_dict()) == names == list(TorchvisionSE(32, 2).state_dict())
    assert list(made(squeeze="max", gate="tanh", activation="silu").state_dict()) == names
    ours, theirs = made(norm=True), SEModule(32, rd_divisor=1, norm_layer=nn.BatchNorm2d)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


# ---- how it starts ---------------------------------------------------------------------------------------------------

SLOPES = {"sigmoid": 1 / 2, "hard_sigmoid": 1 / 3, "tanh": 1, "relu": 1}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_exactly_one_at_zero_and_not_flat(gate, dtype):
    block = made(gate=gate)
    block.one_at_zero = True
    for zero in (0.0, -0.0):
        a = torch.full((4, 32, 1, 1), zero, dtype=dtype, requires_grad=True)
        s = block.gated(a)
        assert torch.equal(s, torch.ones_like(s))
        s.sum().backward()
        torch.testing.assert_close(a.grad, torch.full_like(a, SLOPES[gate]))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("gate", "squeeze"), list(itertools.product(GATES, SQUEEZES)))
def test_identity_start_is_exact_in_every_format_and_learns(gate, squeeze, bias, norm):
    block = made(16, reduction=4, gate=gate, squeeze=squeeze, bias=bias, norm=norm)
    block.identity_init()
    for dtype, scale, training in itertools.product(FLOATS, (1e-3, 1.0, 100.0), (False, True)):
        x = (scale * value(4, 16, 5, 3)).to(dtype)
        assert torch.equal(block.to(dtype).train(training)(x), x)
    block = block.float().train()
    optimiser = torch.optim.SGD(block.parameters(), lr=0.5)
    x, target = value(8, 16, 5, 3), value(8, 16, 5, 3, seed=1)
    reached = []
    for _ in range(2):
        optimiser.zero_grad()
        (block(x) * target).sum().backward()
        reached.append({name for name, p in block.named_parameters() if p.grad is not None and p.grad.any()})
        optimiser.step()
    second = {"fc2.weight", "fc2.bias"} & set(dict(block.named_parameters()))
    assert reached[0] == second
    assert reached[1] >= second | {"fc1.weight"}
    assert not torch.allclose(block(x), x)


@pytest.mark.parametrize(("gate", "factor"), [("sigmoid", 0.5), ("hard_sigmoid", 0.5), ("tanh", 0.0), ("relu", 0.0)])
def test_start_factors_of_the_card(gate, factor):
    block = made(gate=gate)
    block.identity_init()
    block.one_at_zero = False
    x = value(2, 32, 4, 4)
    assert torch.equal(block(x), factor * x)


@pytest.mark.parametrize("gate", GATES)
def test_a_network_with_any_gate_starts_as_it_was(gate):
    network = randomise(build("timm:resnet18"))
    injected = si.inject(network, value(2, 3, 64, 64), gate=gate, squeeze="avg+max")
    for training in (False, True):
        pair = [outputs(model.train(training), value(2, 3, 64, 64))[0] for model in (network, injected)]
        assert torch.equal(*pair)


# ---- the contract, files ---------------------------------------------------------------------------------------------

VARIANTS = [
    ({"gate": "hard_sigmoid", "squeeze": "avg+max", "norm": True, "activation": "hard_swish"}, ()),
    ({"gate": "tanh", "squeeze": "max", "activation": "silu", "rank": 1}, EXPORTS),
    ({"gate": "relu", "squeeze": "std", "activation": "gelu", "width": 7}, ()),
    ({"gate": "relu", "squeeze": "avg+max", "bias": False, "rank": 3, "reduction": 4}, ("half", *EXPORTS)),
]


@pytest.mark.parametrize(("options", "skip"), VARIANTS, ids=str)
def test_contract_of_variants(options, skip):
    check_block("se", channels=24, skip=skip, **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("gate", "squeeze"), list(itertools.product(GATES, SQUEEZES)))
def test_torchscript_drops_the_branches_of_other_options(gate, squeeze, norm):
    block = made(gate=gate, squeeze=squeeze, norm=norm).eval()
    block.identity_init()
    branches = [line for line in str(torch.jit.script(block).inlined_graph).splitlines() if "prim::If" in line]
    assert not [line for line in branches if "squeeze_excitation.py" in line]
    assert norm or squeeze == "std" or not branches  # those of torch's batch norm, and of the number format


def test_a_network_with_options_comes_back_from_its_file_without_trust(tmp_path):
    network = randomise(build("timm:resnet18"))
    options = {"gate": "hard_sigmoid", "squeeze": "std", "activation": "gelu", "norm": True, "width": 4}
    plan = si.plan(network, value(2, 3, 64, 64), stages=[3, 4], **options)
    injected = si.Plan.from_json(plan.to_json()).apply(network).eval()
    nn.init.normal_(injected.get_submodule(plan.steps[0].path).fc2.weight)
    torch.save(injected, tmp_path / "net.pt")
    again = si.load(str(tmp_path / "net.pt"))
    x = value(2, 3, 64, 64)
    assert torch.equal(outputs(again, x)[0], outputs(injected, x)[0])
    assert not torch.equal(outputs(again, x)[0], outputs(network.eval(), x)[0])
    assert repr(again.get_submodule(plan.steps[0].path)) == repr(injected.get_submodule(plan.steps[0].path))


# ---- what is refused -------------------------------------------------------------------------------------------------

WRONG = [
    ({"gate": "sigmiod"}, "no such gate: `sigmiod`", "did you mean `sigmoid`"),
    ({"gate": "hard-sigmoid"}, "no such gate", "did you mean `hard_sigmoid`"),
    ({"squeeze": "mean"}, "no such squeeze: `mean`", None),
    ({"squeeze": "avg-max"}, "no such squeeze", "did you mean `avg+max`"),
    ({"activation": "glu"}, "no such activation", "`gelu`"),
    ({"width": 8, "reduction": 16}, "given twice", "either a width"),
    ({"width": 8, "divisor": 8}, "given twice", "either a width"),
    ({"width": 0}, "at least 1 wide", None),
    ({"reduction": 0}, "must be positive", None),
    ({"divisor": 0}, "at least 1", None),
    ({"rank": 4}, "1 to 3 spatial dimensions", None),
    ({"gaet": "tanh"}, "no option `gaet`", "did you mean `gate`"),
]


@pytest.mark.parametrize(("options", "message", "hint"), WRONG, ids=str)
def test_wrong_options_are_refused_with_what_there_is(options, message, hint):
    network = build("timm:resnet18")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(OptionError, match=message) as caught:
        si.plan(network, value(2, 3, 64, 64), **options) if "rank" not in options else made(**options)
    assert caught.value.exit_code == 2
    assert hint is None or hint in caught.value.hint
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_options_from_text_have_their_types():
    told = ["gate=relu", "squeeze=avg+max", "norm=yes", "width=12", "bias=false", "activation=silu"]
    parsed = parsed_options("se", told)
    wanted = {"gate": "relu", "squeeze": "avg+max", "norm": True, "width": 12, "bias": False, "activation": "silu"}
    assert parsed == wanted
    assert parsed.keys() < block_options("se").keys()
    with pytest.raises(OptionError, match="`norm` can't be `perhaps`"):
        parsed_options("se", ["norm=perhaps"])
    with pytest.raises(OptionError, match="`width` can't be `wide`"):
        parsed_options("se", ["width=wide"])


def test_a_width_of_one_is_no_reduction_above_the_channels():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    assert not any("too much" in note for note in si.plan(network, value(2, 3, 16, 16), width=1).notes)
    assert any("too much" in note for note in si.plan(network, value(2, 3, 16, 16), reduction=None).notes)
