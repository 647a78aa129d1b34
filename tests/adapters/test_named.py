"""Several adapters by name on one backbone: each as if it were alone, and nothing of the others is lost."""

import copy
import gc

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import se_inject as si
from se_inject.adapters import named
from se_inject.errors import AlreadyInjected, InjectError, OptionError, SurgeryError
from tests.common import randomise

X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
KINDS = {
    "birds": {"stages": [3, 4]},
    "cats": {"stages": [3, 4]},  # the same plan
    "dogs": {"stages": [1], "block": "bam", "position": "post"},
}


def resnet():
    torch.manual_seed(0)
    return randomise(torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).eval()


@pytest.fixture
def paths(tmp_path):
    for seed, (name, options) in enumerate(KINDS.items()):
        network = si.inject(resnet(), X, **options)
        generator = torch.Generator().manual_seed(seed)
        for parameter in si.injected_parameters(network):
            nn.init.normal_(parameter, std=0.3, generator=generator)
        for step in si.plan_of(network).steps:
            randomise(network.get_submodule(step.path), seed)
        si.save_adapter(network, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in KINDS}


@pytest.fixture
def loaded(paths):
    network = resnet()
    for name, path in paths.items():
        assert si.load_adapter_(network, path, name=name) is network
    return network


def answer(network):
    with torch.no_grad():
        return network(X)


def portrait(network):
    return [(name, type(module), id(module)) for name, module in network.named_modules()]


def test_each_is_as_if_it_were_alone(loaded, paths):
    alone = {name: si.load_adapter(resnet(), path) for name, path in paths.items()} | {None: resnet()}
    assert si.active_adapter(loaded) == "dogs"
    assert list(si.adapters_of(loaded)) == list(KINDS)
    for name in ["birds", "cats", "birds", None, "dogs", "cats", None, None, "cats"]:
        assert si.set_adapter_(loaded, name) is loaded
        assert si.active_adapter(loaded) == name
        assert list(loaded.state_dict()) == list(alone[name].state_dict())
        assert torch.equal(answer(loaded), answer(alone[name]))
    assert len({tuple(answer(network).flatten().tolist()) for network in alone.values()}) == 4


def test_the_same_plan_is_switched_without_looking(loaded, monkeypatch):
    si.set_adapter_(loaded, "birds")
    classes = [type(module) for module in loaded.modules()]
    monkeypatch.setattr(named, "eject_", pytest.fail)
    si.set_adapter_(loaded, "cats")
    assert [type(module) for module in loaded.modules()] == classes


def test_parameters_stay_the_same_objects_and_keep_what_they_learned(loaded):
    si.set_adapter_(loaded, "birds")
    birds = list(si.injected_parameters(loaded))
    optimizer = torch.optim.SGD(birds, lr=0.1, momentum=0.9)
    si.set_adapter_(loaded, "dogs")
    dogs = answer(loaded)
    si.set_adapter_(loaded, "birds")
    before = answer(loaded)
    loaded(X).square().mean().backward()
    optimizer.step()
    after = answer(loaded)
    assert not torch.equal(before, after)
    si.set_adapter_(loaded, "dogs")
    assert torch.equal(answer(loaded), dogs)
    si.set_adapter_(loaded, "birds")
    assert torch.equal(answer(loaded), after)
    assert all(one is other for one, other in zip(si.injected_parameters(loaded), birds, strict=True))


def test_mode_dtype_frozen_norms_and_random_numbers(loaded):
    si.set_adapter_(loaded, "birds")
    si.freeze_backbone_(loaded, batch_norm=True)
    loaded.train().double()
    drawn = torch.get_rng_state()
    si.set_adapter_(loaded, "dogs")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.dtype == torch.float64 for p in loaded.parameters())
    assert all(block.training for block in loaded.layer1[0].se.modules())
    assert si.trainable(loaded).frozen_norms == 12 and not loaded.bn1.training
    assert not loaded.conv1.weight.requires_grad
    si.set_adapter_(loaded, None)
    assert si.trainable(loaded).frozen_norms == 12


def test_the_active_one_is_saved_and_a_copy_has_no_names(loaded, tmp_path):
    si.set_adapter_(loaded, "cats")
    si.save_adapter(loaded, tmp_path / "again.safetensors")
    assert torch.equal(answer(si.load_adapter(resnet(), tmp_path / "again.safetensors")), answer(loaded))
    torch.save(loaded, tmp_path / "net.pt")
    for twin in (copy.deepcopy(loaded), si.load(tmp_path / "net.pt")):
        assert torch.equal(answer(twin), answer(loaded)) and si.adapters_of(twin) == {}
        with pytest.raises(SurgeryError, match="no adapter was loaded into this network by name"):
            si.set_adapter_(twin, "cats")
    del twin
    count = len(named._known)
    del loaded
    gc.collect()
    assert len(named._known) <= count


def test_one_is_removed(loaded):
    si.remove_adapter_(loaded, "birds")
    assert si.active_adapter(loaded) == "dogs" and list(si.adapters_of(loaded)) == ["cats", "dogs"]
    si.remove_adapter_(loaded, "dogs")
    assert si.active_adapter(loaded) is None
    assert torch.equal(answer(loaded), answer(resnet()))
    si.remove_adapter_(loaded, "cats")
    assert si.adapters_of(loaded) == {}


def test_mistakes_change_nothing(loaded, paths, tmp_path):
    other = torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5)
    si.save_adapter(si.inject(other, X), tmp_path / "other.safetensors")
    before = portrait(loaded)
    for call, error, match in [
        (lambda: si.load_adapter_(loaded, paths["cats"], name="cats"), OptionError, "already"),
        (lambda: si.load_adapter_(loaded, paths["cats"]), OptionError, "has adapters by name"),
        (lambda: si.load_adapter_(loaded, tmp_path / "other.safetensors", name="x"), SurgeryError, "another network"),
        (lambda: si.load_adapter_(loaded, tmp_path / "none.safetensors", name="x"), InjectError, "no file"),
        (lambda: si.set_adapter_(loaded, "cat"), OptionError, "no adapter `cat`"),
        (lambda: si.remove_adapter_(loaded, "cat"), OptionError, "no adapter `cat`"),
        (lambda: si.set_adapter_(resnet(), "cats"), SurgeryError, "by name"),
    ]:
        with pytest.raises(error, match=match):
            call()
        assert portrait(loaded) == before and si.active_adapter(loaded) == "dogs"


def test_an_adapter_that_cannot_be_put_in_leaves_the_active_one(loaded, paths, monkeypatch):
    expected = answer(loaded)

    def broken(self, model):
        raise SurgeryError("broken")

    monkeypatch.setattr("se_inject.adapters.files.Adapter.put_into_", broken)
    with pytest.raises(SurgeryError, match="broken"):
        si.load_adapter_(loaded, paths["cats"], name="again")
    assert si.active_adapter(loaded) == "dogs" and torch.equal(answer(loaded), expected)


def test_blocks_without_a_name_are_not_lost(loaded, paths):
    nameless = si.inject(resnet(), X, stages=[2])
    with pytest.raises(AlreadyInjected, match="belong to no adapter by name"):
        si.load_adapter_(nameless, paths["cats"], name="cats")
    si.inject(loaded, X, stages=[2])
    si.plan(loaded, X, stages=[2]).apply_(loaded)
    with pytest.raises(AlreadyInjected):
        si.set_adapter_(loaded, "cats")
    si.eject_(loaded)
    assert si.active_adapter(loaded) is None
    si.set_adapter_(loaded, "cats")
    assert si.active_adapter(loaded) == "cats"


def test_disabled_is_the_backbone(loaded):
    for name in ("cats", "dogs"):
        si.set_adapter_(loaded, name)
        with si.disabled(loaded):
            assert torch.equal(answer(loaded), answer(resnet()))
