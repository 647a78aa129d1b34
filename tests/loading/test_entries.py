"""Weights under a prefix with others beside them, and checkpoints with several entries: what is taken, and what is said."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

import se_inject as si
from se_inject.errors import LoadError, OptionError
from se_inject.loading.architectures import architectures_of
from tests.common import randomise


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomise(model, seed=seed)


def under(prefix, module):
    return {prefix + key: value for key, value in module.state_dict().items()}


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


@pytest.mark.parametrize(
    "prefix", ["net.", "backbone.", "_forward_module.", "module.", "_forward_module.module._orig_mod.student.body."]
)
def test_any_prefix(prefix, path):
    trained, model = network(1), network(2)
    torch.save({"state_dict": under(prefix, trained)}, path)
    si.load_weights_(model, path)  # a warning would be an error here
    assert same(model, trained)
    torch.save({**under(prefix, trained), "loss.weight": torch.ones(3), "steps": torch.ones(1)}, path)
    model = network(2)
    with pytest.warns(si.WeightsWarning, match=r"2 keys left out: `loss.weight`, `steps`") as warned:
        si.load_weights_(model, path)
    assert f"`{prefix}`" in str(warned[0].message)
    assert warned[0].filename == __file__
    assert same(model, trained)


def test_the_longest_prefix_with_all_keys(path):
    outer, inner, model = network(1), network(2), network(3)
    torch.save({**under("", outer), **under("ema.module.", inner)}, path)
    with pytest.warns(si.WeightsWarning, match="`ema.module.` is taken.*no prefix would fit too"):
        si.load_weights_(model, path)
    assert same(model, inner)
    part = under("a.much.longer.", inner)
    part.pop("a.much.longer.3.bias")
    torch.save({**under("net.", outer), **part}, path)
    with pytest.warns(si.WeightsWarning, match="`net.` is taken"):
        si.load_weights_(model, path)
    assert same(model, outer)


def test_others_that_would_fit_are_named(path):
    model = network(3)
    torch.save({**under("teacher.", network(1)), **under("net.", network(2))}, path)
    with pytest.warns(si.WeightsWarning, match="`teacher.` is taken.*`net.` would fit too"):
        si.load_weights_(model, path)
    assert same(model, network(1))


def test_foreign_keys_under_the_prefix_are_refused(path):
    """They are of a network of this kind that has more in it."""
    model = network(3)
    before = copy.deepcopy(model)
    for more in ("net.extra", "net.4.weight"):
        torch.save({**under("net.", network(1)), more: torch.ones(1), "loss.weight": torch.ones(1)}, path)
        with pytest.raises(LoadError, match=f"1 unexpected: `{more[4:]}`"):
            si.load_weights_(model, path)
    torch.save({key: value for key, value in under("net.", network(1)).items() if key != "net.0.weight"}, path)
    with pytest.raises(LoadError, match=r"1 missing: `0\.weight`"):
        si.load_weights_(model, path)
    assert same(model, before)


def test_the_number_of_classes_under_any_prefix(path):
    trained = torchvision.models.resnet18(num_classes=7)
    torch.save({"state_dict": {**under("backbone.", trained), "head.weight": torch.ones(2)}}, path)
    notes = []
    assert same(si.load("torchvision:resnet18", weights=path, notes=notes), trained)
    assert [note.partition("what is")[2] for note in notes] == [
        " under `backbone.` is taken, and 1 key left out: `head.weight`"
    ]
    assert "torchvision:resnet18" in architectures_of(under("_forward_module.net.", trained))


ENTRIES = {
    "networks": lambda model, ema: {"model": model, "ema": ema, "epoch": 3},
    "weights": lambda model, ema: {
        "ema": under("module.", ema),
        "model": model.state_dict(),
        "optimizer": {"state": {}},
    },
    "deeper": lambda model, ema: {"epoch": 3, "state": {"ema": ema.state_dict(), "model": model.state_dict()}},
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_which_entry_is_taken(kind, path):
    model, ema = network(1), network(2)
    torch.save(ENTRIES[kind](model, ema), path)
    (tmp := path.with_name("mine.py")).write_text(
        "from torch import nn\n\n\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))\n"
    )
    given = {"source": path} if kind == "networks" else {"source": f"{tmp}:net", "weights": path}
    start = "state." if kind == "deeper" else ""
    notes = []
    assert same(si.load(**given, notes=notes), model)
    assert len(notes) == 1
    assert f"`{start}model` is taken; `entry='{start}ema'` takes another" in notes[0]
    assert same(si.load(**given, entry=f"{start}ema", notes=notes), ema)
    assert same(si.load(**given, entry=f"{start}model", notes=notes), model)
    assert len(notes) == 1, "who chose isn't told"
    loaded = network(3)
    si.load_weights_(loaded, path, entry=f"{start}ema")
    assert same(loaded, ema)
    for wrong in ("EMA", "epoch", ""):
        with pytest.raises(OptionError, match=f"has no entry `{wrong}`") as caught:
            si.load(**given, entry=wrong)
        assert f"`{start}model`" in caught.value.seen
        assert f"`{start}ema`" in caught.value.seen


def test_several_under_names_of_their_own(path):
    torch.save({"student": network(1), "teacher": network(2)}, path)
    with pytest.raises(LoadError) as caught:
        si.load(path)
    assert "`entry`" in caught.value.hint
    assert same(si.load(path, entry="teacher"), network(2))


def test_files_and_names_without_entries(path):
    torch.save(network(1), path)
    with pytest.raises(OptionError, match="has no entry `ema`"):
        si.load(path, entry="ema")
    with pytest.raises(OptionError, match="has no entries"):
        si.load("torchvision:resnet18", entry="ema")
    program = path.with_name("model.torchscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network(1).eval()).save(program)
    with pytest.raises(OptionError, match="has no entries"):
        si.load(program, entry="ema")


def test_one_entry_is_not_worth_a_note(path):
    torch.save({"model": None, "ema": network(1), "optimizer": {"state": {}}}, path)
    notes = []
    assert same(si.load(path, notes=notes), network(1))
    assert notes == []


def test_notes_of_a_process_of_its_own(path):
    model = torchvision.models.resnet18()
    other = torchvision.models.resnet18()
    state = {**under("net.", model), "loss.weight": torch.ones(2)}
    torch.save({"model": state, "ema": other.state_dict()}, path)
    notes = []
    assert same(si.load("torchvision:resnet18", weights=path, isolated=True, notes=notes), model)
    assert len(notes) == 2
    assert "`model` is taken" in notes[0]
    assert "1 key left out: `loss.weight`" in notes[1]
    assert same(si.load("torchvision:resnet18", weights=path, isolated=True, entry="ema"), other)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_weights_of_the_network_without_its_blocks_are_loaded_before_these_are_put_in(prefix, path):
    x = torch.rand(2, 3, 16, 16)
    injected = si.inject(network(2), x)
    torch.save(under(prefix, network(1)), path)
    before = copy.deepcopy(injected)
    with pytest.raises(LoadError) as error:
        si.load_weights_(injected, path)
    assert "load the weights into the network first" in error.value.hint
    assert same(injected, before)
    torch.save(dict(list(network(1).state_dict().items())[1:]), path)
    with pytest.raises(LoadError) as error:
        si.load_weights_(injected, path)
    assert "first" not in error.value.hint
