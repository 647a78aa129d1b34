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
from se_inject.forwards import body_of, check_forward, checked_class, original_class
from se_inject.loading.operators import check_vocabulary, named_in_text
from tests.common import outputs, randomise
from tests.networks.methods import (
    BothDoors,
    Inherits,
    InTrainingAlone,
    Keywords,
    Nested,
    OneValueTwice,
    Options,
    Own,
    Returned,
    Twice,
    TwoMethods,
    TwoMethodsOfANetwork,
    WithNeck,
    WithOptions,
    WithoutForward,
    Wrapper,
)

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


@pytest.mark.parametrize("call", [{"mask": torch.ones(1)}, {"return_all": True}])
def test_a_method_for_other_arguments_says_what_to_do_and_that_helps(call):
    network = plain(Options)
    plan = si.plan(network, IMAGE)
    start = "`forward_features` has `se_bn1` for the `mask`, `return_all` that `forward` calls it with; "
    assert any(note.startswith(start) for note in plan.notes)
    (name,) = call
    with pytest.raises(RuntimeError, match=f"{name}.*`si.inject` a module whose forward calls this method so"):
        plan.apply(network).forward_features(IMAGE, **call)
    model = awake(si.inject(plain(WithOptions), IMAGE))
    assert [step.path for step in si.plan_of(model).steps] == ["net.se"]
    first, last = model.net.forward_features(IMAGE, IMAGE[:, :1], return_all=True)
    branch = model.net.bn1(model.net.conv1(first))
    assert torch.equal(last, torch.relu(first + model.net.se(branch)) * IMAGE[:, :1])
    assert torch.equal(last, model(IMAGE))


def test_a_second_method_of_a_child_is_named_with_the_plan_that_holds_it():
    network = plain(TwoMethodsOfANetwork)
    (note,) = (note for note in si.plan(network, IMAGE).notes if "by itself" in note)
    assert note.startswith("called by itself, `net.deep` runs without `se`")
    assert note.endswith("; a plan for `net` as a network by itself has them in its methods")
    plan = si.plan(network.net, IMAGE)
    assert not [note for note in plan.notes if "by itself" in note]
    network.net = net = awake(plan.apply(network.net))
    x = torch.rand(2, 16, 8, 8)
    block = net.get_submodule(plan.steps[1].path)
    assert torch.equal(net.deep(x), block(torch.relu(net.short(x) + net.bn2(net.conv2(x)))))
    assert torch.equal(network(IMAGE), net.deep(net.encode(IMAGE)))


# -- methods of a child ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "child", "method"),
    [
        (Wrapper, "net", "forward_features"),
        (WithNeck, "net", "forward_features"),
        (BothDoors, "net", "forward_features"),
        (WithoutForward, "coder", "encode"),
    ],
)
def test_a_method_of_a_child_holds_the_blocks_of_the_child(kind, child, method):
    network = plain(kind)
    plan = si.plan(network, IMAGE)
    assert not [note for note in plan.notes if "by itself" in note]
    assert f"{child}.se" in [step.path for step in plan.steps]
    model = plan.apply(network)
    verdict = si.verify(network, model, IMAGE).expect_passed()
    assert f"`{child}.{method}`" in str(verdict.checks[-1])
    awake(model)
    before, after = network.get_submodule(child), model.get_submodule(child)
    assert not torch.equal(getattr(after, method)(IMAGE), getattr(before, method)(IMAGE))
    if child == "net":
        assert torch.equal(after.fc(after.forward_features(IMAGE).mean((2, 3))), after(IMAGE))
    expected = outputs(model, IMAGE)
    copies = [
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        si.unfuse_(si.fuse_(copy.deepcopy(model))),
        torch.compile(model, backend="eager"),
    ]
    for other in copies:
        assert all(map(torch.equal, outputs(other, IMAGE), expected))
    for other in (si.fuse_(copy.deepcopy(model)), si.for_inference(model, IMAGE)):
        for one, two in zip(outputs(other, IMAGE), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    back = si.eject_(copy.deepcopy(model))
    assert [type(module) for module in back.modules()] == [type(module) for module in network.modules()]
    assert all(map(torch.equal, outputs(back, IMAGE), outputs(network, IMAGE)))


def test_the_child_keeps_its_blocks_when_it_leaves_its_wrapper():
    network = plain(Wrapper)
    model = awake(si.inject(network, IMAGE))
    alone = pickle.loads(pickle.dumps(model.net))
    assert torch.equal(alone.forward_features(IMAGE), model.net.forward_features(IMAGE))
    assert si.plan_of(alone, IMAGE).steps[0].path == "se"
    more = si.inject(WithNeck().eval().requires_grad_(True), IMAGE)
    more.net = model.net
    assert torch.equal(more.net.forward_features(IMAGE), model.net.forward_features(IMAGE))


def test_a_file_of_a_network_that_calls_a_childs_method(tmp_path):
    model = awake(si.inject(plain(WithNeck), IMAGE))
    si.export(model, tmp_path / "n.pt", IMAGE)
    loaded = si.load(tmp_path / "n.pt", trust=["tests"])
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    for name in ("net.load_state_dict", "net.missing", "norm.forward_features", "net._apply", "net.unit.__call__"):
        body = body_of(model)
        changed = json.loads(json.dumps(body).replace('"net.forward_features"', json.dumps(name)))
        with pytest.raises(LoadError):
            other = copy.deepcopy(model)
            other.__class__ = checked_class(original_class(model), json.dumps(changed))
            check_forward(other, trusted=True)


def test_a_method_of_a_child_that_is_no_data_needs_trust():
    other = awake(si.inject(plain(WithNeck), IMAGE, at="norm*"))
    assert body_of(other.net) is None
    check_forward(other, trusted=True)
    with pytest.raises(LoadError, match=r"calls `net\.forward_features`, which is not a method that it may call"):
        check_forward(other)


def test_of_two_methods_of_a_child_the_other_is_named():
    network = plain(TwoMethods)
    plan = si.plan(network, IMAGE)
    assert [note for note in plan.notes if "`coder.decode` runs without" in note]
    model = awake(plan.apply(network))
    assert [note for note in si.verify(network, model, IMAGE).notes if "`coder.decode` runs without" in note]


def test_blocks_put_in_through_the_method_and_through_forward_meet():
    network = plain(Wrapper)
    network.net = awake(si.inject(network.net, IMAGE))
    model = si.inject(network, IMAGE, attended=True)
    assert [step.owner for step in si.plan_of(model).steps] == ["net", "net"]
    si.verify(network, model, IMAGE).expect_passed()
    awake(model)
    assert not torch.equal(model.net.forward_features(IMAGE), network.net.forward_features(IMAGE))
    assert torch.equal(model.net.fc(model.net.forward_features(IMAGE).mean((2, 3))), model.net(IMAGE))


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
