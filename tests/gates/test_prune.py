"""Blocks folded away: the closed form, what can't be folded, the measured change, and the way back."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.utils import parametrizations

import se_inject as si
from se_inject.cli.entry import cli
from se_inject.errors import DataError, OptionError, SurgeryError
from se_inject.gates import pruned_data
from se_inject.gates.changes import constant_gates
from se_inject.gates.folding import Folds, NotFoldable
from se_inject.surgery import injected_blocks, put_back_, remove_, steps_of
from se_inject.tracing import observe_model
from tests.common import build, outputs, portrait, randomise, same_portrait, same_state
from tests.gates.test_excitations import Net, Twice, examples, in_batches, injected

X = torch.empty(2, 3, 12, 12)


def constant_(model, seed=0):
    """Let every gate be one random number for each channel, the same for every image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, block in injected_blocks(model):
            block.fc2.weight.zero_()
            block.fc2.bias.normal_(0, 1.5, generator=generator)
    return model


def worst(one, other):
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other, strict=True))


# -- folding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["standard", "conv3x3"])
def test_constant_gates_fold_into_the_closed_form(position):
    """The norm in front of a gate g has weight g·γ and bias g·β, and nothing else differs from the plain network."""
    plain = randomise(Net()).eval()
    model = constant_(si.inject(plain, X, position=position)).double().eval()
    images, _ = examples(20)
    gates = {path: 2 * torch.sigmoid(block.fc2.bias.detach()) for path, block in injected_blocks(model)}
    before = outputs(model, images.double())
    pruned = si.prune_blocks_(model, si.excitations(model, [images]), tolerance=1e-9)
    assert len(pruned) == 3
    assert not list(injected_blocks(model))
    assert type(model) is Net
    assert {name: type(module) for name, module in model.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    assert worst(before, outputs(model, images.double())) < 1e-13
    want = {name: tensor.double().clone() for name, tensor in plain.state_dict().items() if tensor.is_floating_point()}
    for dropped in pruned.dropped:
        (norm,) = dropped.into
        assert norm == dropped.path.replace("se", "bn2")
        for name in ("weight", "bias"):
            want[f"{norm}.{name}"] *= gates[dropped.path]
    for name, tensor in want.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-14, atol=0)


def test_untrained_blocks_leave_the_plain_network_bit_for_bit():
    plain = randomise(Net()).eval()
    model = si.inject(plain, X).eval()
    pruned = si.prune_blocks_(model, si.excitations(model, in_batches(*examples())), tolerance=0)
    assert len(pruned) == 3
    assert pruned.change == 0
    assert same_state(model, plain)
    assert torch.equal(outputs(model, examples()[0])[0], outputs(plain, examples()[0])[0])


class Conv(nn.Module):
    """One convolution of some kind without a norm, whose value is gated and added."""

    def __init__(self, conv, between=None):
        super().__init__()
        self.conv, self.between, self.stem = conv, between or nn.Identity(), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return x + self.between(self.conv(x))


def folded_alike(model, x=None, block="se", **options):
    """Inject, make gates constant, prune in float64; the largest relative difference, and what happened."""
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64) if x is None else x
    model = si.inject(randomise(model).double().eval(), x, block=block, reduction=2, **options)
    constant_(model)
    before = outputs(model, x)
    pruned = si.prune_blocks_(model, si.excitations(model, [x]), tolerance=1e-9, example_inputs=x)
    return worst(before, outputs(model, x)), pruned


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ConvTranspose2d(8, 8, 3, padding=1),
        nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8, affine=True)),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5)),
    ],
    ids=str,
)
def test_gates_fold_into_every_kind_of_weight(conv):
    torch.manual_seed(0)
    difference, pruned = folded_alike(Conv(conv))
    assert len(pruned) == 1
    assert difference < 1e-13


@pytest.mark.parametrize(
    ("between", "folds"),
    [
        (nn.ReLU(), True),
        (nn.LeakyReLU(0.1), True),
        (nn.MaxPool2d(3, 1, 1), True),
        (nn.AvgPool2d(3, 1, 1), True),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Dropout2d(0.3)), True),
        (nn.SiLU(), False),
        (nn.ReLU6(), False),
        (nn.GELU(), False),
        (nn.Hardswish(), False),
        (nn.BatchNorm2d(8, affine=False), False),
    ],
    ids=str,
)
def test_what_may_lie_between(between, folds):
    torch.manual_seed(0)
    model = Conv(nn.Conv2d(8, 8, 3, padding=1), between)
    difference, pruned = folded_alike(model)
    assert len(pruned) == folds
    assert difference < 1e-13
    if not folds:
        assert "can't be folded" in next(iter(pruned.kept.values()))


class Cat(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = (
            nn.Conv2d(8, 6, 1),
            nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU()),
        )

    def forward(self, x):
        x = self.stem(x)
        return torch.relu(torch.cat([torch.relu(self.a(x)), self.b(x)], 1))


def test_a_gate_behind_a_concatenation_is_split():
    torch.manual_seed(0)
    difference, pruned = folded_alike(Cat())
    assert len(pruned) == 1
    assert pruned.dropped[0].into == ("a", "b.1")
    assert difference < 1e-13


@pytest.mark.parametrize(("how", "says"), [("tied", "shared"), ("parametrised", "parametrised")])
def test_weights_that_are_not_its_own_stay(how, says):
    torch.manual_seed(0)
    model = si.inject(Conv(nn.Conv2d(8, 8, 3, padding=1)), X).eval()
    if how == "tied":
        model.other = nn.Conv2d(8, 8, 3)
        model.other.weight = model.conv.weight
    else:
        parametrizations.weight_norm(model.conv)
    before = copy.deepcopy(model.state_dict())
    pruned = si.prune_blocks_(model, si.excitations(model, [examples(8)[0]]), tolerance=1e9)
    assert not len(pruned)
    assert says in next(iter(pruned.kept.values()))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("position", ["pre", "post", "identity"])
def test_positions_whose_value_is_read_by_others_stay_and_say_so(position):
    model = constant_(si.inject(randomise(Net()).eval(), X, position=position)).double().eval()
    images, _ = examples(8)
    before = outputs(model, images.double())
    pruned = si.prune_blocks_(model, si.excitations(model, [images]), tolerance=1e-9)
    assert len(pruned) + len(pruned.kept) == 3
    assert worst(before, outputs(model, images.double())) < 1e-12
    for why in pruned.kept.values():
        assert "can't be folded" in why


def test_blocks_in_a_chain_fold_from_the_first_on_only():
    network = randomise(Net()).eval()
    plan = si.plan(network, X, reduction=2)
    model = constant_((plan + si.plan(network, X, reduction=4)).apply(network))
    pruned = si.prune_blocks_(model, si.excitations(model, [examples(8)[0]]), tolerance=1e-4)
    assert [each.path for each in pruned.dropped] == ["one.0.se", "one.1.se", "two.0.se"]
    assert all("behind another block" in why for why in pruned.kept.values())
    assert [path for path, _ in injected_blocks(model)] == ["one.0.se_2", "one.1.se_2", "two.0.se_2"]


def test_a_resnet_with_constant_gates_is_the_plain_network_again():
    network = randomise(build("torchvision:resnet18")).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    model = constant_(si.inject(network, images.float())).double()
    before = outputs(model, images)
    pruned = si.prune_blocks_(model, si.excitations(model, [images]), tolerance=1e-6)
    assert {each.into for each in pruned.dropped} == {
        (f"layer{stage}.{unit}.bn2",) for stage in (1, 2, 3, 4) for unit in (0, 1)
    }
    assert pruned.saved.params == si.plan(network, images.float()).cost().added.params
    assert type(model) is type(network)
    assert worst(before, outputs(model, images)) < 1e-11


# -- which go ----------------------------------------------------------------------------------------------


def by_hand(model, images, gates):
    """The change with some blocks constant, computed apart."""
    model = copy.deepcopy(model).double()
    one = outputs(model, images.double())[0]
    for path, gate in gates.items():
        block = model.get_submodule(path)
        block.register_forward_hook(lambda block, args, out, gate=gate: args[0] * gate.reshape(1, -1, 1, 1))
    other = outputs(model, images.double())[0]
    return float((one - other).norm() / one.norm())


def test_the_least_varying_go_first_and_the_measured_change_is_true():
    model, (images, labels) = injected(), examples()
    found = si.excitations(model, in_batches(images, labels))
    means = {block.path: block.mean for block in found}
    ranked = sorted(found, key=lambda block: block.variation)
    changes = [by_hand(model, images, {b.path: means[b.path] for b in ranked[: n + 1]}) for n in range(3)]
    tolerance = (changes[0] + changes[1]) / 2
    before = copy.deepcopy(model)
    pruned = si.prune_blocks_(model, found, tolerance=tolerance)
    assert [each.path for each in pruned.dropped] == [ranked[0].path]
    assert pruned.change == pytest.approx(changes[0], rel=1e-4)
    assert pruned.change <= tolerance < changes[1]
    assert "the change would be" in pruned.kept[ranked[1].path]
    assert pruned.passes <= 2 * len(pruned) + 1
    one, other = outputs(before, images)[0], outputs(model, images)[0]
    assert float((one - other).norm() / one.norm()) == pytest.approx(pruned.change, rel=1e-3)


def test_all_or_nothing():
    model, (images, labels) = injected(), examples()
    found = si.excitations(model, in_batches(images, labels))
    state = copy.deepcopy(model.state_dict())
    none = si.prune_blocks_(model, found, tolerance=0)
    assert not len(none)
    assert "no block was dropped" in str(none)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    every = si.prune_blocks_(model, found, tolerance=1e9)
    assert len(every) == 3
    assert type(model) is Net
    assert every.saved.params == sum(value.numel() for key, value in state.items() if ".se." in key)


def test_a_metric_is_asked_instead():
    model, (images, labels) = injected(), examples()
    found = si.excitations(model, in_batches(images, labels))
    seen = []

    def metric(network):
        assert not network.training
        seen.append(sum("forward" in vars(block) for _, block in injected_blocks(network)))
        return 1 - 0.1 * seen[-1]

    pruned = si.prune_blocks_(model, found, tolerance=0.25, metric=metric)
    assert seen == [0, 1, 2, 3]
    assert len(pruned) == 2
    assert pruned.change == pytest.approx(0.2)
    assert pruned.measure == "loss of the metric"
    with pytest.raises(DataError, match="not a finite number"):
        si.prune_blocks_(injected(), found, metric=lambda network: float("nan"))


def test_a_block_that_is_called_twice_becomes_the_mean_of_its_calls():
    torch.manual_seed(0)
    model = si.inject(randomise(Twice()).double(), X.double(), init="paper", reduction=2).eval()
    images = examples(8)[0].double()
    found = si.excitations(model, [images])
    norm = model.one[0].bn2.weight.detach().clone()
    mean = (found["one.0.se"].mean + found["one.0.se (call 2)"].mean) / 2
    pruned = si.prune_blocks_(model, found, tolerance=1e9)
    assert len(pruned) == 3
    torch.testing.assert_close(model.one[0].bn2.weight.detach(), norm * mean)
    model = constant_(si.inject(randomise(Twice()).double(), X.double(), reduction=2).eval())
    before = outputs(model, images)
    assert len(si.prune_blocks_(model, si.excitations(model, [images]), tolerance=1e-9)) == 3
    assert worst(before, outputs(model, images)) < 1e-13


@pytest.mark.parametrize("block", ["cbam", "scse", "ge", "eca"])
def test_other_blocks(block):
    torch.manual_seed(0)
    model = si.inject(randomise(Net()), X, block=block, init="paper").eval()
    images, _ = examples(8)
    pruned = si.prune_blocks_(model, si.excitations(model, [images]), tolerance=1e9)
    assert len(pruned) == (3 if block in ("eca", "ge") else 0) or block == "ge"
    assert len(pruned) + len(pruned.kept) == 3


# -- the way back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0.05, 1e9])
def test_undo_gives_the_same_network_bit_for_bit(tolerance):
    model, (images, labels) = injected(), examples()
    before, state = outputs(model, images)[0], copy.deepcopy(model.state_dict())
    blocks = dict(injected_blocks(model))
    pruned = si.prune_blocks_(model, si.excitations(model, in_batches(images, labels)), tolerance=tolerance)
    pruned.undo_(model, X)
    assert list(model.state_dict()) == list(state) or set(model.state_dict()) == set(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(outputs(model, images)[0], before)
    assert dict(injected_blocks(model)) == blocks
    with pytest.raises(SurgeryError, match="not the network"):
        si.prune_blocks_(injected(), si.excitations(injected(), [images]), tolerance=1e9).undo_(nn.Conv2d(3, 3, 1))


def test_the_adapter_saved_before_is_the_way_back_on_the_backbone(tmp_path):
    model, (images, labels) = injected(), examples()
    backbone = si.eject_(copy.deepcopy(model))
    before = outputs(model, images)[0]
    si.save_adapter(model, tmp_path / "se.safetensors")
    si.prune_blocks_(model, si.excitations(model, in_batches(images, labels)), tolerance=1e9)
    again = si.load_adapter(backbone, tmp_path / "se.safetensors", strict=True)
    assert torch.equal(outputs(again, images)[0], before)
    with pytest.raises(SurgeryError, match="other weights"):
        si.load_adapter(model, tmp_path / "se.safetensors", strict=True)


def test_removing_some_leaves_the_others_as_they_are():
    network = randomise(Net()).eval()
    both = si.plan(network, X, reduction=2) + si.plan(network, X, reduction=4)
    model = both.apply(network)
    kept = dict(injected_blocks(model))
    steps = steps_of(model)
    trace = observe_model(model, X)
    remove_(model, trace, ["one.0.se", "one.1.se", "one.1.se_2"])
    assert [path for path, _ in injected_blocks(model)] == ["one.0.se_2", "two.0.se", "two.0.se_2"]
    assert all(block is kept[path] for path, block in injected_blocks(model))
    assert type(model.one[1]) is type(network.one[1])
    put_back_(model, trace, steps, {path: kept[path] for path in ("one.0.se", "one.1.se", "one.1.se_2")})
    assert dict(injected_blocks(model)) == kept
    assert [(s.path, s.value) for s in steps_of(model)] == [(s.path, s.value) for s in steps]
    with pytest.raises(SurgeryError, match="no block"):
        remove_(model, trace, ["nowhere.se"])


def test_constant_gates_leave_nothing_behind():
    model = injected()
    before = portrait(model)
    with constant_gates(model, {"one.0.se": torch.ones(8)}):
        assert "forward" in vars(model.one[0].se)
    same_portrait(before, portrait(model))


# -- asked wrongly -----------------------------------------------------------------------------------------


def test_bad_questions_change_nothing():
    model, (images, _) = injected(), examples()
    found = si.excitations(model, [images])
    once = si.excitations(model, iter([images]))
    plain = Net()
    other = si.inject(plain, X, stages=[1])
    before = portrait(model)
    with pytest.raises(OptionError, match="tolerance"):
        si.prune_blocks_(model, found, tolerance=-1)
    with pytest.raises(OptionError, match="no data to measure"):
        si.prune_blocks_(model, once)
    with pytest.raises(DataError):
        si.prune_blocks_(model, found, batches=[torch.ones(2, 9, 12, 12)])
    with pytest.raises(DataError):
        si.prune_blocks_(model, found, batches=[])
    with pytest.raises(SurgeryError, match="another network"):
        si.prune_blocks_(other, found)
    with pytest.raises(SurgeryError, match="no block"):
        si.prune_blocks_(plain, found)
    same_portrait(before, portrait(model))


def test_fused_blocks_are_seen_and_have_to_be_unfused_first():
    model, (images, _) = injected(), examples()
    plain = si.excitations(model, [images])
    si.fuse_(model)
    found = si.excitations(model, [images])
    assert all(torch.equal(one.mean, two.mean) for one, two in zip(plain, found, strict=True))
    with pytest.raises(SurgeryError, match="fused"):
        si.prune_blocks_(model, found, tolerance=1e9)
    assert len(si.prune_blocks_(si.unfuse_(model), found, tolerance=1e9)) == 3


def test_folds_refuse_what_they_do_not_know():
    model = injected()
    finder = Folds(observe_model(model, X), ["one.0.se"])
    with pytest.raises(NotFoldable, match="not seen"):
        finder.of("nowhere", 8)


def test_text_and_data():
    model, (images, labels) = injected(), examples()
    pruned = si.prune_blocks_(model, si.excitations(model, in_batches(images, labels)), tolerance=0.05)
    text = str(pruned)
    assert f"{len(pruned)} of 3 blocks of Net folded away" in text
    assert "relative change of the output" in text
    data = json.loads(json.dumps(pruned_data(pruned), allow_nan=False))
    assert len(data["dropped"]) == len(pruned)
    assert data["saved"]["params"] == pruned.saved.params


def test_the_command(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torchvision.models.resnet import BasicBlock\nimport se_inject as si\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), BasicBlock(8, 8), BasicBlock(8, 8))\n"
        "    return si.inject(body, torch.empty(2, 3, 12, 12), reduction=2)\n"
        "def data():\n    torch.manual_seed(0)\n    return [torch.randn(4, 3, 12, 12) for _ in range(3)]\n"
    )
    command = ["prune", f"{tmp_path}/nets.py:net", "--data", f"{tmp_path}/nets.py:data", "--input", "3x12x12"]
    done = CliRunner().invoke(cli, [*command, "-o", f"{tmp_path}/out.pt", "--tolerance", "0.01"])
    assert done.exit_code == 0, done.output
    assert "2 of 2 blocks of Sequential folded away" in done.output
    assert "ratio" in done.output
    network = si.load(tmp_path / "out.pt")
    assert not list(injected_blocks(network))
    done = CliRunner().invoke(cli, [*command, "-o", f"{tmp_path}/out.pt"])
    assert done.exit_code != 0  # it exists
    done = CliRunner().invoke(cli, [*command, "-o", f"{tmp_path}/b.pt", "--json"])
    assert json.loads(done.stdout)["change"] == 0
