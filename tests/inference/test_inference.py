"""Copies for inference compute what the network computes, with less."""

import copy
import warnings

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import se_inject as si
from se_inject.blocks import NoGate
from se_inject.errors import SurgeryError, UnsupportedModel, VerificationError
from se_inject.inference import network as inference
from se_inject.inference.blocks import EarlySqueeze, FixedGate
from tests.common import build, portrait, randomise, same_portrait

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Bottleneck(nn.Module):
    """A unit of 1×1, 3×3 and 1×1 convolutions, the last with more outputs than inputs."""

    def __init__(self, channels=16, width=8, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, channels, 1, groups=groups, bias=False), nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.drop(self.bn3(self.conv3(y))) + x)


class Net(nn.Module):
    def __init__(self, *units, channels=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.units = nn.Sequential(*units)

    def forward(self, x):
        return self.units(self.stem(x))


def trained(network, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in si.injected_parameters(network):
            parameter.normal_(0, scale, generator=generator)
    return network


def relative(one, other):
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def count(network, *kinds):
    return sum(type(module) in kinds for module in network.modules())


def norms(network):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@pytest.mark.parametrize("name, early", [("torchvision:resnet50", 16), ("timm:mobilenetv2_100", 0)])
def test_networks_of_the_zoos(name, early):
    before, x = randomise(build(name)).double(), X.double()  # in float64 no rounding hides a mistake
    injected = trained(si.inject(before, x))
    new = si.for_inference(injected, x)
    assert norms(new) == 0
    assert count(new, EarlySqueeze) == early
    assert not new.training
    assert not any(parameter.requires_grad for parameter in new.parameters())
    assert isinstance(new, type(before))
    with torch.no_grad():
        assert relative(new(x), injected.eval()(x)) < 1e-9
        assert relative(si.for_inference(before, x)(x), before.eval()(x)) < 1e-9


def test_the_network_itself_is_not_changed():
    injected = trained(si.inject(Net(Bottleneck(), Bottleneck()), X)).train()
    before = portrait(injected)
    si.for_inference(injected, X)
    same_portrait(before, portrait(injected))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    "options", [{}, {"gate": "tanh", "bias": False}, {"norm": True}, {"squeeze": "max"}, {"block": "eca"}]
)
def test_options(groups, options):
    injected = trained(si.inject(randomise(Net(Bottleneck(groups=groups), Bottleneck())), X, **options), 0.3)
    randomise(injected)
    new = si.for_inference(si.fuse_(copy.deepcopy(injected)), X)
    usual = "block" not in options and options.get("squeeze", "avg") == "avg"
    assert count(new, EarlySqueeze) == 2 * usual
    injected.eval()
    with torch.no_grad():
        for x in (X, X[:1, :, :9, :7], X.to(memory_format=torch.channels_last), X[:0]):
            if x.numel():
                assert relative(new(x), injected(x)) < 1e-5
            assert new(x).shape == injected(x).shape
            assert new(x).stride() == injected(x).stride()


def test_what_is_given_is_not_overwritten():
    injected = trained(si.inject(randomise(Net(Bottleneck(), Bottleneck())), X), 0.3).eval()
    new = si.for_inference(injected, X)
    kept = X.clone()
    with torch.no_grad():
        first = new(X)
        assert torch.equal(new(X), first)
    assert torch.equal(X, kept)
    with_grad = new(X.clone().requires_grad_())
    assert relative(with_grad, injected(X)) < 1e-5


def test_blocks_at_their_start_are_gone():
    before = randomise(Net(Bottleneck(), Bottleneck()))
    new = si.for_inference(si.inject(before, X), X)
    assert count(new, NoGate) == 2
    with torch.no_grad():
        assert torch.equal(new(X), si.for_inference(before, X)(X))


def test_gates_that_never_change_are_in_the_weights():
    injected = trained(si.inject(randomise(Net(Bottleneck(), Bottleneck())), X, init="paper"), 0.5)
    with torch.no_grad():
        injected.units[0].se.fc2.weight.zero_()
        injected.units[1].se.fc1.weight.zero_()
    new = si.for_inference(injected, X)
    assert count(new, NoGate) == 2
    with torch.no_grad():
        assert relative(new(X), injected.eval()(X)) < 1e-5


def test_a_fixed_gate_without_a_convolution_in_front_stays():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return F.relu(F.silu(self.one(x)) * self.two(x) + x)

    injected = trained(si.inject(randomise(Net(Sum(), Sum())), X, init="paper", at="units.*"), 0.5)
    with torch.no_grad():
        for _, block in si.surgery.injected_blocks(injected):
            block.fc2.weight.zero_()
    new = si.for_inference(injected, X)
    assert sum(isinstance(module, FixedGate) for module in new.modules()) == 2
    with torch.no_grad():
        assert relative(new(X), injected.eval()(X)) < 1e-5


def test_hidden_units_that_never_change_are_folded():
    injected = trained(si.inject(randomise(Net(Bottleneck(), Bottleneck())), X, width=4, norm=True), 0.5)
    randomise(injected)
    with torch.no_grad():
        injected.units[0].se.fc1.weight[0].zero_()
        injected.units[0].se.fc2.weight[:, 1].zero_()
    new = si.for_inference(injected, X)
    assert [unit.se.fc1.out_channels for unit in new.units] == [2, 4]
    with torch.no_grad():
        assert relative(new(X), injected.eval()(X)) < 1e-5


class Functional(nn.Module):
    """Convolution and normalisation as functions."""

    def __init__(self, channels=16):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels, 1, 3, 3)), nn.Parameter(torch.randn(channels))
        self.scale, self.shift = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.randn(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias, padding=1, groups=16)
        y = F.batch_norm(y, self.mean, self.variance, self.scale, self.shift, self.training, 0.1, 1e-3)
        return F.relu(y + x)


class Shared(nn.Module):
    """One convolution with two norms, and one norm behind two convolutions."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv, self.other = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.one, self.two, self.shared = (nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x):
        y = F.relu(self.one(self.conv(x)))
        y = F.relu(self.two(self.conv(y)))
        return F.relu(self.shared(self.other(y)) + x)


class OnceMore(Shared):
    def forward(self, x):
        y = self.shared(self.conv(x))
        return F.relu(self.shared(self.other(y)) + x)


@pytest.mark.parametrize("unit", [Functional, Shared, OnceMore])
def test_functional_and_shared_ones(unit):
    before = randomise(Net(unit(), Bottleneck(), unit()))
    for network in (before, trained(si.inject(before, X, at="units*"), 0.3)):
        new = si.for_inference(network, X)
        text = "\n".join(str(module.graph) for module in torch.export.export(new, (X,)).graph_module.modules())
        assert "batch_norm" not in text
        with torch.no_grad():
            assert relative(new(X), network.eval()(X)) < 1e-5
        assert relative(new(X), network(X)) < 1e-5


def test_norms_that_must_stay():
    class Read(Bottleneck):
        def forward(self, x):
            y = self.conv1(x)
            z = self.bn1(y) + y
            return F.relu(self.bn3(self.conv3(F.relu(self.bn2(self.conv2(z))))) + x)

    class Tied(Bottleneck):
        def __init__(self):
            super().__init__()
            self.conv1.weight = self.conv2.weight = nn.Parameter(torch.randn(8, 16, 1, 1))
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
            self.bn1.register_forward_hook(lambda *_: None)

    for unit, left in ((Read, 1), (Tied, 1)):
        before = randomise(Net(unit(), Bottleneck()))
        new = si.for_inference(before, X)
        assert norms(new) == left
        with torch.no_grad():
            assert relative(new(X), before.eval()(X)) < 1e-5
    kept = si.for_inference(before, X, fold_norms=False)
    assert norms(kept) == norms(before)


@pytest.mark.parametrize("suffix", [".onnx", ".torchscript", ".pt2", ".pt"])
def test_files(suffix, tmp_path):
    injected = trained(si.inject(randomise(Net(Bottleneck(), Bottleneck())), X), 0.3)
    new = si.for_inference(injected, X)
    written = si.export(new, tmp_path / f"new{suffix}", X)
    if suffix == ".onnx":
        nodes = onnx.load(written.path).graph.node
        assert {node.domain for node in nodes} == {""}
        assert "BatchNormalization" not in {node.op_type for node in nodes}
    elif suffix == ".pt":
        assert torch.equal(torch.load(written.path, weights_only=False)(X), new(X))
    else:
        assert "dynamic" in written.how
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = (
                torch.jit.load(written.path).inlined_graph
                if suffix == ".torchscript"
                else torch.export.load(written.path).graph
            )
        assert "se_inject::" not in str(text)


def test_a_trace_holds_no_operator_in_place():
    new = si.for_inference(trained(si.inject(randomise(Net(Bottleneck(), Bottleneck())), X), 0.3), X)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = str(torch.jit.trace(new, (X,), check_trace=False).inlined_graph)
    assert "addcmul" not in text
    assert "relu_(" not in text


class Wide(nn.Module):
    """A unit whose last convolution has more outputs than inputs, and a mean that does not commute with it."""

    def __init__(self, kernel=3, stride=1, padding=1):
        super().__init__()
        self.conv1 = nn.Conv2d(16, 8, 1)
        self.conv2, self.bn = nn.Conv2d(8, 16, kernel, stride, padding), nn.BatchNorm2d(16)
        self.short = nn.Conv2d(16, 16, kernel, stride, padding)

    def forward(self, x):
        return F.relu(self.bn(self.conv2(F.relu(self.conv1(x)))) + self.short(x))


@pytest.mark.parametrize("kernel, stride, padding, early", [(3, 1, 1, 0), (1, 2, 0, 0), (1, 1, 1, 0), (1, 1, 0, 2)])
def test_the_squeeze_is_early_only_where_the_mean_commutes(kernel, stride, padding, early):
    units = (Wide(kernel, stride, padding), Wide(kernel, stride, padding))
    injected = trained(si.inject(randomise(Net(*units)), X, at="units*"), 0.3)
    new = si.for_inference(injected, X)
    assert count(new, EarlySqueeze) == early
    with torch.no_grad():
        assert relative(new(X), injected.eval()(X)) < 1e-5


def test_a_copy_for_inference_is_the_end_of_the_road():
    injected = trained(si.inject(randomise(Net(Bottleneck(), Bottleneck())), X), 0.3)
    new = si.for_inference(injected, X)
    wanted = new(X)
    assert "the addition and relu" in str(si.fused(new))
    for again in (si.unfuse_, si.plan, lambda model: si.for_inference(model, X), lambda model: si.inject(model, X)):
        with pytest.raises(SurgeryError):
            again(new)
    assert torch.equal(new(X), wanted)
    assert [step.path for step in si.plan_of(new).steps] == ["units.0.se", "units.1.se"]
    ejected = si.eject_(copy.deepcopy(new))
    assert type(ejected.units[0]) is Bottleneck


def test_errors(monkeypatch):
    injected = trained(si.inject(randomise(Net(Bottleneck(), Bottleneck())), X), 0.3)
    with pytest.raises(UnsupportedModel, match="compiled"):
        si.for_inference(torch.compile(injected))
    with pytest.raises(UnsupportedModel, match="no numbers"):
        si.for_inference(copy.deepcopy(injected).to("meta"))
    right = inference.fold_norms_

    def wrong(model, trace):
        folded = right(model, trace)
        model.units[0].conv2.bias.add_(0.1)
        return folded

    monkeypatch.setattr(inference, "fold_norms_", wrong)
    with pytest.raises(VerificationError, match="something else"):
        si.for_inference(injected, X)


def test_rounding_that_a_network_makes_large_is_no_difference(monkeypatch):
    """Nothing is allowed in float32, so that the copy has to be right in float64."""
    monkeypatch.setattr(inference, "TOLERANCES", {torch.float32: 0.0})
    injected = trained(si.inject(randomise(Net(Bottleneck(), Bottleneck())), X), 0.3)
    assert relative(si.for_inference(injected, X)(X), injected.eval()(X)) < 1e-5
