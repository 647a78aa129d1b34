"""Methods that users call beside forward hold the blocks whose values they compute."""

import copy
import json
import pickle
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
from timm.models.densenet import DenseNet
from timm.models.vgg import VGG
from torch import nn

import se_inject as si
from se_inject.errors import LoadError
from se_inject.forwards import body_of, checked_class, original_class
from se_inject.loading.operators import check_vocabulary, named_in_text
from tests.common import outputs, randomise
from tests.networks.methods import Inherits, InTrainingAlone, Keywords, Nested, OneValueTwice, Own, Returned, Twice

IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


METHODS = {
    Nested: ["forward_features", "unit"],
    Keywords: ["encode", "unit"],
    Returned: ["encode", "unit"],
    Own: ["decode", "encode", "unit"],
    Inherits: ["encode"],
}


def plain(kind):
    torch.manual_seed(0)
    return randomise(kind()).eval()


def awake(model):
    """Give the blocks weights that do something."""
    for number, parameter in enumerate(si.injected_parameters(model)):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return model


def in_training(model, call):
    """The result of a call in training, norms aside."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(5)
    return call(model)


@pytest.mark.parametrize("kind", METHODS)
def test_what_a_user_calls_by_hand_is_what_forward_does(kind):
    network = plain(kind)
    plan = si.plan(network, IMAGE)
    assert not [note for note in plan.notes if "by itself" in note]
    model = plan.apply(network)
    verdict = si.verify(network, model, IMAGE).expect_passed()
    assert "`encode`" in str(verdict.checks[-1]) or "`forward_features`" in str(verdict.checks[-1])
    assert list(model.state_dict())[: len(network.state_dict())] == list(network.state_dict())
    awake(model)
    assert sorted(body_of(model)["methods"]) == METHODS[kind]
    assert torch.equal(model.by_hand(IMAGE), model(IMAGE))
    assert not torch.equal(model(IMAGE), network(IMAGE))
    assert torch.equal(in_training(model, lambda m: m(IMAGE)), in_training(model, lambda m: m.by_hand(IMAGE)))


@pytest.mark.parametrize("kind", METHODS)
def test_they_follow_when_the_network_is_fused_copied_stored_and_ejected(kind):
    network = plain(kind)
    model = awake(si.inject(network, IMAGE))
    expected = model.by_hand(IMAGE)
    assert torch.equal(pickle.loads(pickle.dumps(model)).by_hand(IMAGE), expected)
    fused = si.fuse_(copy.deepcopy(model))
    torch.testing.assert_close(fused.by_hand(IMAGE), expected)
    assert type(si.unfuse_(fused)) is type(model)
    assert torch.equal(fused.by_hand(IMAGE), expected)
    quick = si.for_inference(model, IMAGE)
    torch.testing.assert_close(quick.by_hand(IMAGE), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(quick.by_hand(IMAGE), quick(IMAGE))
    assert torch.equal(torch.compile(model, backend="eager").by_hand(IMAGE), expected)
    back = si.eject_(copy.deepcopy(model))
    assert type(back) is kind
    assert torch.equal(back.by_hand(IMAGE), network(IMAGE))


def test_blocks_that_come_later_join_those_that_are_there():
    network = plain(Nested)
    sites = [site.address for site in si.find_sites(network, IMAGE).all_sites]
    first = si.inject(network, IMAGE, at=sites[0])
    assert list(body_of(first)["methods"]) == ["forward_features"]
    second = awake(si.inject(first, IMAGE, at=sites[1]))
    assert torch.equal(second.forward_head(second.forward_features(IMAGE)), second(IMAGE))
    with si.disabled(second):
        assert torch.equal(second.forward_features(IMAGE), network.forward_features(IMAGE))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_files_have_them(tmp_path):
    model = awake(si.inject(plain(Nested), IMAGE))
    expected = model(IMAGE)
    assert torch.equal(torch.jit.script(model)(IMAGE), expected)
    for suffix in ("pt", "torchscript", "pt2", "onnx"):
        si.export(model, tmp_path / f"n.{suffix}", IMAGE)
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    (seen,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    torch.testing.assert_close(torch.from_numpy(seen), expected.detach(), rtol=1e-4, atol=1e-5)
    loaded = si.load(tmp_path / "n.pt", trust=["tests"])
    assert torch.equal(loaded.forward_features(IMAGE), model.forward_features(IMAGE))


def test_a_fresh_process_reads_the_network_before_its_class_was_ever_made(tmp_path):
    model = awake(si.inject(plain(Keywords), IMAGE))
    path = tmp_path / "n.pickle"
    path.write_bytes(pickle.dumps((model, IMAGE, model(IMAGE))))
    code = (
        "import pickle, sys, torch\n"
        "model, image, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(model.by_hand(image), expected)\n"
        "assert 'se_' in __import__('inspect').getsource(type(model).encode) + str(model)\n"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)


def test_other_arguments_than_those_observed_are_an_error():
    model = si.inject(plain(Keywords), IMAGE)
    with pytest.raises(RuntimeError, match=r"Keywords\.encode was edited for scale = 2\.0"):
        model.encode(IMAGE, scale=1.0)


# -- where it can't be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Twice, "its 2 calls do not compute the same with the same blocks"),
        (OneValueTwice, "it is given one value twice"),
        (InTrainingAlone, "it computes gated values in one mode alone"),
    ],
)
def test_a_method_that_can_not_hold_its_blocks_is_named_with_the_reason(kind, why):
    network = plain(kind)
    plan = si.plan(network, IMAGE, block="se")
    (note,) = [note for note in plan.notes if "`encode`" in note and "by itself" in note]
    assert why in note
    model = plan.apply(network)
    verdict = si.verify(network, model, IMAGE).expect_passed()
    assert [each for each in verdict.notes if "`encode`" in each]
    assert "encode" not in body_of(model).get("methods", {})


def test_verify_finds_a_method_that_has_lost_its_blocks():
    network = plain(Nested)
    model = awake(si.inject(network, IMAGE))
    vars(model)["unit"] = Nested.unit.__get__(model)
    assert not si.verify(network, model, IMAGE).passed
    (check,) = [check for check in si.verify(network, model, IMAGE).checks if check.name == "methods hold the blocks"]
    assert check.passed is False
    assert "does not call `se_" in check.detail


# -- timm ----------------------------------------------------------------------------------------------------

TIMM = {
    "resnet": lambda: timm.create_model("resnet10t"),
    "convnext": lambda: timm.create_model("convnext_atto"),
    "efficientnet": lambda: timm.create_model("efficientnet_lite0"),
    "densenet": lambda: DenseNet(growth_rate=16, block_config=(2, 3)),
    "vgg": lambda: VGG([16, "M", 32, "M", 512], num_classes=4, mlp_ratio=0.01),
}


@pytest.mark.parametrize("name", TIMM)
def test_features_and_head_of_timm(name):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    network = randomise(TIMM[name]()).eval()
    model = awake(si.inject(network, image))
    with torch.no_grad():
        features = model.forward_features(image)
        assert torch.equal(model.forward_head(features), model(image))
        assert torch.equal(network.forward_head(network.forward_features(image)), network(image))
        assert not torch.equal(features, network.forward_features(image))


# -- what a file may say --------------------------------------------------------------------------------------


def bodies(model):
    return original_class(model), body_of(model)


@pytest.mark.parametrize("name", ["load_state_dict", "train", "__init__", "_apply", "missing", "forward", 3])
def test_a_file_may_put_lines_only_where_the_author_has_a_method(name):
    original, body = bodies(si.inject(plain(Nested), IMAGE))
    methods = body["methods"]
    methods[name] = methods.pop("unit")
    with pytest.raises(LoadError):
        checked_class(original, json.dumps(body))


@pytest.mark.parametrize("name", ["load_state_dict", "forward_head", "by_hand", "apply", "__class__"])
def test_a_file_may_call_no_method_that_is_not_lines_too(name):
    original, body = bodies(si.inject(plain(Nested), IMAGE))
    for line in body["methods"]["forward_features"]:
        if line[0] == "own":
            line[2] = name
    with pytest.raises(LoadError, match="a line of kind `own`"):
        checked_class(original, json.dumps(body))


def test_operators_within_methods_are_looked_at_too():
    model = si.inject(plain(Nested), IMAGE)
    original, body = bodies(model)
    for line in body["methods"]["unit"]:
        if line[0] == "set" and line[2] == "torch:relu":
            line[2] = "torch:resize_as_sparse_"
    model.__class__ = checked_class(original, json.dumps(body))
    with pytest.raises(LoadError, match="resize_as_sparse_"):
        check_vocabulary(model)
    assert ("function", "torch:resize_as_sparse_") in named_in_text(json.dumps(body))


def test_outputs_are_the_networks_own_at_the_start():
    for kind in METHODS:
        network = plain(kind)
        for one, other in zip(outputs(network, IMAGE), outputs(si.inject(network, IMAGE), IMAGE), strict=True):
            assert torch.equal(one, other)
