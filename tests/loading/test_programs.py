"""Networks out of TorchScript archives and exported programs: the network that was written, to the bit, and injected."""

import collections
import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import se_inject as si
from se_inject.cli.entry import cli
from se_inject.errors import LoadError
from se_inject.forwards import Program, program_class, program_module
from se_inject.forwards import program as new_program
from se_inject.loading import load_program
from se_inject.loading.layers import FixedBatchNorm
from se_inject.tracing.inputs import observe_model
from se_inject.verification.checks import check_against_file
from tests.common import IMAGES, build, randomise, same, same_state, write


@pytest.fixture(params=["scripted", "traced", "exported"])
def how(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.pt2"


class Own(nn.Module):
    """Residual units with functions in place of modules, layer scale, a loop over a list, and a second output."""

    class Unit(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            self.norm = nn.BatchNorm2d(channels)
            self.pointwise = nn.Conv2d(channels, channels, 1)
            self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

        def forward(self, x):
            y = F.silu(self.norm(self.depthwise(x)))
            return x + self.gamma * F.dropout(self.pointwise(y), 0.1, self.training)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.stages = nn.ModuleList([nn.Sequential(self.Unit(16), self.Unit(16)), nn.Sequential(self.Unit(16))])
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.hardswish(self.stem(x - self.mean))
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)), x.mean(1)


def own():
    return Own()


def vgg16():
    network = torchvision.models.vgg16(num_classes=10)
    network.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    return network


NETWORKS = {
    "own": own,
    "resnet50": lambda: build("torchvision:resnet50"),
    "mobilenet_v2": lambda: build("torchvision:mobilenet_v2"),
    "vgg16": vgg16,
    "convnext": lambda: build("torchvision:convnext_tiny"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_that_was_written(name, how, path):
    network = randomise(NETWORKS[name]()).eval()
    write(network, path, how, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    loaded = si.load(path)
    assert same_state(loaded, network)
    assert {key: p.requires_grad for key, p in loaded.named_parameters()} == {
        key: p.requires_grad for key, p in network.named_parameters()
    }
    others = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert same(loaded(IMAGES), network(IMAGES))
        assert same(loaded(others), network(others))
    plans = [si.plan(each, IMAGES, stages="all") for each in (network, loaded)]
    assert plans[0].steps == plans[1].steps
    wanted, got = (si.find_sites(each, IMAGES).all_sites for each in (network, loaded))
    assert [(s.address, s.kind, s.channels, s.size, s.stage, s.held_back) for s in wanted if s.stage] == [
        (s.address, s.kind, s.channels, s.size, s.stage, s.held_back) for s in got if s.stage
    ]
    costs = [each.cost() for each in plans]
    assert costs[0].rows == costs[1].rows
    assert (costs[0].before.params, costs[0].before.macs) == (costs[1].before.params, costs[1].before.macs)
    injected = plans[1].apply(loaded)
    si.verify(loaded, injected, IMAGES, fresh=True).expect_passed()
    with torch.no_grad():
        assert same(injected(IMAGES), network(IMAGES))


def test_a_scripted_network_trains_as_the_eager_one(path):
    network = randomise(Own()).eval()
    loaded = si.load(write(network, path, "scripted"))
    assert not any(module.training for module in loaded.modules())
    results = []
    for each in (network, loaded):
        torch.manual_seed(1)
        each.train()
        results.append(each(IMAGES))
        sum(leaf.sum() for leaf in results[-1]).backward()
    assert same(*results)
    assert same_state(network, loaded)
    gradients = [{key: p.grad for key, p in each.named_parameters()} for each in (network, loaded)]
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert type(loaded.stages[0][0].norm) is nn.BatchNorm2d


def test_statistics_in_programs_are_frozen_like_others(path, tmp_path):
    network = randomise(build("timm:test_byobnet")).eval()  # its normalisation and activation are one module
    loaded = si.inject(si.load(write(network, path, "scripted")), IMAGES, stages="all", attended=True)
    si.freeze_backbone_(loaded, batch_norm=True)
    norms = sum(hasattr(module, "running_mean") for module in loaded.modules())
    assert str(si.trainable(loaded)).endswith(f"statistics of {norms} batch normalisations frozen")
    torch.save(loaded, tmp_path / "frozen.pt")
    for each in (loaded, si.load(tmp_path / "frozen.pt")):
        before = copy.deepcopy(each.state_dict())
        assert same(each.train()(IMAGES), network(IMAGES))
        assert all(torch.equal(before[key], value) for key, value in each.state_dict().items())
    si.eject_(loaded).train()(IMAGES)
    network.train()(IMAGES)
    assert same_state(loaded, network)


@pytest.mark.parametrize("how", ["traced", "exported"])
def test_a_program_of_eval_mode_keeps_its_statistics_in_training(how, path):
    network = randomise(Own()).eval()
    loaded = si.load(write(network, path, how))
    before = copy.deepcopy(loaded.state_dict())
    wanted = network(IMAGES)
    for _ in range(2):
        assert same(loaded.train()(IMAGES), wanted)
    assert all(torch.equal(before[key], value) for key, value in loaded.state_dict().items())
    plan = si.plan(loaded, IMAGES)
    assert "a program of eval mode: batch normalisation (3 modules) keeps its statistics" in " ".join(plan.notes)
    injected = plan.apply(loaded).train()
    sum(leaf.sum() for leaf in injected(IMAGES)).backward()
    assert all(p.grad is not None for p in si.injected_parameters(injected))
    assert isinstance(injected.stages[0][0].norm, FixedBatchNorm)
    assert not injected.stages[0][0].norm.training


def test_layers_are_those_of_torch(how, path):
    network = randomise(build("torchvision:mobilenet_v2")).eval()
    loaded = si.load(write(network, path, how))
    counts = [collections.Counter(type(m) for m in each.modules()) for each in (network, loaded)]
    assert counts[0][nn.Conv2d] == counts[1][nn.Conv2d] == 52
    assert type(loaded.features[1].conv[0]) is nn.Sequential
    first, other = network.features[1].conv[0][0], loaded.features[1].conv[0][0]
    assert repr(first) == repr(other)
    assert repr(loaded).startswith("MobileNetV2(")


class Everything(nn.Module):
    """What TorchScript knows: branches on shapes and attributes, loops, lists, dicts, optionals, early returns."""

    def __init__(self, twice: bool = True):
        super().__init__()
        self.twice = twice
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.items = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)})
        self.scale = 0.5

    def shrink(self, x, times: int):
        turn = 0
        while turn < times and x.shape[-1] > 4:
            x = F.avg_pool2d(x, 2)
            turn += 1
        return x

    def forward(self, x, bias: torch.Tensor | None = None, times: int = 2) -> dict[str, torch.Tensor]:
        x = self.conv(x)
        if bias is not None:
            x = x + bias
        if self.twice:
            x = x * 2
        found = []
        for item in self.items.values():
            found.append(item(x))
        y = torch.cat(found, 1)
        if y.shape[0] > 2:
            return {"many": y.mean((2, 3))}
        parts = torch.chunk(self.shrink(y, times), 2, dim=1)
        total = parts[0] * self.scale + parts[1]
        for i in range(total.dim() - 2):
            total = total + i
        for i in range(len(parts) - 1, -1, -1):
            total = total + i * parts[i].mean()
        for i in range(1, x.size(2), 16):
            total = total * (1 + i)
        named = {"a": total, "b": y}
        for name, value in named.items():
            total = total + value.mean() * len(name) + len(list(named.keys()))
        return {"few": total, "sizes": torch.full((len(parts),), float(y.size(1) // 3))}


@pytest.mark.parametrize("twice", [True, False])
def test_a_script_with_everything(twice, path):
    network = Everything(twice).eval()
    loaded = si.load(write(network, path, "scripted"))
    again = copy.deepcopy(loaded)
    assert type(again) is type(loaded)
    bias = torch.rand(4, 1, 1)
    for images, *more in ((IMAGES,), (IMAGES, bias), (IMAGES, bias, 5), (IMAGES, None, 0), (torch.rand(3, 3, 8, 8),)):
        wanted = network(images, *more)
        for each in (loaded, again):
            got = each(images, *more)
            assert list(got) == list(wanted)
            assert same(got, wanted)


class Pitfalls(nn.Module):
    """What TorchScript and Python have in common, but for the details: lists that others change, numbers, dtypes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.window = [4, 2]

    def fill(self, found: list[torch.Tensor], x):
        found.append(x * 2)
        return x + 1

    def shrunk(self, size: list[int]):
        size = size.copy()
        if size[0] > 2:
            size[0] = 2
        size[1] = 1
        return size

    def forward(self, x):
        found: list[torch.Tensor] = []
        y = self.fill(found, self.conv(x))
        y = self.fill(found, y)
        found.insert(0, found.pop() * 3)
        found.reverse()
        window = self.shrunk(self.window)
        kept = [1, 1]
        for turn in range(x.dim() - 2):
            kept[turn] = window[turn]
        y = F.avg_pool2d(torch.cat(self.pair(found) + [y], 1), kept)  # noqa: RUF005
        half = int(x.size(2) * 0.3)
        power = 2 ** window[0]
        if x.dtype == torch.float32:
            y = y * power
        if x.dtype in (torch.float16, torch.bfloat16):
            y = y - 100
        return y.to(torch.float64)[:, :, half:], torch.zeros([half], dtype=torch.int32), y.sum() / 3 + -7 // 2

    def pair(self, found: list[torch.Tensor]):
        return [found[0], found[1]]


class Rounding(nn.Module):
    """Arithmetic on sizes, which tracing turns into operations on tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        b, c, h, w = self.conv(x).shape
        y = self.conv(x)
        pad = (5 - h % 5) % 5
        y = F.pad(y, (0, 0, 0, pad))
        top = y.reshape(b * 2, c // 2, h + pad, w)[:, :, : int(h * 0.6) - h // 4 + (h - 1) // 2]
        return top * (h / w) + top.new_full((1,), c**0.5), y.reshape(b, -1).repeat_interleave(h // 16, 1)


def test_pitfalls_of_scripts(path):
    network = Pitfalls().eval()
    loaded = si.load(write(network, path, "scripted"))
    for images in (IMAGES, torch.rand(2, 3, 20, 30), torch.rand(3, 3, 64, 64)):
        assert same(loaded(images), network(images))
    assert same(loaded.half().float()(IMAGES), network.half().float()(IMAGES))


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_arithmetic_on_sizes(how, path):
    network = Rounding().eval()
    loaded = si.load(write(network, path, how))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.load(path)
    for images in (IMAGES, torch.rand(2, 3, 36, 30), torch.rand(3, 3, 48, 64)):
        assert same(loaded(images), program(images))
        assert how == "traced" or same(loaded(images), network(images))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if x.shape[0] > 2:
            raise ValueError("too many")
        return self.conv(x)


def test_a_script_raises_what_it_raised(path):
    loaded = si.load(write(Branches(), path, "scripted"))
    assert loaded(IMAGES).shape == IMAGES.shape
    with pytest.raises(RuntimeError, match="too many"):
        loaded(torch.rand(3, 3, 4, 4))


class Structures(nn.Module):
    """Inputs in a dict and by keyword, outputs in a dict of a list."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("table", torch.rand(3, 1, 1))
        self.constant = torch.rand(1)

    def forward(self, x, more, *, mask=None, factor=3):
        y = F.relu(self.conv(x["image"]) + more[1] + self.table + self.constant)
        if mask is not None:
            y = y * mask
        return {"map": y, "list": [y.reshape(y.shape[0], -1), factor]}


def test_an_exported_program_with_structures(path):
    network, bias, mask = Structures().eval(), torch.rand(1), torch.rand(1, 1, 64, 64)
    args = ({"image": IMAGES}, [torch.rand(1), bias])
    shapes = {"x": {"image": {0: torch.export.Dim.AUTO}}, "more": [None, None], "mask": None, "factor": None}
    write(network, path, "exported", args, kwargs={"mask": mask, "factor": 5}, dynamic_shapes=shapes)
    loaded = si.load(path)
    others = ({"image": torch.rand(3, 3, 64, 64)}, args[1])
    for given in (args, others):
        wanted, got = network(*given, mask=mask, factor=5), loaded(*given, mask=mask, factor=5)
        assert list(wanted) == list(got)
        assert got["list"][1] == 5
        assert same([wanted["map"], wanted["list"][0]], [got["map"], got["list"][0]])


def test_structured_inputs_are_known(path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, batch, more):
            y = self.one(batch["image"]).relu()
            return (self.other(y) + y) * more[0] + more[1]["mask"]

    network = Network().eval()
    given = ({"image": IMAGES}, [torch.rand(1), {"mask": torch.rand(2, 1, 64, 64)}])
    loaded = si.load(write(network, path, "exported", given))
    plan = si.plan(loaded)
    assert "input as the program was made for: 3 inputs of 2×3×64×64, 1, 2×1×64×64" in plan.notes
    assert [step.path for step in plan.steps] == ["se_other"]
    assert same(plan.apply(loaded)(*given), network(*given))
    assert check_against_file(loaded, load_program(path), plan.trace).passed


@pytest.mark.parametrize("example", [[["x", "load"]], [3], 3, [{"set": []}], [{"dict": [1]}], [[[-1], "float32"]]])
def test_recorded_inputs_that_are_none(example):
    with pytest.raises(LoadError, match="the inputs that this file records are none"):
        observe_model(program_module("Net", "nets", [["x"]], [["return", {"node": "x"}]], example))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_convnext"])
def test_a_program_of_core_operators(name, path):
    network = randomise(build(name)).eval()
    program = torch.export.export(network, (IMAGES,)).run_decompositions()
    torch.export.save(program, path)
    loaded = si.load(path)
    with torch.no_grad():
        assert same(loaded(IMAGES), network(IMAGES))
    wanted, got = (si.plan(each, IMAGES) for each in (network, loaded))
    assert [(s.stage, s.channels, s.size) for s in wanted.steps] == [(s.stage, s.channels, s.size) for s in got.steps]
    assert wanted.cost().before.macs == got.cost().before.macs
    si.verify(loaded, got.apply(loaded), IMAGES, fresh=True).expect_passed()


def test_an_exported_program_knows_its_inputs_and_may_have_a_fixed_batch(tmp_path, path):
    class Fixed(Own):
        def forward(self, x):
            return super().forward(x)[0].view(2, 5)

    network = randomise(Fixed()).eval()
    loaded = si.load(write(network, path, "exported"))
    plan = si.plan(loaded)
    assert "input as the program was made for: 1 input of 2×3×64×64" in plan.notes
    assert plan.cost().before.macs == si.plan(Own(), IMAGES).cost().before.macs
    injected = plan.apply(loaded)
    si.verify(loaded, injected, fresh=True).expect_passed()
    exported = si.export(injected, tmp_path / "out.onnx")
    assert "batch fixed at 2" in exported.how


@pytest.mark.parametrize("suffix", [".pt", ".ts", ".onnx", ".pt2"])
def test_written_again_in_every_format(how, suffix, path, tmp_path):
    network = randomise(Own()).eval()
    loaded = si.load(write(network, path, how, dynamic_shapes=({0: torch.export.Dim.AUTO},)))
    injected = si.inject(loaded, IMAGES, stages="2")
    with torch.no_grad():
        for parameter in si.injected_parameters(injected):
            parameter.normal_(0, 0.2)
    written = si.export(injected, tmp_path / f"out{suffix}", IMAGES)
    assert [check.batch for check in written.checks] == [1, 2, 5]
    if suffix == ".onnx":
        return
    again = si.load(tmp_path / f"out{suffix}").eval()
    with torch.no_grad():
        assert same(again(IMAGES), injected.eval()(IMAGES))
    if suffix == ".pt":
        assert si.plan_of(again).steps == si.plan_of(injected).steps
        assert same(si.eject_(again)(IMAGES), network(IMAGES))
        assert same_state(again, network)


def test_blocks_in_our_own_exports_are_seen_as_attention(how, path):
    network = si.inject(randomise(build("torchvision:resnet18")).eval(), IMAGES, stages="3,4")
    loaded = si.load(write(network, path, how))
    states = {site.stage: site.held_back for site in si.find_sites(loaded, IMAGES).all_sites if site.stage}
    assert [bool(states[stage]) for stage in (1, 2, 3, 4)] == [False, False, True, True]


class Handing(nn.Module):
    """Tracing finds that an identity's value is its input, and has every module hand that back to its caller."""

    class Main(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.conv, self.norm = nn.Dropout(0.1), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.drop(x)))

    def __init__(self):
        super().__init__()
        self.main, self.shortcut = self.Main(), nn.Identity()

    def forward(self, x):
        return self.main(x) + self.shortcut(x)


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_what_tracing_hands_back(how, path):
    network = randomise(nn.Sequential(Handing(), Handing())).eval()
    loaded = si.load(write(network, path, how))
    assert same(loaded(IMAGES), network(IMAGES))
    sites = [[(s.address, s.kind) for s in si.find_sites(each, IMAGES).all_sites] for each in (network, loaded)]
    assert sites[0] == sites[1] == [("0.main", "residual"), ("1.main", "residual")]


def test_shared_weights_and_modules_stay_shared(how, path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(3, 3, 3, padding=1)
            self.other = nn.Conv2d(3, 3, 3, padding=1)
            self.other.weight = self.one.weight
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.other(self.act(self.one(x)))) + x

    network = Shared().eval()
    loaded = si.load(write(network, path, how))
    assert loaded.one.weight is loaded.other.weight
    assert len(list(loaded.parameters())) == 3
    assert same(loaded(IMAGES), network(IMAGES))
    assert isinstance(loaded.act, nn.ReLU)


ACTIVATION = nn.SiLU()


class Sharing(nn.Module):
    """Every unit calls one activation that lies in all of them, some twice and under two names, as YOLO's do."""

    class Conv(nn.Module):
        def __init__(self, norm=True):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), ACTIVATION
            self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()

        def forward(self, x):
            return self.act(self.norm(self.conv(x)))

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Sharing.Conv(), Sharing.Conv(norm=False)
            self.act1, self.act2 = ACTIVATION, ACTIVATION

        def forward(self, x):
            return self.act2(x + self.second(self.act1(self.first(x))))

    def __init__(self):
        super().__init__()
        self.stem, self.act = self.Conv(), ACTIVATION
        self.units = nn.Sequential(self.Unit(), self.Unit())

    def forward(self, x):
        return self.act(self.units(self.stem(x)))


def test_an_activation_that_lies_in_every_unit(how, path):
    network = randomise(Sharing()).eval()
    loaded = si.load(write(network, path, how))
    assert same(loaded(IMAGES), network(IMAGES))
    sites = [[(s.address, s.kind) for s in si.find_sites(each, IMAGES).all_sites] for each in (network, loaded)]
    assert sites[0] == sites[1]
    assert sites[0] == [("stem.act", "conv"), ("units.0.second", "residual"), ("units.1.second", "residual")]
    found = {name for name, _ in loaded.named_modules(remove_duplicate=False)}
    assert found == {name for name, _ in network.named_modules(remove_duplicate=False)}
    si.verify(loaded, si.inject(loaded, IMAGES), IMAGES).expect_passed()


def test_a_shared_layer_with_weights_is_shared_or_written_out(how, path):
    class Unit(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.conv, self.shared = nn.Conv2d(3, 3, 3, padding=1), shared

        def forward(self, x):
            return self.shared(self.conv(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Sequential(nn.BatchNorm2d(3), nn.PReLU())
            self.one, self.other = Unit(shared), Unit(shared)

        def forward(self, x):
            return self.other(self.one(x))

    network = randomise(Network()).eval()
    loaded = si.load(write(network, path, how))
    assert same(loaded(IMAGES), network(IMAGES))
    assert same_state(loaded, network)
    assert len(list(loaded.parameters())) == len(list(network.parameters()))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_recurrent_layers(kind, options, how, path):
    class Reader(nn.Module):
        """A network for lines of text: convolutions, and a recurrent layer over their columns."""

        def __init__(self):
            super().__init__()
            self.conv, self.columns = nn.Conv2d(3, 4, 3), kind(4, 5, batch_first=True, **options)

        def forward(self, x):
            found, _ = self.columns(self.conv(x).relu().mean(2).transpose(1, 2))
            return found

    network, images = Reader().eval(), IMAGES[..., :12]  # ten columns: an exported program has lines for each
    loaded = si.load(write(network, path, how, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},)))
    assert same_state(loaded, network)
    assert same(loaded(images), network(images))
    if how == "scripted":  # the others have the states' dtype written down
        assert type(loaded.columns) is kind
        loaded, network = copy.deepcopy(loaded).double(), network.double()
    images = images.to(next(loaded.parameters()))
    assert same(loaded(images), network(images))
    loaded(images).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


# -- refusals ----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x)


class Graded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        with torch.no_grad():
            y = self.conv(x)
        return y + x


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

        def hook(self, inputs: tuple[torch.Tensor], output: torch.Tensor):
            return output + 1

        self.conv.register_forward_hook(hook)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("network", "how", "seen"),
    [
        (Counting, "scripted", "it stores into its `calls`"),
        (Graded, "exported", "wrap_with_set_grad_enabled"),
        (Hooked, "scripted", "has hooks"),
    ],
)
def test_what_can_not_be_modules(network, how, seen, path):
    write(network(), path, how)
    with pytest.raises(LoadError) as caught:
        si.load(path)
    assert seen in f"{caught.value.message} {caught.value.seen}"
    assert caught.value.hint is None or "eager module" in caught.value.hint


def test_on_the_command_line(how, path, tmp_path, capsys):
    write(randomise(build("torchvision:resnet18")).eval(), path, how)
    assert cli.main(["sites", str(path), "--input", "3x64x64"], standalone_mode=False) in (0, None)
    told = capsys.readouterr()
    kinds = {"exported": f"an exported program (torch.export.save, torch {torch.__version__})"}
    kind = kinds.get(how, "a TorchScript archive (torch.jit.save)")
    assert f"{path}: {kind}, ResNet, 11,689,512 parameters" in told.err
    assert ("keeps its statistics" in told.err) == (how != "scripted")
    cli.main(
        [str(path), "--stages", "3,4", "--r", "16", "--input", "3x64x64", "-o", str(tmp_path / "out.pt")],
        standalone_mode=False,
    )
    told = capsys.readouterr()
    assert "ok   same output as the file         bit-equal on 1 input of " in told.out
    assert "ok   same output as before           bit-equal in eval and in train" in told.out
    assert "a pickle: loading it needs `se_inject`" in told.out


def test_a_network_that_is_not_what_its_file_is(how, path, monkeypatch, capsys):
    write(randomise(build("torchvision:resnet18")).eval(), path, how)
    loaded = si.load(path)
    trace = observe_model(loaded, IMAGES)
    assert check_against_file(loaded, load_program(path), trace).passed
    with torch.no_grad():
        loaded.layer2[0].bn2.bias[3] += 1e-3
    check = check_against_file(loaded, load_program(path), trace)
    assert not check.passed
    assert check.detail.startswith("differs by up to")
    wide = observe_model(loaded, torch.empty(2, 3, 96, 96))
    assert check_against_file(loaded, load_program(path), wide).passed is (None if how == "exported" else False)


# -- programs as data --------------------------------------------------------------------------------------


def program(*lines, inputs=(["x"],)):
    return json.dumps(
        {
            "class": "Net",
            "home": "nets",
            "inputs": [*inputs],
            "lines": [*lines, ["return", {"node": "x"}]],
            "example": None,
        }
    )


X = {"node": "x"}
HARMFUL = {
    "a function": ["set", ["y"], "os:system", ["touch hit"], {}],
    "a builtin": ["set", ["y"], "python:eval", ["1"], {}],
    "a hidden function": ["set", ["y"], "torch:_C", [], {}],
    "a file": ["set", ["y"], "ops:aten.from_file.default", ["hit"], {}],
    "torch.save": ["set", ["y"], "torch:save", [X, "hit"], {}],
    "a method": ["method", ["y"], "__class__", [X], {}],
    "a method that calls": ["method", ["y"], "apply_", [X, X], {}],
    "an attribute": ["attribute", ["y"], X, "__class__"],
    "a method as attribute": ["attribute", ["y"], X, "numpy"],
    "code as a name": ["let", ["y = open('hit', 'w')\n    z"], 1],
    "a name of ours": ["let", ["_constant_1"], X],
    "a function's name": ["let", ["getattr"], X],
    "self": ["let", ["self"], X],
    "code as a value": ["let", ["y"], {"node": "open('hit', 'w')"}],
    "code as a keyword": ["set", ["y"], "torch:relu", [X], {"a=open('hit', 'w'), b": 1}],
    "code as a path": ["read", ["y"], "a') or open('hit"],
    "a path to a class": ["read", ["y"], "__class__"],
    "code as an index": ["loop", "i in [open('hit', 'w')]: pass #", 1, "x", []],
    "another line": ["exec", ["y"], "open('hit', 'w')"],
    "code as a condition": ["if", {"node": "open('hit', 'w')"}, [], []],
    "a builtin under its own name": ["let", ["y"], {"node": "exec"}],
    "a function to sort by": ["method", ["y"], "sort", [[1]], {"key": X}],
    "an address": ["method", ["y"], "new", [X], {"cdata": 65}],
    "a class of tensors": ["method", ["y"], "as_subclass", [X, X], {}],
    "letters that Python reads as underscores": ["read", ["y"], "_\uff3finit\uff3f\uff3f.a"],
    "letters that Python reads as others": ["set", ["y"], "torch:relu", [X], {"\ufb01lter": 1}],
    "keys of one hash": ["let", ["y"], {"dict": [[i * (2**61 - 1), 0] for i in range(3)]}],
    "deep": ["let", ["y"], [[[[X]]]] if False else __import__("functools").reduce(lambda v, _: [v], range(500), X)],
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_programs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError):
        program_class(program(HARMFUL[name]))
    assert not list(tmp_path.iterdir())


def test_absurdly_long_programs():
    with pytest.raises(LoadError, match=r"more than 60,000 lines"):
        program_class(program(*[["let", ["y"], 1]] * 60_001))
    with pytest.raises(LoadError, match="too long"):
        program_class(program(["let", ["y"], "long" * 2_000_000]))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"class": "A"}', program(inputs=(["x", 1, 2], 3)), program(["let"])])
def test_no_programs(text):
    with pytest.raises(LoadError):
        new_program(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["call", ["y"], "conv.forward", [X], {}], "calls `conv.forward`"),
        (["call", ["y"], "weight", [X], {}], "calls `weight`"),
        (["read", ["y"], "conv"], "reads `conv`"),
        (["read", ["y"], "conv.forward"], "reads `conv.forward`"),
        (["if", X, [["read", ["y"], "load_state_dict"]], []], "reads `load_state_dict`"),
    ],
)
def test_a_program_reads_and_calls_what_it_has(line, message, tmp_path):
    module = program_module("Net", "nets", [["x"]], [line, ["return", X]])
    module.conv = nn.Conv2d(3, 3, 1)
    module.weight = nn.Parameter(torch.ones(1))
    torch.save(module, tmp_path / "net.pt")
    with pytest.raises(LoadError, match=message):
        si.load(tmp_path / "net.pt")


def test_a_program_is_pickled_as_data(tmp_path):
    module = program_module(
        "Net", "nets", [["x"], ["y", None]], [["set", ["z"], "torch:relu", [X], {}], ["return", {"node": "z"}]]
    )
    torch.save(module, tmp_path / "net.pt")
    loaded = si.load(tmp_path / "net.pt")
    assert isinstance(loaded, Program)
    assert type(loaded) is type(module)
    assert torch.equal(loaded(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
