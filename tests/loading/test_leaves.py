"""A module of an archive that can't be made a module again stays what it is: it costs its own places, not the network."""

import copy
import warnings

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.cli.entry import cli
from se_inject.errors import ExportError, LoadError
from tests.common import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


class Unit(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


class Detached(nn.Module):
    def forward(self, x):
        return x + x.data


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x):
        self.count = self.count + 1
        return x * self.scale


class Caches(nn.Module):
    cache: dict[str, torch.Tensor]

    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = torch.ones_like(x[:1])
        return x * self.cache[key]


class Around(nn.Module):
    """What stays is the innermost: the module around it is an ordinary one."""

    def __init__(self):
        super().__init__()
        self.before, self.inner = Unit(), Counts()

    def forward(self, x):
        return self.inner(self.before(x))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(n, c, h, w)


class Ungraded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        with torch.no_grad():
            y = self.conv(x)
        return y + x


def network(odd):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, padding=1), Unit(), odd, Unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return randomise(nn.Sequential(*parts)).eval()


def scripted(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(copy.deepcopy(model)), path)
    return path


def exported(model, path):
    torch.export.save(torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), path)
    return path


def check(loaded, model, leaf):
    """It computes the same, takes blocks around the leaf, and all that is done to networks can be done to it."""
    assert next(path for path, each in loaded.named_modules() if type(each).__name__ in KEPT) == leaf
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    plan = si.plan(loaded, IMAGES)
    assert {"1.se", "3.se"} <= {step.path for step in plan.steps}
    injected = plan.apply(loaded)
    assert si.verify(loaded, injected, IMAGES).passed
    for number, parameter in enumerate(si.injected_parameters(injected)):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    trained = copy.deepcopy(injected.state_dict())
    torch.optim.SGD(injected.parameters(), 0.1)  # leaves of autograd all
    with torch.no_grad():
        expected = injected(IMAGES)
        assert not torch.equal(expected, model(IMAGES))
        torch.testing.assert_close(si.fuse_(copy.deepcopy(injected))(IMAGES), expected)
        torch.testing.assert_close(si.for_inference(injected, IMAGES)(IMAGES), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(si.eject_(copy.deepcopy(injected))(IMAGES), model(IMAGES))
    assert trained.keys() == injected.state_dict().keys()
    return injected


KEPT = ("RecursiveScriptModule", "InterpreterModule")


@pytest.mark.parametrize(
    ("odd", "leaf", "why"),
    [
        (Detached, "2", "it uses `prim::data`"),
        (Counts, "2", "it stores into its `count`"),
        (Caches, "2", "it may change its `cache`, for this call and all others"),
        (Around, "2.inner", "it stores into its `count`"),
    ],
)
def test_in_an_archive(odd, leaf, why, tmp_path):
    model, notes = network(odd()), []
    loaded = si.load(scripted(model, tmp_path / "n.pt"), notes=notes)
    assert notes == [f"`{leaf}` stays TorchScript, with no place for a block in it: {why}"]
    injected = check(loaded, model, leaf)
    written = si.export(injected, tmp_path / "out.torchscript", IMAGES)
    assert torch.equal(torch.jit.load(written.path)(IMAGES), injected(IMAGES))
    with pytest.raises(ExportError, match="cannot export") as caught:
        si.export(injected, tmp_path / "out.pt", IMAGES)
    assert f"a pickle can't hold the TorchScript module `{leaf}`" in caught.value.seen


@pytest.mark.filterwarnings("ignore")
def test_in_an_exported_program(tmp_path):
    model, notes = network(Ungraded()), []
    loaded = si.load(exported(model, tmp_path / "n.pt2"), notes=notes)
    (note,) = notes
    assert note.startswith("`2` stays an exported program")
    assert "wrap_with_set_grad_enabled" in note
    injected = check(loaded, model, "2")
    written = si.export(injected, tmp_path / "out.onnx", IMAGES)
    assert len(written.checks) == 3
    with pytest.raises(ExportError, match="cannot export") as caught:
        si.export(injected, tmp_path / "out.pt", IMAGES)
    assert "a part of an exported program" in caught.value.seen


def test_the_network_itself_and_shared_weights_are_refused(tmp_path):
    with pytest.raises(LoadError, match="the Counts in a TorchScript archive can't be made a module"):
        si.load(scripted(Counts().eval(), tmp_path / "root.pt"))

    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit, self.odd = Unit(), Counts()
            self.scale = self.odd.scale

        def forward(self, x):
            return self.odd(self.unit(x)) * self.scale

    with pytest.raises(LoadError) as caught:
        si.load(scripted(network(Shares()), tmp_path / "shared.pt"))
    assert "shares weights with other modules" in caught.value.seen


# -- operators that no file may call ---------------------------------------------------------------------------


def test_operators_off_the_list_need_trust(tmp_path):
    model = network(Attends())
    path = scripted(model, tmp_path / "n.pt")
    with pytest.raises(LoadError, match="calls `aten::_native_multi_head_attention`") as caught:
        si.load(path)
    assert "trust=['aten']" in caught.value.hint
    notes = []
    loaded = si.load(path, trust=["aten"], notes=notes)
    assert notes[0].startswith("`2.attention` stays TorchScript")
    check(loaded, model, "2.attention")


def test_no_trust_lets_an_archive_open_files(tmp_path):
    class Reads(nn.Module):
        def forward(self, x):
            return x + torch.from_file("/etc/hostname", False, 1)[0]

    path = scripted(network(Reads()), tmp_path / "n.pt")
    for trust in ([], ["aten"]):
        with pytest.raises(LoadError, match="from_file"):
            si.load(path, trust=trust)


@torch.library.custom_op("se_inject_test_leaves::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


double.register_fake(torch.empty_like)
double.register_autograd(lambda context, gradient: gradient * 2)


class Doubles(nn.Module):
    def forward(self, x):
        return torch.ops.se_inject_test_leaves.double(x)


class Tripled(nn.Module):
    def forward(self, x):
        return torch.ops.se_inject_test_gone.triple(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [scripted, exported])
def test_an_operator_of_a_library(write, tmp_path):
    model = network(Doubles())
    path = write(model, tmp_path / "n.pt2")
    with pytest.raises(LoadError) as caught:
        si.load(path)
    assert "se_inject_test_leaves" in caught.value.message + (caught.value.seen or "")
    assert "trust=['se_inject_test_leaves']" in caught.value.hint
    with pytest.raises(LoadError):
        si.load(path, trust=["another_library"])
    loaded = si.load(path, trust=["se_inject_test_leaves"])
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    plan = si.plan(loaded, IMAGES)
    assert {"1.se", "3.se"} <= {step.path for step in plan.steps}
    assert si.verify(loaded, plan.apply(loaded), IMAGES).passed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [scripted, exported])
def test_an_operator_that_is_not_registered_is_named(write, tmp_path):
    library = torch.library.Library("se_inject_test_gone", "FRAGMENT")
    library.define("triple(Tensor x) -> Tensor")
    library.impl("triple", lambda x: x * 3, "CompositeExplicitAutograd")
    library.impl("triple", torch.empty_like, "Meta")
    path = write(network(Tripled()), tmp_path / "n.pt2")
    library._destroy()
    with pytest.raises(LoadError) as caught:
        si.load(path, trust=["se_inject_test_gone"])
    assert "se_inject_test_gone" in f"{caught.value.message} {caught.value.seen}"
    assert "triple" in f"{caught.value.message} {caught.value.seen}"


# -- from the command line, and confined -----------------------------------------------------------------------


def test_the_command_says_what_stays(tmp_path, capsys):
    path = scripted(network(Counts()), tmp_path / "n.pt")
    out = tmp_path / "out.torchscript"
    assert cli.main([str(path), "--input", "3x16x16", "-o", str(out)], standalone_mode=False) in (0, None)
    told = capsys.readouterr()
    assert "note: `2` stays TorchScript" in told.out + told.err
    assert "ok   same output as the file" in told.out
    assert torch.jit.load(out)(IMAGES).shape == (2, 4)


def test_a_confined_process_can_not_hand_it_over(tmp_path):
    path = scripted(network(Counts()), tmp_path / "n.pt")
    with pytest.raises(LoadError, match="can't hand it over") as caught:
        si.load(path, isolated=True)
    assert "`2` stays TorchScript" in caught.value.seen


class Prints(Counts):
    def forward(self, x):
        print("from the file")
        self.count = self.count + 1
        return x * self.scale


def test_what_stays_prints_nothing(tmp_path, capfd):
    loaded = si.load(scripted(network(Prints()), tmp_path / "n.pt"))
    loaded(IMAGES)
    assert type(loaded[2]).__name__ == "RecursiveScriptModule"
    assert "from the file" not in "".join(capfd.readouterr())
