"""``se-inject export``: any network to any format, and what leads from training to the file."""

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import resnet18

import se_inject as si
from tests.cli.networks import SITES, SMALL, document, files, same
from tests.common import randomise


def trained(network, seed=3):
    """The network with all weights moved, those of its blocks too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return randomise(network).eval()


def in_onnxruntime(path, shape=(3, 3, 16, 16)):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return x, torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def right(path, network, shape=(3, 3, 16, 16)):
    x, seen = in_onnxruntime(path, shape)
    with torch.no_grad():
        torch.testing.assert_close(seen, network.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_plain_network_in_every_format(se_inject, tiny):
    outputs = ["x.onnx", "x.ts", "x.pt2", "x.pt"]
    done = se_inject("export", "tiny.pt", *SMALL, "--json", *(part for name in outputs for part in ("-o", name)))
    data = document(done.out)
    assert (data["model"], data["blocks"]) == ("Sequential", 0)
    assert [item["format"] for item in data["files"]] == ["onnx", "torchscript", "pt2", "pt"]
    assert all(item["checks"] for item in data["files"])
    right("x.onnx", tiny)
    assert same(tiny, si.load("x.pt"))
    assert not hasattr(si.load("x.pt").get_submodule("one.0"), "se")


def test_a_trained_injected_pickle(se_inject, tiny):
    network = trained(si.inject(tiny, torch.rand(2, 3, 16, 16)))
    torch.save(network, "trained.pt")
    outputs = ["x.onnx", "se.safetensors", "plan.json"]
    done = se_inject("export", "trained.pt", *SMALL, *(part for name in outputs for part in ("-o", name)))
    assert "Sequential from trained.pt, with 4 blocks in it" in done.out
    right("x.onnx", network)
    assert same(si.load_adapter(si.eject_(si.load("trained.pt")), "se.safetensors"), network)
    assert [step.site for step in si.Plan.load("plan.json").steps] == SITES


def test_a_plan_is_applied_before_trained_weights_are_loaded(se_inject, tiny):
    plan = si.plan(tiny, torch.rand(2, 3, 16, 16), block="eca", stages="2")
    plan.save("plan.json")
    network = trained(plan.apply(tiny))
    torch.save({"epoch": 3, "state_dict": network.state_dict()}, "trained.pth")
    given = ("--plan", "plan.json", *SMALL)
    se_inject("export", "nets.py:tiny", "--weights", "trained.pth", *given, "-o", "a.pt", "-o", "a.onnx")
    se_inject("export", "trained.pth", "--arch", "nets.py:tiny", *given, "-o", "b.pt")
    assert same(network, si.load("a.pt"))
    assert same(network, si.load("b.pt"))
    right("a.onnx", network)


def test_the_inputs_are_the_plan_s_and_inferred_ones_are_said(se_inject, tiny):
    plan = si.plan(tiny, torch.rand(2, 3, 24, 16))
    plan.save("plan.json")
    network = trained(plan.apply(tiny))
    torch.save(network.state_dict(), "trained.pth")
    weights = ("export", "nets.py:tiny", "--weights", "trained.pth")
    done = se_inject(*weights, "--plan", "plan.json", "-o", "a.onnx")
    assert "input batch×3×24×16" in done.out and "inferred" not in done.out
    done = se_inject(*weights, "--plan", "plan.json", "--input", "3x16x16", "-o", "b.onnx")
    assert "input batch×3×16×16" in done.out and "inferred" not in done.out
    done = se_inject("export", "nets.py:tiny", "-o", "c.onnx")
    assert "note: input inferred: 1 input of 2×3×224×224; --input takes another" in done.out
    done = se_inject(*weights, "-o", "d.onnx", code=1)
    assert "se-inject export MODEL --weights trained.pth --plan plan.json" in done.err


def test_a_zoo_network_takes_the_classes_of_trained_weights(se_inject):
    torch.manual_seed(0)
    plain = resnet18(num_classes=7)
    plan = si.plan(plain, torch.rand(2, 3, 64, 64), stages=[4])
    plan.save("plan.json")
    network = trained(plan.apply(plain))
    torch.save(network.state_dict(), "trained.pth")
    weights = ("torchvision:resnet18", "--weights", "trained.pth", "--input", "3x64x64")
    se_inject("export", *weights, "--plan", "plan.json", "-o", "x.pt")
    assert same(network, si.load("x.pt"), (2, 3, 64, 64))


def test_an_adapter_goes_onto_its_backbone(se_inject, tiny):
    network = si.inject(tiny, torch.rand(2, 3, 16, 16))
    for parameter in si.injected_parameters(network):
        nn.init.normal_(parameter, std=0.3)
    si.save_adapter(network, "se.safetensors")
    se_inject("export", "tiny.pt", "--adapter", "se.safetensors", *SMALL, "-o", "x.onnx", "-o", "x.pt")
    assert same(network, si.load("x.pt"))
    right("x.onnx", network)


BAD = {
    "a plan without weights": (("tiny.pt", "--plan", "plan.json", "-o", "x.pt"), 2, "give the trained network's"),
    "weights without blocks": (
        ("nets.py:tiny", "--plan", "plan.json", "--weights", "w.pt", *SMALL, "-o", "x.pt"), 1, "without blocks",
    ),
    "an adapter of nothing": (("tiny.pt", *SMALL, "-o", "x.safetensors"), 2, "holds blocks alone"),
    "a plan of nothing": (("tiny.pt", *SMALL, "-o", "x.json"), 2, "holds blocks alone"),
    "a plan and an adapter": (
        ("tiny.pt", "--plan", "plan.json", "--adapter", "a.safetensors", "-o", "x.pt"), 2, "leaves nothing to choose",
    ),
    "no output": (("tiny.pt",), 2, "Missing option '-o'"),
    "no such format": (("tiny.pt", "-o", "x.tflite"), 2, ".onnx"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_exported_is_said_and_nothing_written(se_inject, tiny, case):
    arguments, code, message = BAD[case]
    si.plan(tiny, torch.rand(2, 3, 16, 16)).save("plan.json")
    torch.save(tiny.state_dict(), "w.pt")
    before = files()
    done = se_inject("export", *arguments, code=code)
    assert message in done.err
    assert files() == before


def test_the_blocks_alone_hold_no_backbone(se_inject, tiny):
    se_inject("tiny.pt", *SMALL, "-o", "a.pt")
    se_inject("export", "a.pt", *SMALL, "-o", "se.safetensors")
    assert {name.split(".se.")[0] for name in load_file("se.safetensors")} == {s.rpartition(".")[0] for s in SITES}


def test_for_inference(se_inject, tiny):
    before = torch.load("tiny.pt", weights_only=False)
    injected = si.inject(before, torch.randn(2, 3, 32, 32))
    for parameter in si.injected_parameters(injected):
        torch.nn.init.normal_(parameter, 0, 0.3)
    torch.save(injected, "trained.pt")
    se_inject("export", "trained.pt", "--trust", "nets", "-o", "fast.pt", "--for-inference", "--input", "2x3x32x32")
    fast = torch.load("fast.pt", weights_only=False)
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in fast.modules())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), injected.eval()(x), rtol=1e-4, atol=1e-5)
    said = se_inject("export", "trained.pt", "--trust", "nets", "-o", "a.safetensors", "--for-inference", code=2).err
    assert "without --for-inference" in said
