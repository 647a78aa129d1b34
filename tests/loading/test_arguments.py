"""Arguments of operators that end the process: refused where a file's forward has them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import se_inject as si
from se_inject.errors import LoadError
from se_inject.forwards import program

IMAGES = torch.rand(2, 3, 16, 16)


def module_of(*lines, inputs=("x",)):
    data = {"class": "A", "home": "b", "inputs": [[name] for name in inputs], "example": None}
    module = program(json.dumps({**data, "lines": [*lines, ["return", {"node": "y"}]]}))
    nn.Module.__init__(module)
    return module


def call(name, *args, **kwargs):
    return ["set", ["y"], f"ops:aten.{name}", [{"node": "x"}, *args], kwargs]


def roi_align(*numbers):
    return ["set", ["y"], "ops:torchvision.roi_align.default", [{"node": "x"}, {"node": "x"}, *numbers, True], {}]


FATAL = {
    "a dtype": [call("to.dtype", 2**31 - 1)],
    "a negative one": [call("sum.default", dtype=-2)],
    "one by its place": [call("softmax.int", 1, 64)],
    "of a packet": [call("softmax", 1, 64)],
    "a layout": [call("zeros_like.default", layout=2)],
    "a memory format": [call("to.other", {"node": "x"}, memory_format=4)],
    "a size of numbers": [call("view.dtype", 64)],
    "one that is computed": [["let", ["n"], 64], call("view.dtype", {"node": "n"})],
    "one that is an input": [call("view.dtype", {"node": "x"})],
    "one that is set twice": [
        ["attribute", ["n"], {"node": "x"}, "dtype"],
        ["if", {"training": True}, [["let", ["n"], 64]], []],
        call("view.dtype", {"node": "n"}),
    ],
    "nothing to convert to": [call("to.prim_Device", None, None)],
    "numbers alone": [["set", ["y"], "ops:aten.remainder.int", [1, 0], {}]],
    "no statistics": [call("_native_batch_norm_legit.no_stats", None, None, False, 0.1, 1e-5)],
    "a scale that is none": [roi_align({"float": "nan"}, 2, 2, 2)],
    "a huge grid": [roi_align(1.0, 2**30, 2, 2)],
    "a huge number of samples": [roi_align(1.0, 2, 2, 2**30)],
    "within a branch": [["let", ["y"], 1], ["if", {"training": True}, [call("to.dtype", 64)], []]],
}


@pytest.mark.parametrize("case", FATAL)
def test_a_file_may_not_say(case, tmp_path):
    torch.save(module_of(*FATAL[case]), tmp_path / "a.pt")
    with pytest.raises(LoadError):
        si.load(tmp_path / "a.pt")


SOUND = {
    "a dtype": ([call("to.dtype", {"dtype": "float64"})], lambda x: x.double()),
    "its number": ([call("to.dtype", 7)], lambda x: x.double()),
    "a tensor's own": (
        [["attribute", ["n"], {"node": "x"}, "dtype"], call("to.dtype", {"node": "n"})],
        lambda x: x,
    ),
    "a constant that is named": (
        [["let", ["n"], {"dtype": "float16"}], call("to.dtype", {"node": "n"})],
        lambda x: x.half(),
    ),
    "a dtype behind others": ([call("softmax.int", 1, {"dtype": "float64"})], lambda x: x.softmax(1, torch.float64)),
    "none": ([call("sum.default", dtype=None)], lambda x: x.sum()),
    "a memory format": ([call("clone.default", memory_format={"memory_format": "channels_last"})], lambda x: x),
    "a tensor and a number": ([call("remainder.Scalar", 2)], lambda x: x % 2),
}


@pytest.mark.parametrize("case", SOUND)
def test_a_file_may_say(case, tmp_path):
    lines, expected = SOUND[case]
    torch.save(module_of(*lines), tmp_path / "a.pt")
    assert torch.equal(si.load(tmp_path / "a.pt")(IMAGES), expected(IMAGES))


def test_boxes_of_sound_numbers(tmp_path):
    boxes = torch.tensor([[0.0, 1, 2, 9, 8], [1, 0, 0, 4, 4]])
    lines = [
        ["set", ["y"], "ops:torchvision.roi_align.default", [{"node": "x"}, {"node": "boxes"}, 0.5, 7, 7, 2, True], {}]
    ]
    torch.save(module_of(*lines, inputs=("x", "boxes")), tmp_path / "a.pt")
    wanted = torchvision.ops.roi_align(IMAGES, boxes, 7, 0.5, 2, aligned=True)
    assert torch.equal(si.load(tmp_path / "a.pt")(IMAGES, boxes), wanted)


def test_calls_that_end_a_process_end_none_as_programs():
    """A part of `tests/fuzz/operators.py`: calls that died when the operator was called as it is."""
    script = Path(__file__).parent.parent / "fuzz" / "operators.py"
    command = [sys.executable, script, "--calls", "30", "--only", "sum", "to", "view", "zeros_like"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    died, left = (int(re.search(rf"(\d+)\*{{0,2}} {words} process", said)[1]) for words in ("ended their", "end their"))
    assert died > 5 and left == 0, said
