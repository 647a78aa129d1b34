"""Plans: a value that is stored, replayed and refused; and where the positions of the paper put a block."""

import copy
import json
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import se_inject as si
from se_inject.errors import AlreadyInjected, LoadError, OptionError, SurgeryError, TraceError, UnsupportedModel
from se_inject.plans.value import Plan
from tests.common import build, randomise

POSITIONS = ["standard", "pre", "post", "identity", "conv3x3"]
X = torch.empty(2, 3, 64, 64, device="meta")


def resnet(kind=BasicBlock, depth=1, seed=0):
    """A ResNet of torchvision's with ``depth`` units in each stage, and no weight that hides anything."""
    torch.manual_seed(seed)
    width = {"width_per_group": 16} if kind is Bottleneck else {}
    return randomise(torchvision.models.ResNet(kind, [depth, depth, 1, 1], **width), seed)


def plain(width=8):
    """A small network without units."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()
    )


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal_states(one, other):
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


# -- a value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stages": [3, 4], "reduction": 4, "bias": False},
        {"stages": "2-3", "divisor": 8, "init": "paper"},
        {"position": "pre"},
        {"position": "identity", "name": "gate"},
        {"block": "eca", "kernel": 5},
    ],
    ids=str,
)
def test_json_and_back_is_the_same_plan(options):
    network = resnet()
    plan = si.plan(network, X, **options)
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again.steps == plan.steps
    assert (again.model, again.inputs) == (plan.model, tuple(json.loads(text)["inputs"]))
    assert again.to_json() == text
    assert str(again) == str(plan)
    torch.manual_seed(0)
    one = plan.apply(network)
    torch.manual_seed(0)
    other = again.apply(network)
    assert equal_states(state(one), state(other))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_a_plan_is_replayed_on_another_instance():
    plan = Plan.from_json(si.plan(resnet(), X, stages=[2]).to_json())
    other = resnet(seed=3)
    injected = plan.apply(other)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(injected.eval()(x), other.eval()(x))
    assert [step.path for step in si.plan_of(injected).steps] == ["layer2.0.se"]
    assert plan.cost(other).added.params == 2 * 128 * 8 + 128 + 8


def test_a_plan_prints_where_its_blocks_go():
    text = str(si.plan(resnet(), X, stages=[2, 3]))
    assert "layer2.0.bn2" in text
    assert "layer3.0.se" in text
    assert "layer1" not in text


def test_a_plan_can_not_be_changed():
    plan = si.plan(resnet(), X)
    with pytest.raises(AttributeError):
        plan.steps = ()
    with pytest.raises(AttributeError):
        plan.steps[0].channels = 3
    before = plan.to_json()
    plan.apply(resnet())
    plan.cost()
    assert plan.to_json() == before


def test_a_stored_plan_needs_the_network_to_say_its_cost():
    plan = Plan.from_json(si.plan(resnet(), X).to_json())
    with pytest.raises(OptionError, match="needs the network") as caught:
        plan.cost()
    assert "plan.cost(model)" in str(caught.value)


def edited(change):
    data = json.loads(si.plan(resnet(), X, stages=[2]).to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan"),
        ("{}", "not a plan"),
        ("[]", "not a plan"),
        ("null", "not a plan"),
        ("3", "not a plan"),
        ('{"se_inject_plan": 1}', "not a plan"),
    ],
)
def test_what_is_no_plan(text, message):
    with pytest.raises(LoadError, match=message):
        Plan.from_json(text)


def test_a_plan_of_a_later_version():
    with pytest.raises(LoadError, match="version 99") as caught:
        Plan.from_json(edited(lambda data: data.update(se_inject_plan=99)))
    assert "update" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("steps"),
        lambda data: data["steps"][0].pop("site"),
        lambda data: data["steps"][0].update(colour="red"),
        lambda data: data["steps"][0].update(size=3),
        lambda data: data.update(steps=3),
        lambda data: data.update(inputs=3),
    ],
    ids=["no steps", "no site", "unknown field", "no size", "number of steps", "number of inputs"],
)
def test_a_plan_that_is_damaged(change):
    with pytest.raises(LoadError, match="not a plan"):
        Plan.from_json(edited(change))


def test_a_plan_with_an_option_nobody_knows():
    with pytest.raises(OptionError, match="reductoin") as caught:
        Plan.from_json(edited(lambda data: data["steps"][0].update(options={"reductoin": 4})))
    assert "`reduction`" in caught.value.hint


# -- a plan that does not fit ------------------------------------------------------------------------------


def fit_error(plan, model):
    """The error of applying a plan, which must leave the model as it was."""
    before, kinds = state(model), [type(module) for module in model.modules()]
    with pytest.raises(SurgeryError) as caught:
        plan.apply_(model)
    assert equal_states(state(model), before)
    assert [type(module) for module in model.modules()] == kinds
    return caught.value


def test_a_site_that_is_missing():
    plan = si.plan(resnet(depth=2), X)
    error = fit_error(plan, resnet(depth=1))
    assert "`layer1.1.bn2`" in error.message
    assert "no such site" in error.seen
    assert error.hint


def test_other_channels():
    plan = si.plan(plain(8), torch.empty(1, 3, 16, 16, device="meta"))
    error = fit_error(plan, plain(12))
    assert "expects 8 channels" in error.message
    assert "12 channels" in error.seen
    assert error.hint


def test_a_network_that_rejects_the_plans_input():
    plan = si.plan(plain(8), torch.empty(1, 3, 16, 16, device="meta"))
    flat = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU())
    before = state(flat)
    with pytest.raises(TraceError, match="1×3×16×16"):
        plan.apply_(flat)
    assert equal_states(state(flat), before)


def test_another_class():
    error = fit_error(si.plan(resnet(), X, stages=[1]), resnet(Bottleneck))
    assert "`layer1.0.bn2`" in error.message


@pytest.mark.parametrize("stored", [False, True])
def test_a_plan_is_not_applied_twice(stored):
    network = resnet()
    plan = si.plan(network, X)
    if stored:
        plan = Plan.from_json(plan.to_json())
    plan.apply_(network)
    keys = list(network.state_dict())
    with pytest.raises(AlreadyInjected) as caught:
        plan.apply_(network)
    assert "`layer1.0.se`" in caught.value.seen
    assert caught.value.hint
    assert list(network.state_dict()) == keys
    with pytest.raises(AlreadyInjected):
        si.plan(network, X)


def test_plans_for_other_sites_add_up():
    network = resnet()
    first, second = si.plan(network, X, stages=[1]), si.plan(network, X, stages=[3])
    both = second.apply_(first.apply_(network))
    assert [step.site for step in si.plan_of(both).steps] == ["layer1.0.bn2", "layer3.0.bn2"]
    plan = si.plan(both, X)
    assert [step.stage for step in plan.steps] == [2, 4]
    assert any("2 chosen sites with a block of ours already" in note for note in plan.notes)


@pytest.mark.parametrize("first", ["pre", "identity"])
def test_a_site_that_has_a_block_at_another_position_is_said_to_have_one(first):
    network = si.inject(resnet(), X, stages=[2], position=first)
    with pytest.raises(AlreadyInjected):
        si.plan(network, X, stages=[2])


def test_a_plan_for_another_position_can_be_applied_or_is_not_made():
    network = si.inject(resnet(), X, stages=[2], position="post")
    try:
        plan = si.plan(network, X, stages=[2])
    except AlreadyInjected:
        return
    assert si.verify(network, plan.apply(network), X).passed


# -- applying ----------------------------------------------------------------------------------------------


def test_apply_leaves_the_original_untouched():
    network = resnet()
    before = state(network)
    identity = {name: id(module) for name, module in network.named_modules()}
    kinds = {name: type(module) for name, module in network.named_modules()}
    modes = {name: module.training for name, module in network.named_modules()}
    injected = si.plan(network, X).apply(network)
    assert injected is not network
    assert equal_states(state(network), before)
    assert {name: id(module) for name, module in network.named_modules()} == identity
    assert {name: type(module) for name, module in network.named_modules()} == kinds
    assert {name: module.training for name, module in network.named_modules()} == modes
    theirs = {p.data_ptr() for p in network.parameters()}
    assert not any(p.data_ptr() in theirs for p in injected.parameters())


def test_apply_in_place_moves_no_weight():
    network = resnet()
    pointers = {name: p.data_ptr() for name, p in network.named_parameters()}
    assert si.plan(network, X).apply_(network) is network
    assert {name: p.data_ptr() for name, p in network.named_parameters() if ".se." not in name} == pointers


def test_plan_of_tells_what_was_applied():
    plan = si.plan(resnet(), X, stages=[2, 3], reduction=8, bias=False)
    told = si.plan_of(plan.apply(resnet()))
    assert told.steps == plan.steps
    assert told.model == "ResNet"
    assert Plan.from_json(told.to_json()).steps == plan.steps


def test_plan_of_a_network_without_blocks():
    with pytest.raises(SurgeryError, match="no block") as caught:
        si.plan_of(resnet())
    assert "ResNet" in caught.value.seen
    network = resnet()
    assert si.eject_(si.plan(network, X).apply_(network)) is network
    with pytest.raises(SurgeryError):
        si.plan_of(network)


class OfBatches(nn.Module):
    """A network that takes a dict, and a number by its name."""

    def __init__(self):
        super().__init__()
        self.stem, self.unit = nn.Conv2d(4, 8, 3, 2, 1), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, batch, *, scale):
        x = self.stem(torch.cat([batch["image"], batch["mask"]], 1))
        return {"features": torch.relu(x + self.unit(x)) * scale}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_stored_plan_of_a_network_that_takes_more_than_tensors_is_given_inputs(in_place, tmp_path):
    batch = {"image": torch.rand(2, 3, 16, 16), "mask": torch.rand(2, 1, 16, 16)}
    torch.manual_seed(0)
    model = randomise(OfBatches()).eval()
    si.plan(model, batch, example_kwargs={"scale": 2.0}).save(tmp_path / "plan.json")
    stored = si.Plan.load(tmp_path / "plan.json")
    with pytest.raises(si.InjectError, match="example_inputs"):
        stored.apply(model)
    twin = copy.deepcopy(model)
    after = (stored.apply_ if in_place else stored.apply)(twin, batch, {"scale": 2.0})
    assert (after is twin) is in_place
    (step,) = stored.steps
    assert [each.path for each in si.plan_of(after, batch).steps] == [step.path]
    assert torch.equal(after(batch, scale=2.0)["features"], model(batch, scale=2.0)["features"])
    nn.init.normal_(after.get_submodule(step.path).fc2.weight)
    assert not torch.equal(after(batch, scale=2.0)["features"], model(batch, scale=2.0)["features"])


def test_what_plan_of_tells_can_be_replayed():
    injected = si.inject(resnet(), X, stages=[3], position="identity")
    plan = si.plan_of(injected)
    other = resnet(seed=1)
    again = plan.apply(other)
    assert si.plan_of(again).steps == plan.steps


# -- notes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, "input inferred: 1 input of 2×3×224×224"),
        ({"reduction": 600, "stages": [4]}, "r = 600 is too much for the 512 channels of some sites"),
        ({"block": "simam"}, "no identity start"),
    ],
    ids=["input", "reduction", "start"],
)
def test_notes(options, note):
    assert any(note in told for told in si.plan(resnet(), **options).notes)
    assert not any(note in told for told in si.plan(resnet(), X).notes)


def test_attention_of_the_networks_own_is_noted():
    network = nn.Sequential(resnet().layer1, timm.create_model("seresnet18").layer1)
    x = torch.empty(1, 64, 8, 8, device="meta")
    plan = si.plan(network, x)
    assert [step.site for step in plan.steps] == ["0.0.bn2"]
    assert any("2 sites with attention of their own already" in note for note in plan.notes)
    assert len(si.plan(network, x, attended=True)) == 3


# -- what is refused ---------------------------------------------------------------------------------------


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(plain())


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(plain(), torch.ao.nn.quantized.ReLU6())


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda: nn.DataParallel(plain()), "wrapped in DataParallel", "`model.module`"),
        (lambda: torch.compile(plain()), "compiled", "`model._orig_mod`"),
        (scripted, "TorchScript", "torch.jit.save"),
        (quantised, "quantised", "inject first"),
        (lambda: plain().state_dict(), "OrderedDict", "network"),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), "no shape yet", "call the network once"),
    ],
    ids=["DataParallel", "compiled", "scripted", "quantised", "state dict", "lazy"],
)
def test_modules_that_can_not_be_edited(make, message, hint):
    model = make()
    plan = si.plan(plain(), torch.empty(1, 3, 16, 16, device="meta"))
    for refused in (lambda: si.plan(model), lambda: si.inject(model), lambda: plan.apply_(model)):
        with pytest.raises(UnsupportedModel, match=message) as caught:
            refused()
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "above"}, "above"),
        ({"block": "eka"}, "eka"),
        ({"init": "zero"}, "zero"),
        ({"reduction": 0}, "positive"),
        ({"reduction": -1}, "positive"),
        ({"divisor": 0}, "at least 1"),
        ({"name": "2nd"}, "2nd"),
        ({"ratio": 3}, "ratio"),
        ({"stages": []}, "empty"),
        ({"stages": [9]}, "`9`"),
        ({"at": "layer9.*"}, "layer9"),
    ],
    ids=str,
)
def test_wrong_options_leave_the_network_alone(options, message):
    network = resnet()
    before = state(network)
    with pytest.raises((OptionError, LookupError), match=message) as caught:
        si.plan(network, X, **options)
    assert caught.value.exit_code == 2
    assert equal_states(state(network), before)


# -- positions: against the formulas -----------------------------------------------------------------------


def gate(block, x):
    """Equations 2 to 4, from the block's weights alone."""
    z = x.mean((2, 3))
    w1, w2 = block.fc1.weight.flatten(1), block.fc2.weight.flatten(1)
    s = torch.relu(z @ w1.T + block.fc1.bias) @ w2.T + block.fc2.bias
    return x * torch.sigmoid(s)[:, :, None, None]


def unit(block, x, position, se):
    """One residual unit of torchvision's, composed by hand, with ``se`` where the formula has it."""
    here = lambda place, value: se(value) if place == position else value  # noqa: E731

    def branch(x):
        """F(x)"""
        if isinstance(block, BasicBlock):
            y = torch.relu(block.bn1(block.conv1(x)))
            return here("conv3x3", block.bn2(block.conv2(y)))
        y = torch.relu(block.bn1(block.conv1(x)))
        y = here("conv3x3", torch.relu(block.bn2(block.conv2(y))))
        return block.bn3(block.conv3(y))

    shortcut = x if block.downsample is None else block.downsample(x)
    y = here("standard", branch(here("pre", x)))
    return here("post", torch.relu(y + here("identity", shortcut)))


def forward(network, blocks, x, position):
    """A ResNet's forward by hand, with the blocks of an injected twin."""
    x = network.maxpool(torch.relu(network.bn1(network.conv1(x))))
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(getattr(network, name)):
            found = blocks.get(f"{name}.{index}")
            x = unit(block, x, position, (lambda value, found=found: gate(found, value)) if found else lambda v: v)
    return network.fc(x.mean((2, 3)))


class Around(nn.Module):
    """A residual unit whose branch ends in another unit, and so in that unit's convolution."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.conv = inner, nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.inner(self.conv(x))


def test_units_that_share_a_place_share_a_block():
    inner = Around(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Around(inner))
    found = si.plan(network, X, at=["2.inner", "2.inner.inner"], position="conv3x3", reduction=2)
    assert [step.site for step in found.steps] == ["2.inner.inner"]
    assert "left out: 1 site whose place at position `conv3x3` is another's" in found.notes
    injected = found.apply(network)
    assert sum(p.numel() for p in si.injected_parameters(injected)) == found.cost().added.params
    assert si.verify(network, injected, X).passed


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_positions_compute_the_formulas(kind, position, training):
    network = resnet(kind, depth=2).double().train(training)
    reference = copy.deepcopy(network)
    injected = si.inject(network, X.double(), position=position, init="paper", reduction=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in si.injected_parameters(injected):
            parameter.normal_(0, 0.7, generator=generator)
    blocks = {}
    for step in si.plan_of(injected).steps:
        owner = ".".join(step.site.split(".")[:2])
        assert owner not in blocks
        blocks[owner] = injected.get_submodule(step.path)
    assert len(blocks) == 6
    x = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.double)
    with torch.no_grad():
        expected, without = forward(reference, blocks, x, position), network(x)
        seen = injected(x)
    torch.testing.assert_close(seen, expected, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(seen, without, rtol=1e-2)
    if training:  # the running statistics have seen the same values
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(injected.state_dict()[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_positions_start_as_identities(kind, position):
    network = resnet(kind, depth=2)
    injected = si.inject(network, X, position=position)
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        twins = [copy.deepcopy(model).train(training) for model in (network, injected)]
        assert torch.equal(*(twin(x) for twin in twins))
    assert si.verify(network, injected, X).passed


@pytest.mark.parametrize("position", POSITIONS)
def test_the_way_back_from_every_position(position):
    network = resnet(Bottleneck)
    before, kinds = state(network), [type(module) for module in network.modules()]
    si.eject_(si.plan(network, X, position=position).apply_(network))
    assert equal_states(state(network), before)
    assert [type(module) for module in network.modules()] == kinds


@pytest.mark.parametrize(
    ("position", "without_bias", "with_bias"),
    [
        ("standard", 28_071_976, 28_088_024),
        ("pre", 27_548_200, 27_562_140),
        ("post", 28_071_976, 28_088_024),
        ("identity", 28_071_976, 28_088_024),
        ("conv3x3", 25_714_216, 25_718_228),
    ],
)
def test_parameters_of_resnet50_at_every_position(position, without_bias, with_bias):
    with torch.device("meta"):
        network = build("torchvision:resnet50")
    for bias, expected in ((False, without_bias), (True, with_bias)):
        cost = si.plan(network, X, position=position, bias=bias).cost()
        assert len(cost.rows) == 16
        assert cost.after.params == expected


def test_a_position_that_a_site_does_not_have():
    with pytest.raises(OptionError, match="residual") as caught:
        si.plan(plain(), torch.empty(1, 3, 16, 16, device="meta"), position="pre")
    assert "conv site" in caught.value.seen


# -- two networks that were met by chance ------------------------------------------------------------------


class OtherSelf(nn.Module):
    """Nothing says that the first parameter is called ``self``."""

    def __init__(this):
        super().__init__()
        this.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(this, x):
        return x + this.conv(x)


def test_a_forward_whose_self_has_another_name():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), OtherSelf(), OtherSelf())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(si.inject(network, x)(x), network(x))


def test_a_unit_whose_values_have_shrunk_to_one_position_is_at_least_mentioned():
    found = si.find_sites(resnet(), torch.empty(1, 3, 32, 32, device="meta"))
    mentioned = [site.address for site in found.all_sites] + [item.address for item in found.refused]
    assert any(address.startswith("layer4") for address in mentioned)


def test_a_network_that_is_a_unit_itself_keeps_its_name():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    residual = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch = network, residual

        def forward(self, x):
            x = self.stem(x)
            return x + self.branch(x)

    first = si.inject(Net(), torch.rand(2, 3, 8, 8))
    assert type(first).__name__ == "InjectedNet"
    assert si.plan_of(first).model == "Net"
    assert si.plan(first, torch.rand(2, 3, 8, 8), at="stem.1").model == "Net"
