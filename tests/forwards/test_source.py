"""The text of a generated forward is checked before it is compiled, and its frames are like any other's."""

import ast
import builtins
import traceback
import warnings

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import LoadError
from se_inject.forwards import program_module
from se_inject.forwards.source import check_text, compiled

SCOPE = {"torch": torch, "_plain": lambda value: value}


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))


def generated():
    program = program_module("N", "n", [["x"]], [["return", {"node": "x"}]])
    injected = si.inject(nn.Sequential(nn.Conv2d(3, 8, 3), Unit()), torch.rand(2, 3, 8, 8))
    return program, injected[1]


def test_frames_have_the_builtins_of_python():
    for module in generated():
        assert type(module).forward.__globals__["__builtins__"] in (builtins, vars(builtins))


def test_generated_text_names_little_of_python():
    for module in generated():
        names = set(type(module).forward.__code__.co_names)
        assert not names & (
            vars(builtins).keys() - {"RuntimeError", "float", "getattr", "len", "range", "slice", "tuple"}
        )


@pytest.mark.parametrize(
    "line",
    [
        "return eval",
        "return __builtins__",
        "return __import__('os')",
        "import os",
        "from os import system",
        "global x; x = 1",
        "return x.__class__",
        "return getattr(x, '__class__')",
        "return getattr(x, y)",
        "return getattr(x, 'a', x)",
        "return getattr(*x)",
        "return getattr(x, **y)",
        "return lambda: x",
        "return [x for x in y]",
        "return (yield x)",
        "return f'{x}'",
        "return x if y else x",
        "class A: pass",
        "del x",
        "with x: pass",
        "try:\n        pass\n    except x:\n        pass",
        "while x: pass",
        "def g(): pass",
        "return (x := y)",
        "assert x",
        "__builtins__ = x",
        "return open(x)",
        "return vars(x)",
        "print(x)",
        "async def f(): pass",
    ],
)
def test_texts_that_are_refused(line):
    with pytest.raises(LoadError):
        compiled(f"def forward(self, x, y):\n    {line}\n", "<refused>", dict(SCOPE))


@pytest.mark.parametrize(
    "text", ["x = 1", "@torch.x\ndef forward(self): pass", "def forward(self): pass\ndef other(self): pass", ""]
)
def test_modules_that_are_no_forward(text):
    with pytest.raises(LoadError):
        check_text(ast.parse(text), SCOPE)


@pytest.mark.parametrize("text", ["def forward(self, x=open): pass", "def forward(self, x: open): pass"])
def test_defaults_and_annotations_are_checked(text):
    with pytest.raises(LoadError, match="`open`"):
        check_text(ast.parse(text), SCOPE)


class Masked(Unit):
    def forward(self, x):
        y = torch.relu(x + self.bn(self.conv(x)))
        y = y.masked_fill(y > 0.3, float("-inf")).clamp(max=float("inf"))
        return torch.where((y - 0.05).abs() < 0.05, torch.full_like(y, float("nan")), y)


@pytest.mark.parametrize("door", ["eager", "scripted", "exported"])
def test_constants_that_are_infinite_or_no_number(door, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(2, 8, 8, 8)
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Masked()).eval()
    expected = network(images)
    assert expected.isinf().any() and expected.isnan().any()
    if door == "scripted":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(network).save(str(tmp_path / "n.pt"))
    elif door == "exported":
        torch.export.save(torch.export.export(network, (images,)), tmp_path / "n.pt2")
    loaded = network if door == "eager" else si.load(next(tmp_path.iterdir()))
    for found in (loaded, si.inject(loaded, images)):
        assert _same(found(images), expected)


def _same(one, other):
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def test_tracebacks_show_the_generated_lines():
    source = "def forward(self, x):\n    y = torch.relu(x)\n    return y.size(len(y) + 7)\n"
    forward = compiled(source, "<se_inject a test>", dict(SCOPE))
    try:
        forward(None, torch.ones(2))
    except IndexError as error:
        assert "return y.size(len(y) + 7)" in "".join(traceback.format_exception(error))
    else:
        pytest.fail("no error")
