"""Blocks are not lost when a library changes the network that holds them: they act, or an error says what to do."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import se_inject as si
from se_inject.errors import ExportError, SurgeryError
from tests.common import randomise

IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Conv(nn.Module):
    """A YOLO's: with its norm merged, it gets another forward on the instance."""

    def __init__(self, a, b):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))

    def merge_norm(self):
        self.conv = torch.nn.utils.fuse_conv_bn_eval(self.conv, self.bn)
        del self.bn
        self.forward = self.forward_fuse
        return self


class Branches(nn.Module):
    """A RepVGG's unit: its branches become one convolution."""

    def __init__(self, channels, residual=True):
        super().__init__()
        self.residual = residual
        self.one, self.three = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        self.merged = None

    def forward(self, x):
        y = self.merged(x) if self.merged is not None else self.one(x) + self.three(x)
        return F.relu(x + y) if self.residual else F.relu(y)

    def switch_to_deploy(self):
        self.merged = nn.Conv2d(self.one.in_channels, self.one.out_channels, 3, padding=1)
        self.merged.weight.data = self.three.weight.data + F.pad(self.one.weight.data, [1, 1, 1, 1])
        self.merged.bias.data = self.three.bias.data + self.one.bias.data
        del self.one, self.three


class Returns(Conv):
    """A RepViT's: merging gives another module."""

    def fuse(self):
        return nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(self.conv, self.bn), self.act)


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def encode(self, x):
        return torch.relu(self.bn(self.conv(x)))

    def embed(self, x):
        return self.encode(x).mean((2, 3))

    def _hidden(self, x):
        return self.embed(x)

    def forward(self, x):
        return self.fc(self._hidden(x))


class Appends(Features):
    """Its methods hand a list on and fill it: called by themselves they can't be told from the forward."""

    def encode(self, x, seen):
        x = torch.relu(self.bn(self.conv(x)))
        seen.append(x)
        return x

    def embed(self, x, seen):
        return self.encode(x, seen).mean((2, 3))

    def _hidden(self, x):
        return self.embed(x, [])


def injected(model, **options):
    """The network with blocks that do something."""
    model = si.inject(randomise(model).eval(), IMAGE, **options)
    for number, parameter in enumerate(si.injected_parameters(model)):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return model


def at_output():
    """Convolutions with blocks on what they return."""
    model = injected(nn.Sequential(Conv(3, 8), Conv(8, 8)))
    assert [step.value for step in si.plan_of(model).steps] == [None, None]
    return model


def within(kind=Branches):
    """A unit with a block inside of it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8))
    sites = [site.address for site in si.find_sites(model, IMAGE) if site.owner == "1"]
    model = injected(model, at=sites)
    assert all(step.value is not None for step in si.plan_of(model).steps)
    return model


def without_blocks(model):
    return si.eject_(copy.deepcopy(model))


# -- another forward on the instance ----------------------------------------------------------------------


def test_blocks_act_behind_another_forward():
    model = at_output()
    expected = model(IMAGE)
    for layer in model:
        layer.merge_norm()
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(IMAGE), without_blocks(model)(IMAGE), atol=1e-2)
    assert torch.equal(copy.deepcopy(model)(IMAGE), model(IMAGE))
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGE), model(IMAGE))


def test_ejected_networks_have_the_forward_that_was_bound():
    model, plain = at_output(), nn.Sequential(Conv(3, 8), Conv(8, 8)).eval()
    plain.load_state_dict(without_blocks(model).state_dict())
    for layer in (*model, *plain):
        layer.merge_norm()
    si.eject_(model)
    assert torch.equal(model(IMAGE), plain(IMAGE))
    assert model[0].forward.__func__ is Conv.forward_fuse


def test_forwards_can_be_taken_back():
    model = at_output()
    expected, before = model(IMAGE), model[0].forward
    model[0].forward = lambda x: torch.zeros(2, 8, 16, 16)
    assert not torch.equal(model(IMAGE), expected)
    model[0].forward = before
    assert torch.equal(model(IMAGE), expected)
    model[0].forward = lambda x: torch.zeros(2, 8, 16, 16)
    del model[0].forward
    assert torch.equal(model(IMAGE), expected)


def _wrapped(function):
    @functools.wraps(function)
    def wrapper(*args):
        return 2 * function(*args)

    return wrapper


WRAPPERS = {
    "a closure": lambda forward: lambda x: 2 * forward(x),
    "functools.wraps": _wrapped,
    "functools.partial": lambda forward: functools.partial(lambda inner, x: 2 * inner(x), forward),
    "a callable object": lambda forward: type("Twice", (), {"__call__": lambda self, x: 2 * self.inner(x)})(),
}


@pytest.mark.parametrize("make", [at_output, within])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_the_forward_are_left_alone(make, name):
    """As accelerate, autocast and profilers do: the blocks act within."""
    model = make()
    expected = 2 * model[1](model[0](IMAGE))
    wrapper = WRAPPERS[name](model[1].forward)
    if name == "a callable object":
        wrapper.inner = model[1].forward
    model[1].forward = wrapper
    assert torch.equal(model(IMAGE), expected)


def test_a_wrapper_that_finds_the_old_forward_on_the_module():
    """accelerate keeps it there."""
    model = within()
    expected, unit = 2 * model(IMAGE), model[1]
    unit._old_forward = unit.forward
    unit.forward = functools.partial(lambda module, x: 2 * module._old_forward(x), unit)
    assert torch.equal(model(IMAGE), expected)


def test_another_forward_that_passes_a_block_by_is_refused():
    model = within()
    expected = model(IMAGE)
    with pytest.raises(SurgeryError, match="would pass by the block `se` of a Branches"):
        model[1].forward = lambda x: x
    assert torch.equal(model(IMAGE), expected)


# -- merged branches ---------------------------------------------------------------------------------------


def test_merging_around_a_block_is_refused_before_anything_changes():
    model = within()
    expected = model(IMAGE)
    with pytest.raises(SurgeryError, match="`switch_to_deploy` would pass by the block") as caught:
        model[1].switch_to_deploy()
    assert "si.eject_" in caught.value.hint
    assert torch.equal(model(IMAGE), expected)
    merged = si.eject_(model)
    plain = merged(IMAGE)
    merged[1].switch_to_deploy()
    torch.testing.assert_close(merged(IMAGE), plain, rtol=1e-4, atol=1e-5)


def test_merging_before_a_block_keeps_it():
    model = injected(nn.Sequential(nn.Conv2d(3, 8, 1), Branches(8, residual=False)), at="1")
    if any(step.value is not None for step in si.plan_of(model).steps):
        pytest.fail("its site is within")
    expected = model(IMAGE)
    model[1].switch_to_deploy()
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_merging_into_another_module_is_refused():
    model = injected(nn.Sequential(Returns(3, 8), Returns(8, 8)))
    with pytest.raises(SurgeryError, match="`fuse`, which returns another module,"):
        model[0] = model[0].fuse()
    assert type(model[0]).__name__ == "InjectedReturns"


# -- blocks that nobody calls, and methods beside forward --------------------------------------------------


def test_a_block_that_is_not_called_is_no_file_and_no_pass(tmp_path):
    plain = nn.Sequential(Conv(3, 8), Conv(8, 8)).eval()
    model = si.inject(plain, IMAGE)
    vars(model[1])["forward"] = functools.partial(Conv.forward, model[1])
    with pytest.raises(ExportError, match=r"blocks that it doesn't call: 1, `1\.se` the first"):
        si.export(model, tmp_path / "a.pt", IMAGE)
    assert not list(tmp_path.iterdir())
    verdict = si.verify(plain, model, IMAGE)
    assert not verdict.passed
    assert "not called: 1.se" in str(verdict.checks)


class UntilSure(nn.Module):
    """Adaptive computation time: units are called until a score is spent."""

    def __init__(self, units, score):
        super().__init__()
        self.units, self.score = nn.ModuleList(units), score

    def forward(self, x):
        spent = torch.zeros(x.shape[0])
        for unit in self.units:
            x = unit(x)
            spent = spent + self.score * torch.sigmoid(x.mean((1, 2, 3)))
            if bool((spent > 1).all()):
                break
        return x


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_a_unit_that_the_data_does_not_reach_is_said_and_no_fault(suffix, tmp_path):
    torch.manual_seed(0)
    plain = randomise(nn.Sequential(Conv(3, 8), UntilSure([Conv(8, 8), Conv(8, 8), Conv(8, 8)], 0.0))).eval()
    model = si.inject(plain, IMAGE, at="1.*")
    assert [step.path for step in si.plan_of(model, IMAGE).steps] == ["1.units.0.se", "1.units.1.se", "1.units.2.se"]
    plain[1].score = model[1].score = 4.0  # as after training: one unit does
    verdict = si.verify(plain, model, IMAGE)
    assert verdict.passed
    assert (
        "by the data what it calls, and no input tried reaches 1.units.1.se, 1.units.2.se" in verdict.checks[-1].detail
    )
    exported = si.export(model, tmp_path / f"net{suffix}", IMAGE)
    assert any("these inputs reach no `1.units.1.se`, `1.units.2.se`" in note for note in exported.notes)


def test_a_block_that_a_reached_unit_passes_by_is_lost_there_too(tmp_path):
    torch.manual_seed(0)
    plain = randomise(nn.Sequential(Conv(3, 8), UntilSure([Conv(8, 8), Conv(8, 8)], 0.0))).eval()
    model = si.inject(plain, IMAGE, at="1.*")
    vars(model[1].units[1])["forward"] = functools.partial(Conv.forward, model[1].units[1])
    with pytest.raises(ExportError, match="blocks that it doesn't call"):
        si.export(model, tmp_path / "a.pt", IMAGE)
    verdict = si.verify(plain, model, IMAGE)
    assert not verdict.passed
    assert "not called: 1.units.1.se" in str(verdict.checks)


def test_methods_that_run_without_their_block_are_named():
    plain = Appends().eval()
    plan = si.plan(plain, IMAGE)
    notes = [note for note in plan.notes if "by itself" in note]
    assert sorted(note.split("`")[1] for note in notes) == ["embed", "encode"]
    assert all("(it changes its arguments in place)" in note for note in notes)
    model = plan.apply(plain)
    named = [note for note in si.verify(plain, model, IMAGE).notes if "by itself" in note]
    assert sorted(note.split("`")[1] for note in named) == ["embed", "encode"]


def test_a_method_that_holds_blocks_is_not_replaced_in_silence():
    model = injected(Features(), at="*")
    expected = model(IMAGE)
    with pytest.raises(SurgeryError, match="another encode on the instance"):
        model.encode = functools.partial(Features.encode, model)
    model.encode = model.encode
    assert "encode" not in vars(model)
    assert torch.equal(model(IMAGE), expected)


def test_nobody_is_named_where_forward_does_it_itself():
    assert not [note for note in si.plan(nn.Sequential(Conv(3, 8), Conv(8, 8)), IMAGE).notes if "by itself" in note]
