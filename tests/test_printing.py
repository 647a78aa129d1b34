"""Values print as the command line prints them, and hints speak the caller's language."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import se_inject as si
from se_inject.cost import cost_lines, cost_text
from se_inject.errors import LoadError, OptionError, either, hints_for_command
from se_inject.exporting import exported_lines
from se_inject.sites import stages_text
from se_inject.verification import verdict_lines

IMAGES = torch.rand(2, 3, 32, 32)


@pytest.fixture(scope="module")
def network():
    return resnet18().eval()


@pytest.fixture(scope="module")
def values(network, tmp_path_factory):
    plan = si.plan(network, IMAGES, stages=[4])
    injected = plan.apply(network)
    return {
        "sites": si.find_sites(network, IMAGES),
        "cost": plan.cost(),
        "verdict": si.verify(network, injected, IMAGES),
        "exported": si.export(injected, tmp_path_factory.mktemp("files") / "x.pt", IMAGES),
        "grid": si.cost_grid(network, IMAGES, reductions=[4, 16]),
        "plan": plan,
        "trainable": si.trainable(si.freeze_backbone_(injected)),
        "gates": (gates := si.excitations(injected, [IMAGES])),
        "compared": si.compare(network, injected, [IMAGES]),
        "pruned": si.prune_blocks_(copy.deepcopy(injected), gates, tolerance=1.0, batches=[IMAGES]),
        "fused": si.fused(si.fuse_(injected)),
    }


def test_they_print_what_the_command_prints(values):
    assert str(values["sites"]).startswith(stages_text(values["sites"]))
    assert str(values["cost"]) == cost_text(values["cost"]) + "\n\n" + "\n".join(cost_lines(values["cost"]))
    assert str(values["verdict"]) == "\n".join(verdict_lines(values["verdict"]))
    assert str(values["exported"]) == "\n".join(exported_lines(values["exported"]))


def test_their_reprs_are_short_and_say_something(values):
    reprs = {name: repr(value) for name, value in values.items()}
    assert reprs["sites"] == "<Sites: 8 of 9 sites chosen, in 4 stages>"
    assert reprs["cost"] == "<CostReport: 2 blocks, 66,624 parameters (+0.57 %)>"
    assert reprs["verdict"] == "<Verdict: 6 of 6 checks passed>"
    assert reprs["plan"] == "<Plan: 2 blocks (se) for ResNet>"
    assert reprs["grid"] == "<CostGrid: se on ResNet, 12 cells>"
    assert reprs["trainable"] == "<Trainable: 66,624 of 11,756,136 parameters>"
    assert reprs["gates"] == "<Excitations: 2 blocks of ResNet on 2 examples>"
    assert reprs["compared"] == "<Compared: ResNet and ResNet on 2 examples, outputs differ by 0>"
    assert reprs["pruned"] == "<Pruned: 2 of 2 blocks dropped>"
    assert reprs["fused"] == "<Fused: 2 of 2 blocks with what is behind>"
    assert reprs["exported"].endswith("x.pt, 47.1 MB, whole module>")
    assert all("\n" not in text and len(text) < 200 for text in reprs.values())


def test_a_failed_check_is_in_the_repr(network):
    other = resnet18().eval()
    assert "FAILED: weights kept" in repr(si.verify(network, si.inject(other, IMAGES), IMAGES))


@pytest.mark.parametrize("name", [
    "sites", "cost", "verdict", "exported", "grid", "plan", "trainable", "gates", "compared", "pruned", "fused",
])  # fmt: skip
def test_notebooks_show_the_same(values, name):
    text = values[name]._repr_html_()
    assert "<pre>" in text and text.endswith("</pre>")
    assert "<script" not in text


def failing(call):
    with pytest.raises((LoadError, OptionError, LookupError)) as caught:
        call()
    return str(caught.value)


def test_a_hint_is_in_the_language_of_the_caller(network, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(network.state_dict(), path)
    torch.save(nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "own.pth")
    calls = {
        lambda: si.load(path): ("--arch torchvision:resnet18", "arch='torchvision:resnet18'"),
        lambda: si.load(path, arch="torchvision:resnet34"): ("`--arch torchvision:resnet18`", "si.load('torchvision:resnet18'"),
        lambda: si.load(tmp_path / "own.pth"): ("--arch FILE.py:CLASS", "si.load_weights_(model, "),
        lambda: si.plan(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))): ("--input 3x224x224", "example_inputs="),
    }  # fmt: skip
    for call, (command, python) in calls.items():
        assert python in failing(call)
        assert "--" not in failing(call)
        with hints_for_command():
            assert command in failing(call)
            assert python not in failing(call)
    assert either("--force", "force=True") == "force=True"


def test_usual_slips_are_answered(network, tmp_path):
    assert "did you mean `reduction`?" in failing(lambda: si.plan(network, r=8))
    for shape in ((3, 64, 64), [1, 3, 64, 64], torch.Size([1, 3, 64, 64])):
        assert "torch.rand(" in failing(lambda shape=shape: si.plan(network, shape))
        assert "torch.rand(" in failing(lambda shape=shape: si.verify(network, network, shape))
    assert "did you mean" in failing(lambda: si.export(network, tmp_path / "x.onx", IMAGES))
    assert "x.onnx" in failing(lambda: si.export(network, tmp_path / "x.onx", IMAGES))
