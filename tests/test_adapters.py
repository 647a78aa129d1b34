"""Adapters: bit-exact there and back, the right backbone or a word about it, and no half-applied one."""

import copy
import json
import os
import pickle
import warnings

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import se_inject as si
from se_inject.adapters import BackboneWarning, fingerprint, read_adapter
from se_inject.blocks import registry as blocks
from se_inject.errors import (
    AlreadyInjected,
    ExportError,
    InjectError,
    LoadError,
    OptionError,
    SurgeryError,
    UnsupportedModel,
    UntrustedGlobals,
)
from tests.common import randomise

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def resnet(kind=BasicBlock, **options):
    """The same network each time."""
    torch.manual_seed(0)
    return randomise(torchvision.models.ResNet(kind, [1, 1, 1, 1], **options)).eval()


def trained(network, **options):
    """A copy with blocks whose weights and buffers no new block has."""
    injected = si.inject(network, X, **({"stages": [3, 4]} | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in si.plan_of(injected).steps:
            for tensor in injected.get_submodule(step.path).state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return injected


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(one, other):
    return list(one) == list(other) and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.fixture
def network():
    return resnet()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "se.safetensors"


def untouched(network):
    """A check, for later, that a network is as it is now."""
    before, kinds = state(network), [type(module) for module in network.modules()]
    return lambda: same_state(state(network), before) and [type(m) for m in network.modules()] == kinds


# -- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"block": "bam"}, {"block": "eca"}, {"position": "pre"}], ids=str)
def test_there_and_back_is_bit_exact(network, path, options):
    injected = trained(network, **options)
    si.save_adapter(injected, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    unchanged = untouched(network)
    again = si.load_adapter(network, path)
    assert unchanged()
    assert same_state(state(again), state(injected))
    assert si.plan_of(again).steps == si.plan_of(injected).steps
    with torch.no_grad():
        assert torch.equal(again(X), injected(X))
        assert not torch.equal(again(X), network(X))
    assert si.load_adapter_(network, path, strict=True) is network
    assert same_state(state(network), state(injected))


def test_a_chain_and_a_pickle_of_what_is_loaded(network, path):
    plan = si.plan(network, X, stages=[4]) + si.plan(network, X, stages=[3, 4], block="cbam")
    injected = plan.apply(network)
    with torch.no_grad():
        for parameter in si.injected_parameters(injected):
            parameter.uniform_(-1, 1)
    si.save_adapter(injected, path)
    again = pickle.loads(pickle.dumps(si.load_adapter(network, path)))
    with torch.no_grad():
        assert torch.equal(again(X), injected(X))


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.to(memory_format=torch.channels_last)])
def test_dtype_and_memory_format_of_the_backbone(path, change):
    network = change(resnet())
    injected = trained(network)
    si.save_adapter(injected, path)
    again = si.load_adapter(network, path, strict=True)
    assert same_state(state(again), state(injected))
    for one, other in zip(again.parameters(), injected.parameters(), strict=True):
        assert one.stride() == other.stride()


def test_only_the_blocks_are_in_the_file(network, path):
    injected = trained(network)
    si.save_adapter(injected, path)
    tensors = load_file(path)
    added = injected.state_dict().keys() - network.state_dict().keys()
    assert tensors.keys() == added
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["se_inject_adapter"])
    assert [step["block_name"] for step in content["plan"]["steps"]] == ["se", "se"]


def test_the_same_blocks_give_the_same_bytes(network, path):
    injected = trained(network)
    files = set()
    for _ in range(8):
        si.save_adapter(injected, path, force=True)
        files.add(path.read_bytes())
    assert len(files) == 1


def test_an_adapter_of_resnet50_is_a_tenth_of_it(path):
    network = torchvision.models.resnet50()
    injected = si.inject(network, X)
    si.save_adapter(injected, path)
    torch.save(network.state_dict(), path.with_suffix(".pt"))
    weights = 4 * sum(p.numel() for p in si.injected_parameters(injected))
    assert weights == 4 * 2_530_992
    assert weights < os.path.getsize(path) < weights + 50_000
    assert os.path.getsize(path) < 0.1 * os.path.getsize(path.with_suffix(".pt"))


def test_more_blocks_beside_some_that_are_there(network, path):
    si.save_adapter(trained(network, stages=[3]), path)
    other = si.inject(network, X, stages=[4])
    both = si.load_adapter(other, path, strict=True)
    assert [step.path for step in si.plan_of(both).steps] == ["layer3.0.se", "layer4.0.se"]
    with pytest.raises(AlreadyInjected):
        si.load_adapter(both, path)


# -- the right backbone ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: torchvision.models.mobilenet_v2(), "a MobileNetV2"),
        (lambda: resnet(Bottleneck), "`layer1.0.conv1.weight` of shape (64, 64, 1, 1), not (64, 64, 3, 3)"),
        (lambda: resnet(num_classes=10), "`fc.weight` of shape (10, 512), not (1000, 512)"),
        (
            lambda: torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1]),
            "`layer1.1.conv1.weight` is in this network only",
        ),
        (lambda: without(resnet(), "fc"), "`fc.weight` is in the adapter only"),
    ],
    ids=["class", "unit", "classes", "deeper", "no head"],
)
def test_another_network_is_refused(network, path, make, seen):
    si.save_adapter(trained(network), path)
    other = make()
    unchanged = untouched(other)
    with pytest.raises(SurgeryError, match="made for another network: a ResNet") as caught:
        si.load_adapter_(other, path)
    assert caught.value.seen == seen
    assert caught.value.hint
    assert unchanged()


def without(network, name):
    setattr(network, name, nn.Identity())
    return network


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.conv1.weight[0, 0, 0, 0].add_(1e-6), "1 of its 74 tensors, `conv1.weight` the first"),
        (lambda m: m.conv1.weight.neg_(), "1 of its 74 tensors, `conv1.weight` the first"),
        (lambda m: m.bn1.num_batches_tracked.add_(1), "all of them statistics of batch normalisation"),
        (lambda m: m.half(), "of its 74 tensors, `conv1.weight` the first"),
    ],
    ids=["one number", "sign", "statistics", "dtype"],
)
def test_other_weights_are_warned_of_or_refused(network, path, change, told):
    injected = trained(network)
    si.save_adapter(injected, path)
    assert len(fingerprint(network)) == len(network.state_dict()) == 74
    with torch.no_grad():
        change(network)
    unchanged = untouched(network)
    with pytest.raises(SurgeryError, match="with other weights") as caught:
        si.load_adapter_(network, path, strict=True)
    assert told in caught.value.seen
    assert unchanged()
    with pytest.warns(BackboneWarning, match=r"se\.safetensors.*other weights") as warned:
        again = si.load_adapter(network, path)
    assert told in str(warned[0].message)
    assert warned[0].filename == __file__
    for step in si.plan_of(injected).steps:
        ours, theirs = (state(net.get_submodule(step.path)) for net in (again, injected))
        assert all(torch.equal(ours[key], theirs[key].to(ours[key].dtype)) for key in theirs)


def test_the_same_numbers_in_another_layout_are_the_same_weights(network, path):
    si.save_adapter(trained(network), path)
    si.load_adapter(network.to(memory_format=torch.channels_last), path, strict=True)


def test_a_network_that_holds_a_module_under_two_names(path):
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = resnet()
            self.encoder, self.head = self.base.layer3, nn.Conv2d(256, 3, 1)

        def forward(self, x):
            base = self.base
            x = base.layer2(base.layer1(base.maxpool(base.relu(base.bn1(base.conv1(x))))))
            return self.head(self.encoder(x))

    network = UNet().eval()
    injected = trained(network, stages=None)
    si.save_adapter(injected, path)
    again = si.load_adapter(network, path, strict=True)
    assert same_state(state(again), state(injected))


def test_networks_that_are_wrapped_have_no_adapter(network, path):
    average = torch.optim.swa_utils.AveragedModel(trained(network))
    with pytest.raises(UnsupportedModel, match="an average of weights") as caught:
        si.save_adapter(average, path)
    assert "`model.module`" in caught.value.hint
    assert not path.exists()
    si.save_adapter(average.module, path)


# -- files that are none, or hostile -----------------------------------------------------------------------


def forged(path, change):
    """The adapter's file written anew with other tensors or content."""
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["se_inject_adapter"])
    tensors = load_file(path)
    changed = change(tensors, content)
    text = changed if isinstance(changed, str) else json.dumps(content)
    save_file(tensors, path, {"se_inject_adapter": text})


def recorded(**values):
    return lambda tensors, content: content.update(values)


def replanned(**values):
    return lambda tensors, content: content["plan"]["steps"][0].update(values)


HOSTILE = {
    "no content": (lambda tensors, content: "", LoadError, "damaged adapter"),
    "content of another kind": (lambda tensors, content: "[1]", LoadError, "damaged adapter"),
    "deep content": (lambda tensors, content: "[" * 100_000, LoadError, "damaged adapter"),
    "no version": (lambda tensors, content: content.pop("version") and None, LoadError, "damaged adapter"),
    "no plan": (recorded(plan=None), LoadError, "not a plan"),
    "a plan of something else": (recorded(plan=[[]]), LoadError, "not a plan"),
    "a later plan": (recorded(plan={"se_inject_plan": 2}), LoadError, "version 2"),
    "a later adapter": (recorded(version=2), LoadError, "adapter of version 2"),
    "no fingerprint": (recorded(backbone={}), SurgeryError, "another network"),
    "a damaged fingerprint": (recorded(backbone={"a": 3}), LoadError, "damaged adapter"),
    "a shape without end": (recorded(backbone={"w": [[float("inf")], "f", "d"]}), LoadError, "damaged adapter"),
    "a list for a fingerprint": (recorded(backbone=[]), LoadError, "damaged adapter"),
    "code": (replanned(block="os:system"), UntrustedGlobals, "`os:system` is code"),
    "an unknown block": (replanned(block="eka"), InjectError, "step 1 of the plan: no block"),
    "another site": (replanned(site="layer9"), SurgeryError, "puts a block at `layer9`"),
    "other channels": (replanned(channels=64), LoadError, "step 1 needs"),
    "a huge bottleneck": (replanned(options={"reduction": 1e-3}), LoadError, "step 1 needs"),
    "one that is too wide": (
        replanned(options={"reduction": 1e-9}),
        OptionError,
        "step 1 of the plan: the bottleneck is too wide",
    ),
    "a place that is taken": (replanned(block_name="conv1"), LoadError, "step 1 needs"),
    "a tensor missing": (
        lambda tensors, content: tensors.pop("layer4.0.se.fc1.bias"),
        LoadError,
        "needs `layer4.0.se.fc1.bias`",
    ),
    "a tensor too many": (
        lambda tensors, content: tensors.update({"fc.bias": torch.ones(3)}),
        LoadError,
        "belongs to no block",
    ),
    "a tensor of another shape": (
        lambda tensors, content: tensors.update({"layer4.0.se.fc1.bias": torch.ones(3)}),
        LoadError,
        "needs `layer4.0.se.fc1.bias` of shape (32,)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_forged_adapter_changes_nothing(network, path, case):
    change, error, message = HOSTILE[case]
    si.save_adapter(trained(network), path)
    forged(path, change)
    unchanged = untouched(network)
    with pytest.raises(error) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", BackboneWarning)
        si.load_adapter_(network, path)
    assert message in caught.value.message
    assert caught.value.hint
    assert unchanged()


@pytest.mark.parametrize("case", ["missing", "folder", "empty", "text", "truncated", "weights", "header"])
def test_files_that_are_no_adapter(network, path, case):
    si.save_adapter(trained(network), path)
    whole = path.read_bytes()
    path.unlink()
    if case == "folder":
        path.mkdir()
    elif case == "weights":
        save_file(network.state_dict(), path)
    elif case != "missing":
        path.write_bytes(
            {"empty": b"", "text": b"hello " * 9, "truncated": whole[:-9], "header": b"\xff" * 8 + whole[8:]}[case]
        )
    unchanged = untouched(network)
    with pytest.raises(LoadError, match=r"se\.safetensors") as caught:
        si.load_adapter_(network, path)
    assert caught.value.hint
    assert unchanged()


def test_a_block_that_fails_while_it_is_filled_leaves_the_network_alone(network, path, monkeypatch):
    class Moody(blocks.SqueezeExcitation):
        broken = False

        def load_state_dict(self, *args, **kwargs):
            if self.broken:
                raise RuntimeError("not today")
            return super().load_state_dict(*args, **kwargs)

    monkeypatch.setitem(blocks._registered, "moody", Moody)
    si.save_adapter(trained(network, block="moody"), path)
    Moody.broken = True
    unchanged = untouched(network)
    with pytest.raises(InjectError, match=r"block `moody` can't be put into `layer3.0`") as caught:
        si.load_adapter_(network, path)
    assert "not today" in caught.value.seen
    assert unchanged()


def test_what_can_not_be_saved(network, path):
    with pytest.raises(SurgeryError, match="no block"):
        si.save_adapter(network, path)
    injected = trained(network)
    with pytest.raises(UnsupportedModel):
        si.save_adapter(nn.DataParallel(injected), path)
    with pytest.raises(ExportError, match="can't be stored"):
        si.save_adapter(copy.deepcopy(injected).to("meta"), path)
    assert not list(path.parent.iterdir())
    path.write_text("old")
    with pytest.raises(ExportError, match="exists"):
        si.save_adapter(injected, path)
    assert path.read_text() == "old"
    si.save_adapter(injected, path, force=True)
    assert read_adapter(path).plan.model == "ResNet"


def test_trust_reaches_the_plan(network, path, tmp_path):
    (tmp_path / "adapted_gates.py").write_text(
        "from se_inject.blocks.registry import SqueezeExcitation\nclass Gate(SqueezeExcitation):\n    pass\n"
    )
    place = f"{tmp_path}/adapted_gates.py"
    si.save_adapter(trained(network, block=f"{place}:Gate"), path)
    with pytest.raises(UntrustedGlobals):
        si.load_adapter(network, path)
    assert type(si.load_adapter(network, path, trust=[place]).layer4[0].se).__name__ == "Gate"
