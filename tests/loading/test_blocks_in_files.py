"""What the steps of an edited forward say of its blocks is checked, as a plan's and an adapter's steps are."""

import json
import sys
import zipfile

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import InjectError, LoadError, OptionError, UntrustedGlobals
from se_inject.forwards import body_of, generated_class, original_class
from se_inject.loading import inspect_file
from tests.files.hostile import archived, records, text, zipped
from tests.fuzz.run import peak_bytes

IMAGES = torch.zeros(1, 3, 16, 16)


def network():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return si.plan(net.eval(), IMAGES).apply(net)


def changed(**step):
    """An injected network whose steps say something else; None leaves a key out."""
    net = network()
    owner = next(module for module in net.modules() if body_of(module))
    body = body_of(owner)
    body["steps"][0] |= step
    body["steps"][0] = {key: value for key, value in body["steps"][0].items() if value != "LEFT OUT"}
    owner.__class__ = generated_class(original_class(owner), json.dumps(body))
    return net


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "net.pt"


RUNS = {
    "block": "dataclasses:_create_fn",
    "options": {"args": [], "body": ["'''"], "locals": {"a=__import__('os').mkdir('hit')):\n '''": 1}},
    "init": "paper",
}


@pytest.mark.parametrize("block", ["dataclasses:_create_fn", "os:system", "torch.hub:load", "evil.py:Net", "a:b"])
def test_no_network_names_code_as_its_block(block, path):
    torch.save(changed(**{**RUNS, "block": block}), path)
    for options in ({}, {"trust": ["mine"]}):
        with pytest.raises(UntrustedGlobals, match="code that a file may not name"):
            si.load(path, **options)
    assert f"{block}" in [named.name for named in inspect_file(path).refused]


def test_blocks_are_not_called_if_the_reader_were_wrong(path):
    """The steps of a network in this process: what would call them refuses on its own."""
    net = changed(**RUNS)
    with pytest.raises(InjectError):
        si.save_adapter(net, "x.safetensors")
    with pytest.raises(InjectError):
        si.plan_of(net).apply(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()))
    with pytest.raises(OptionError, match="a part of Python"):
        si.plan(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), IMAGES, at="*", block="dataclasses:_create_fn")
    assert not (path.parent / "hit").exists()


@pytest.mark.parametrize(
    "step",
    [
        {"block_name": "nothere"}, {"block_name": "__class__"}, {"site": 5}, {"site": "LEFT OUT"}, {"channels": -1},
        {"rank": 3}, {"size": "x"}, {"init": "x"}, {"options": []}, {"position": 1}, {"readers": [1]}, {"other": 1},
        {"block": 7}, {"stage": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_odd_steps_are_refused(step, path):
    try:
        torch.save(changed(**step), path)
    except AttributeError:
        pytest.skip("torch can't write that")
    with pytest.raises(LoadError):
        si.load(path)


BLOCK = """
from torch import nn

class Twice(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.scale(x)
"""


def test_a_network_with_a_block_of_ones_own(path, monkeypatch):
    (path.parent / "myblocks.py").write_text(BLOCK)
    monkeypatch.syspath_prepend(str(path.parent))
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    torch.save(si.inject(net, IMAGES, at="*", block="myblocks:Twice", init="paper"), path)
    with pytest.raises(UntrustedGlobals):
        si.load(path)
    found = si.load(path, trust=["myblocks"])
    assert si.plan_of(found).steps[0].block == "myblocks:Twice"
    si.save_adapter(found, "x.safetensors")
    sys.modules.pop("myblocks")


def test_text_that_unfolds_in_the_parser(path):
    data = (
        '{"class":"A","home":"b","inputs":[["x"]],"lines":[["let",["y"],[' + ",".join(["[]"] * 1_000_000)
        + ']],["return",{"node":"x"}]],"example":null}'
    ).encode()  # fmt: skip
    program = b"\x80\x02cse_inject.generated\nprogram\n" + text(data.decode()) + b"\x85R."
    path.write_bytes(zipped(records(archived(program)), compression=zipfile.ZIP_DEFLATED))
    peak_bytes()
    before = peak_bytes()
    with pytest.raises(LoadError, match="longer than any"):
        si.load(path)
    assert peak_bytes() - before < 256 << 20
