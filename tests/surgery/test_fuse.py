"""Fused networks compute what they computed, can be taken apart again, trained, kept and written to files."""

import copy
import json
import operator
import pickle
import warnings

import onnx
import pytest
import timm
import torch
import torchvision
from torch import fx, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import se_inject as si
from se_inject.blocks import SqueezeExcitation
from se_inject.errors import LoadError, SurgeryError, UnsupportedModel
from se_inject.forwards import body_of, generated_class
from se_inject.surgery import fuse
from se_inject.surgery.tails import fuse_in_graph
from tests.common import build, outputs, randomise

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Unit(nn.Module):
    """A residual unit whose ends can be chosen."""

    def __init__(self, rank=2, channels=8, activation=nn.ReLU, order="gated first", in_place=True):
        super().__init__()
        self.conv = getattr(nn, f"Conv{rank}d")(channels, channels, 3, padding=1)
        self.norm = getattr(nn, f"BatchNorm{rank}d")(channels)
        self.act = activation() if activation else nn.Identity()
        self.order, self.in_place = order, in_place

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.order == "gated first":
            if self.in_place:
                y += x
            else:
                y = y + x
        elif self.order == "shortcut first":
            y = torch.add(x, y)
        else:
            z = x * 1
            z += y
            y = z + z.mean()
        return self.act(y)


class Stack(nn.Module):
    def __init__(self, *units, rank=2, channels=8):
        super().__init__()
        self.stem = getattr(nn, f"Conv{rank}d")(3, channels, 1)
        self.units = nn.Sequential(*units)

    def forward(self, x):
        return self.units(self.stem(x))


def trained(network, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in si.injected_parameters(network):
            parameter.normal_(0, 0.3, generator=generator)
    return network


def kinds(network):
    return [(path, type(module)) for path, module in network.named_modules()]


def grads(network, x):
    network.zero_grad()
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    out = network(x)
    out = out if isinstance(out, torch.Tensor) else out[0]
    out.square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in network.parameters() if p.grad is not None)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture(scope="module", params=["torchvision:resnet18", "torchvision:mobilenet_v2", "timm:resnet18"])
def networks(request):
    """A network, and the same injected."""
    before = randomise(build(request.param)).eval()
    return before, si.inject(before, X)


def taken(network):
    return [item.takes for item in si.fused(network).blocks]


def test_at_the_start_the_output_is_the_original_s(networks):
    before, injected = networks
    fused = si.fuse_(copy.deepcopy(injected))
    assert sum(takes not in (None, "nothing") for takes in taken(fused)) >= 8
    assert torch.equal(outputs(before, X)[0], outputs(fused, X)[0])
    verdict = si.verify(before, fused, X)
    assert all(check.passed for check in verdict.checks)


@pytest.mark.parametrize("training", [False, True])
def test_trained_the_outputs_and_gradients_are_those_of_the_unfused(networks, training):
    injected = trained(copy.deepcopy(networks[1])).train(training)
    fused = si.fuse_(copy.deepcopy(injected))
    assert list(fused.state_dict()) == list(injected.state_dict())
    assert same(grads(injected, X), grads(fused, X))
    assert all(map(torch.equal, fused.state_dict().values(), injected.state_dict().values()))
    fused = si.fuse_(copy.deepcopy(injected))
    fused.load_state_dict(trained(copy.deepcopy(networks[1])).state_dict())
    verdict = si.verify(networks[0].train(training), fused, X)
    assert [check.passed for check in verdict.checks if check.name != "same output as before"] == [True] * (
        len(verdict.checks) - 1
    )
    networks[0].eval()


def test_unfused_it_is_what_it_was_and_ejected_the_original(networks):
    before, injected = networks
    fused = si.fuse_(copy.deepcopy(injected))
    assert kinds(fused) != kinds(injected)
    assert kinds(si.unfuse_(copy.deepcopy(fused))) == kinds(injected)
    assert kinds(si.unfuse_(copy.deepcopy(injected))) == kinds(injected)
    ejected = si.eject_(fused)
    assert kinds(ejected) == kinds(before)
    assert list(ejected.state_dict()) == list(before.state_dict())


def test_between_training_steps(networks):
    if isinstance(networks[0], torchvision.models.MobileNetV2):
        return  # the others say as much in less time
    """Fused and unfused in turns, a network learns to the bit what an unfused one learns."""
    results = []
    for changes in ((), (si.fuse_, si.unfuse_, si.fuse_)):
        network = trained(copy.deepcopy(networks[1])).train()
        optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
        for step in range(3):
            torch.manual_seed(step)
            if changes:
                changes[step](network)
            optimizer.zero_grad()
            network(X).square().mean().backward()
            optimizer.step()
        results.append(network.state_dict())
    assert all(map(torch.equal, results[0].values(), results[1].values()))


def test_copies_pickles_and_states(networks, tmp_path):
    injected = trained(copy.deepcopy(networks[1]))
    fused = si.fuse_(copy.deepcopy(injected))
    wanted = outputs(injected, X)
    torch.save(fused, tmp_path / "fused.pt")
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), si.load(tmp_path / "fused.pt")):
        assert same(wanted, outputs(again, X))
        assert si.fused(again) == si.fused(fused)
        assert kinds(si.unfuse_(again)) == kinds(injected)
    fresh = si.fuse_(copy.deepcopy(networks[1]))
    fresh.load_state_dict(injected.state_dict())
    assert same(wanted, outputs(fresh, X))


@pytest.mark.parametrize("suffix", [".onnx", ".torchscript", ".pt2"])
def test_files_hold_plain_operators(suffix, tmp_path):
    network = Stack(Unit(), Unit(activation=nn.SiLU))
    fused = si.fuse_(trained(si.inject(randomise(network), X)))
    written = si.export(fused.eval(), tmp_path / f"fused{suffix}", X)
    assert "dynamic" in written.how
    if suffix == ".onnx":
        assert {node.domain for node in onnx.load(written.path).graph.node} == {""}
    elif suffix == ".pt2":
        calls = [node for node in torch.export.load(written.path).graph.nodes if node.op == "call_function"]
        assert {node.target.namespace for node in calls} == {"aten"}
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.jit.load(written.path)
        assert "se_inject::" not in str(program.inlined_graph)


def test_compiled_and_scripted_and_differentiated_with_torch_func():
    network = trained(si.inject(randomise(Stack(Unit(), Unit(activation=nn.SiLU))), X)).eval()
    fused = si.fuse_(copy.deepcopy(network))
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager", fullgraph=True)(X), network(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.jit.script(fused)(X), network(X))
    parameters = dict(network.named_parameters())

    def loss(values, model, x):
        return torch.func.functional_call(model, values, (x[None],)).square().mean()

    per_example = [
        torch.func.vmap(torch.func.grad(loss), (None, None, 0))(parameters, model, X) for model in (network, fused)
    ]
    for key in parameters:
        torch.testing.assert_close(per_example[0][key], per_example[1][key])


ENDS = [
    (nn.ReLU, "the addition and relu"),
    (nn.ReLU6, "the addition and relu6"),
    (nn.SiLU, "the addition and silu"),
    (nn.Hardswish, "the addition and hardswish"),
    (nn.GELU, "the addition and gelu"),
    (None, "the addition"),
    (nn.Mish, "the addition"),
    (lambda: nn.ReLU(inplace=True), "the addition and relu"),
]


@pytest.mark.parametrize("activation, words", ENDS)
@pytest.mark.parametrize("order", ["gated first", "shortcut first", "into the shortcut"])
def test_what_stands_behind_a_block(activation, words, order):
    before = randomise(Stack(Unit(activation=activation, order=order), Unit(activation=activation, order=order))).eval()
    injected = si.inject(before, X)
    fused = si.fuse_(copy.deepcopy(injected))
    assert taken(fused) == [words if order != "into the shortcut" else "nothing"] * len(taken(fused))
    assert torch.equal(fused(X), before(X))
    trained(injected)
    trained(fused)
    for x in (X, X.to(memory_format=torch.channels_last), X[:0], X[:1, :, :1, :1], X[:, :, ::2]):
        assert torch.equal(fused(x), injected(x))
        assert fused(x).stride() == injected(x).stride()
    assert same(grads(injected.train(), X), grads(fused.train(), X))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranks_and_dtypes(rank, dtype):
    x = torch.randn(2, 3, *[6] * rank).to(dtype)
    before = randomise(Stack(Unit(rank), Unit(rank, activation=nn.Hardswish), rank=rank)).to(dtype).eval()
    injected = si.inject(before, x)
    fused = si.fuse_(copy.deepcopy(injected))
    assert torch.equal(fused(x), before(x))
    assert same(grads(trained(injected), x), grads(trained(fused), x))


OPTIONS = [
    {"squeeze": "max", "gate": "tanh", "activation": "silu"},
    {"squeeze": "avg+max", "gate": "relu", "bias": False},
    {"squeeze": "std", "gate": "hard_sigmoid", "norm": True},
    {"block": "eca"},
    {"block": "ese"},
    {"block": "gct"},
    {"block": "srm"},
    {"block": "ge", "extent": 2},
    {"init": "paper"},
    {"position": "identity"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_blocks_options_and_positions(options):
    before = randomise(Stack(Unit(), Unit(order="shortcut first")))
    injected = trained(si.inject(before, X, **options))
    fused = si.fuse_(copy.deepcopy(injected))
    assert taken(fused) == ["the addition and relu"] * 2
    assert same(grads(injected, X), grads(fused, X))
    assert kinds(si.eject_(fused)) == kinds(before)


def test_a_block_without_a_gate_stays_as_it_is_and_is_said():
    injected = trained(si.inject(Stack(Unit(), Unit()), X, block="cbam"))
    fused = si.fuse_(copy.deepcopy(injected))
    assert taken(fused) == [None, None]
    assert kinds(fused) == kinds(injected)
    assert "not fused" in str(si.fused(fused))


def test_the_table_says_what_is_computed_how():
    fused = si.fuse_(si.inject(Stack(Unit(), Unit(activation=nn.Mish)), X))
    lines = str(si.fused(fused)).splitlines()
    assert "the addition and relu" in lines[2]
    assert lines[3].split("  ")[-1].strip() == "on cpu, torch's own operators"


class Overwritten(Unit):
    """The shortcut changes between the addition and the activation, and so must the block not wait for that."""

    def forward(self, x):
        s = x * 2
        y = self.norm(self.conv(x)) + s
        s.mul_(0.5)
        return self.act(y) + s


class Reread(Unit):
    """The sum is read twice."""

    def forward(self, x):
        y = self.norm(self.conv(x)) + x
        return self.act(y) * y.mean()


class Twofold(Unit):
    """Value and shortcut are one."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.act(y + y)


class Scaled(Unit):
    def forward(self, x):
        return self.act(torch.add(self.norm(self.conv(x)), x, alpha=2))


class Broadcast(Unit):
    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("unit", [Overwritten, Reread, Twofold, Scaled, Broadcast])
def test_what_can_not_be_taken_over_stays(unit):
    plan = si.plan(Stack(unit(), unit()), X, at="units.*")
    before = randomise(Stack(unit(), unit()))
    injected = trained(plan.apply(before))
    fused = si.fuse_(copy.deepcopy(injected))
    assert same(grads(injected, X), grads(fused, X))


def test_a_hook_on_the_activation_still_sees_it():
    injected = si.inject(Stack(Unit(), Unit()), X)
    seen = []
    injected.units[0].act.register_forward_hook(lambda *_: seen.append(1))
    fused = si.fuse_(injected)
    fused(X)
    assert seen == [1]
    assert taken(fused) == ["the addition", "the addition and relu"]


class LayerScaled(Unit):
    """A factor for each channel between the block and the addition, as ConvNeXt and CaiT have it, in several spellings."""

    def __init__(self, spelling, shape=(8, 1, 1), **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5)
        self.spelling, self.drop = spelling, nn.Identity()

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.spelling == "first":
            y = self.scale * y
        elif self.spelling == "reshaped":
            y = y.mul(self.scale.reshape(1, -1, 1, 1))
        elif self.spelling == "twice":
            y = torch.mul(y, self.scale) * self.scale
        elif self.spelling == "of the input":
            y = y * x.sigmoid().mean((2, 3), keepdim=True)
        return self.act(self.drop(y) + x)


SCALED = [
    ("first", (8, 1, 1), True), ("first", (1, 8, 1, 1), True), ("first", (), True), ("first", (1,), True),
    ("reshaped", (8,), True), ("twice", (8, 1, 1), True),
    ("first", (32,), False), ("first", (32, 32), False),
    ("of the input", (1,), False),
]  # fmt: skip


@pytest.mark.parametrize("spelling, shape, taken_over", SCALED)
def test_a_scale_between_block_and_addition(spelling, shape, taken_over):
    before = randomise(Stack(LayerScaled(spelling, shape), LayerScaled(spelling, shape, activation=nn.SiLU))).eval()
    of_input = spelling == "of the input"  # the branch itself: nothing stands between the block and the addition
    injected = si.inject(before, X, at="units.*.mul" if of_input else "units.*.norm", attended=True)
    fused = si.fuse_(copy.deepcopy(injected))
    ends = ["the addition and relu behind a scale", "the addition and silu behind a scale"]
    if of_input:
        ends, taken_over = ["the addition and relu", "the addition and silu"], True
    assert taken(fused) == (ends if taken_over else ["nothing"] * 2)
    assert torch.equal(fused(X), before(X))
    assert list(fused.state_dict()) == list(injected.state_dict())
    for network in (injected, fused):
        trained(network)
    with si.disabled(fused):
        assert torch.equal(fused(X), before(X))
    for network in (injected, fused):
        network.double()
    for x in (X.double(), X.double().to(memory_format=torch.channels_last), X[:0].double()):
        torch.testing.assert_close(fused(x), injected(x), rtol=1e-12, atol=1e-12)
    for one, other in zip(grads(injected.train(), X.double()), grads(fused.train(), X.double()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert kinds(si.unfuse_(fused)) == kinds(injected)


@pytest.mark.parametrize("shape, read_again", [((8, 1, 1), True), ((1, 8, 1, 1, 1), False), ((1, 1, 1, 1, 1), False)])
def test_a_scale_that_others_read_or_that_adds_a_dimension_stays(shape, read_again):
    unit = LayerScaled("first", shape)
    graph = fx.Graph()
    value, other = graph.placeholder("value"), graph.placeholder("other")
    gated = graph.call_module("se", (value,))
    scaled = graph.call_function(operator.mul, (graph.get_attr("scale"), gated))
    added = graph.call_function(operator.add, (scaled, other))
    graph.output((added, scaled) if read_again else added)
    before = str(graph)
    assert not fuse_in_graph(graph, gated, unit.get_submodule, (8, 1, 1)).takes
    assert str(graph) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_of_another_dtype(dtype):
    before = randomise(Stack(LayerScaled("first"), LayerScaled("twice"))).eval()
    with torch.autocast("cpu", dtype):
        fused = si.fuse_(si.inject(before, X))
        assert torch.equal(fused(X), before(X))


def test_convnext_is_fused_where_nothing_is_drawn_and_files_hold_it(tmp_path):
    """timm's has a layer scale alone; torchvision's stochastic depth stands in between until it is copied for inference."""
    config = [CNBlockConfig(8, None, 2)]
    networks = [timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), ConvNeXt(config, 0.3)]
    for network, takes in zip(networks, ("the addition behind a scale", "nothing"), strict=True):
        injected = trained(si.inject(randomise(network).eval(), X))
        fused = si.fuse_(copy.deepcopy(injected))
        assert set(taken(fused)) == {takes}
        assert si.verify(network, si.fuse_(si.inject(network, X)), X).passed
        fast = si.for_inference(injected, X)
        assert set(taken(fast)) == {"the addition behind a scale"}
        torch.testing.assert_close(fast(X), injected(X), rtol=1e-4, atol=1e-5)
    si.export(fast, tmp_path / "fast.torchscript", X)
    torch.save(fused, tmp_path / "fused.pt")
    assert torch.equal(si.load(tmp_path / "fused.pt")(X), fused(X))


def test_switched_off_its_blocks_still_add_and_activate():
    before = randomise(Stack(Unit(), Unit(activation=nn.SiLU))).eval()
    fused = si.fuse_(trained(si.inject(before, X)))
    with si.disabled(fused):
        assert torch.equal(fused(X), before(X))
    assert not torch.equal(fused(X), before(X))


def test_gates_of_a_fused_network_are_recorded():
    injected = trained(si.inject(randomise(Stack(Unit(), Unit())), X))
    fused = si.fuse_(copy.deepcopy(injected))
    wanted, found = (si.excitations(model, [X]) for model in (injected, fused))
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(torch.as_tensor(one.mean), torch.as_tensor(other.mean))


def test_errors_leave_the_network_as_it_was():
    plain = Stack(Unit(), Unit())
    with pytest.raises(SurgeryError, match="no block"):
        si.fuse_(plain)
    injected = si.inject(plain, X)
    with pytest.raises(UnsupportedModel, match="compiled"):
        si.fuse_(torch.compile(injected))
    with pytest.raises(UnsupportedModel, match="wrapped"):
        si.fuse_(nn.DataParallel(injected))
    fused = si.fuse_(injected)
    before = kinds(fused)
    for again in (si.fuse_, si.plan, lambda model: si.inject(model, X)):
        with pytest.raises(SurgeryError, match="fused"):
            again(fused)
    assert kinds(fused) == before


def test_fusing_that_is_interrupted_leaves_the_network_as_it_was(monkeypatch):
    injected = trained(si.inject(Stack(Unit(), Unit()), X))
    before = kinds(injected)
    blocks, real = [], fuse.fuse_block_

    def interrupted(block):
        blocks.append(block)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        real(block)

    monkeypatch.setattr(fuse, "fuse_block_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        si.fuse_(injected)
    assert len(blocks) == 2
    assert kinds(injected) == before


def test_frozen_statistics_stay_frozen():
    injected = si.inject(torchvision.models.mobilenet_v2(), X)
    si.freeze_backbone_(injected, batch_norm=True)
    before = kinds(injected)
    fused = si.fuse_(injected)
    assert si.trainable(fused).frozen_norms == 52
    assert kinds(si.unfuse_(fused)) == before


def test_a_subclass_that_computes_otherwise_keeps_its_own_gate():
    class Half(SqueezeExcitation):
        def gate(self, x):
            return 0.5 * super().gate(x)

    fused = si.inject(Stack(Unit(), Unit()), X)
    fused.units[0].se.__class__ = Half
    wanted = fused(X)
    assert torch.equal(si.fuse_(fused)(X), wanted)


def test_a_file_can_not_hide_another_forward_in_what_it_was_before():
    fused = si.fuse_(si.inject(Stack(Unit(), Unit()), X))
    unit = fused.units[0]
    body = body_of(unit)
    (row,) = [row for row in body["fused"]["before"]["lines"] if "norm" in row]
    row[2] = "norm.half"  # a method, not a module
    unit.__class__ = kind = generated_class(Unit, json.dumps(body))
    with pytest.raises(LoadError, match=r"norm\.half"):
        si.unfuse_(fused)
    assert type(unit) is kind
