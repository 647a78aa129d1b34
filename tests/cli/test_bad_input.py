"""What is said to bad input, and that nothing is written then."""

import errno
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import se_inject as si
from se_inject import atomic_files as _files
from se_inject.cli import entry as cli
from se_inject.cli import injecting
from tests.cli.networks import SMALL, files, same


class Payload:
    """Creates a file when it is unpickled by one who runs what a pickle says."""

    def __reduce__(self):
        return exec, ("open('payload_ran', 'w').close()",)


def empty(network):
    Path("bad.pt").touch()


def text(network):
    Path("bad.pt").write_text("these are not the weights you are looking for\n" * 9)


def truncated(network):
    data = Path("tiny.pt").read_bytes()
    Path("bad.pt").write_bytes(data[: len(data) * 2 // 3])


def poisoned(network):
    network.extra = Payload()
    torch.save(network, "bad.pt")


def poisoned_plain(network):
    Path("bad.pt").write_bytes(pickle.dumps([Payload()]))


def state_dict(network):
    torch.save(network.state_dict(), "bad.pt")


def checkpoint(network):
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, "bad.pt")


def safetensors(network):
    save_file(network.state_dict(), "bad.pt")


def other_weights(network):
    torch.save(nn.Linear(2, 2).state_dict(), "bad.pt")


def wrapped(network):
    network.add_module("inner", nn.DataParallel(nn.ReLU()))
    torch.save(network, "bad.pt")


def quantised(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.add_module("more", torch.ao.nn.quantized.ReLU6())
    torch.save(network, "bad.pt")


def folder(network):
    Path("bad.pt").mkdir()


def nothing(network):
    pass


TINY = ("tiny.pt", *SMALL)
BAD = {
    "no such file": (nothing, ("absent.pt",), 2, "no file `absent.pt`"),
    "nearly that file": (nothing, ("tinny.pt",), 2, "did you mean `tiny.pt`"),
    "a bare name": (nothing, ("resnet50",), 2, "torchvision:resnet50"),
    "empty": (empty, ("bad.pt",), 1, "an empty file"),
    "text": (text, ("bad.pt",), 1, "a text file"),
    "truncated": (truncated, ("bad.pt",), 1, "truncated, damaged"),
    "directory": (folder, ("bad.pt",), 1, "a directory"),
    "code in a pickle": (poisoned, ("bad.pt",), 1, "code that it may not use: `builtins.exec`"),
    "code in a plain pickle": (poisoned_plain, ("bad.pt",), 1, "`builtins.exec`"),
    "code in the weights": (poisoned_plain, ("nets.py:tiny", "--weights", "bad.pt"), 1, "no state dict"),
    "trust does not help code": (poisoned, ("bad.pt", "--trust", "builtins"), 2, "can't be trusted"),
    "a state dict": (state_dict, ("bad.pt",), 1, "se-inject bad.pt --arch"),
    "a checkpoint": (checkpoint, ("bad.pt",), 1, "se-inject bad.pt --arch"),
    "a safetensors file": (safetensors, ("bad.pt",), 1, "se-inject bad.pt --arch"),
    "DataParallel": (wrapped, ("bad.pt", *SMALL), 1, "pass `model.module`"),
    "quantised": (quantised, ("bad.pt",), 1, "inject first, then quantise"),
    "no convolution": (nothing, ("nets.py:mlp",), 1, "no convolution"),
    "no convolution, input given": (nothing, ("nets.py:mlp", "--input", "3x2x2"), 1, "no convolution"),
    "unknown network": (nothing, ("torchvision:resnet81",), 2, "did you mean `resnet18`"),
    "unknown package": (nothing, ("nowhere.at_all:net",), 2, "no module `nowhere`"),
    "unknown callable": (nothing, ("nets.py:tny",), 2, "did you mean `tiny`"),
    "unknown code file": (nothing, ("knots.py:tiny",), 2, "no file `knots.py`"),
    "code that fails": (nothing, ("nets.py:explodes",), 1, "ValueError: no luck today"),
    "code that gives no network": (nothing, ("nets.py:number",), 1, "no torch.nn.Module"),
    "a web address": (nothing, ("https://example.org/net.pt",), 1, "download it"),
    "other weights": (other_weights, ("nets.py:tiny", "--weights", "bad.pt"), 1, "unexpected: `weight`, `bias`"),
    "no weights": (nothing, ("nets.py:tiny", "--weights", "absent.pt"), 2, "no file `absent.pt`"),
    "no such stage": (nothing, (*TINY, "--stages", "7"), 2, "no stage matches `7`"),
    "no such path": (nothing, (*TINY, "--stages", "three"), 2, "no stage matches `three`"),
    "one stage of two": (nothing, (*TINY, "--stages", "1,3"), 2, "no stage matches `3`"),
    "no stage": (nothing, (*TINY, "--stages", ""), 2, "matches nothing"),
    "no such site": (nothing, (*TINY, "--at", "twoo.*"), 2, "did you mean `two.*`"),
    "no such expression": (nothing, (*TINY, "--at", "re:three.*"), 2, "no site matches `re:three.*`"),
    "no expression": (nothing, (*TINY, "--at", "re:(("), 2, "not a regular expression"),
    "r = 0": (nothing, (*TINY, "--r", "0"), 2, "must be positive"),
    "r < 0": (nothing, (*TINY, "--r", "-4"), 2, "must be positive"),
    "r = inf": (nothing, (*TINY, "--r", "inf"), 2, "must be positive and finite"),
    "r = inf as a setting": (nothing, (*TINY, "--set", "reduction=inf"), 2, "must be positive and finite"),
    "r = inf in a grid": (nothing, ("cost", *TINY, "--r", "4,inf"), 2, "must be positive and finite"),
    "r = 0 in a grid": (nothing, ("cost", *TINY, "--r", "4,0,2"), 2, "must be positive and finite"),
    "a ratio set in a grid": (nothing, ("cost", *TINY, "--set", "reduction=4"), 2, "--r 4,8,16"),
    "ratios of a block without": (nothing, ("cost", *TINY, "--block", "eca", "--r", "4"), 2, "no option `reduction`"),
    "no such stage of a grid": (nothing, ("cost", *TINY, "--stages", "1", "--stages", "7"), 2, "no stage matches `7`"),
    "no stage of a grid": (nothing, ("cost", *TINY, "--stages", ""), 2, "no stage matches ``"),
    "a plot in no format": (nothing, ("cost", *TINY, "--plot", "x.gif"), 2, ".svg"),
    "a plot over a file": (nothing, ("cost", *TINY, "--plot", "there.png"), 1, "`there.png` exists"),
    "blocks on nothing": (nothing, ("blocks", "--on", "absent.pt"), 2, "no file `absent.pt`"),
    "r = nan": (nothing, (*TINY, "--r", "nan"), 2, "must be positive"),
    "divisor = 0": (nothing, (*TINY, "--divisor", "0"), 2, "at least 1"),
    "unknown block": (nothing, (*TINY, "--block", "eka"), 2, "did you mean `eca`"),
    "unknown option of a block": (nothing, (*TINY, "--block", "eca", "--set", "kernl=3"), 2, "did you mean `kernel`"),
    "option of another block": (nothing, (*TINY, "--block", "eca", "--r", "4"), 2, "no option `reduction`"),
    "option without a value": (nothing, (*TINY, "--set", "reduction"), 2, "key=value"),
    "option of another type": (nothing, (*TINY, "--set", "divisor=many"), 2, "can't be `many`"),
    "unknown value": (nothing, (*TINY, "--set", "gate=sigmiod"), 2, "did you mean `sigmoid`"),
    "width beside r": (nothing, (*TINY, "--r", "4", "--set", "width=8"), 2, "given twice"),
    "no shape": (nothing, ("tiny.pt", "--input", "3x"), 2, "3x224x224"),
    "a rejected input": (nothing, ("nets.py:Picky", *SMALL), 1, "forty pixels, no more and no less (nets.py:"),
    "no input found": (nothing, ("nets.py:Picky",), 1, "forty pixels"),
    "too many inputs": (nothing, (*TINY, *SMALL), 1, "takes 2 positional arguments but 3 were given"),
    "a block where an attribute is": (nothing, (*TINY, "--name", "conv1"), 1, "--name"),
    "no name": (nothing, (*TINY, "--name", "2nd"), 2, "`2nd`"),
    "no directory": (nothing, (*TINY, "-o", "no/where.onnx"), 1, "does not exist"),
    "a file for a directory": (nothing, (*TINY, "-o", "nets.py/x.onnx"), 1, "is not a directory"),
    "a directory for a file": (folder, (*TINY, "-o", "bad.pt"), 1, "it is a directory"),
    "the same file twice": (nothing, (*TINY, "-o", "x.pt", "-o", "x.pt"), 2, "x.pt, x.pt"),
    "unknown suffix": (nothing, (*TINY, "-o", "x.tflite"), 2, ".onnx"),
    "no GPU": (nothing, (*TINY, "-o", "x.pt", "--device", "cuda"), 1, "torch finds none here"),
    "no device": (nothing, (*TINY, "-o", "x.pt", "--device", "abacus"), 2, "abacus"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_with_a_hint_and_nothing_is_written(se_inject, tiny, case, monkeypatch):
    make, arguments, code, message = BAD[case]
    if case == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make(tiny)
    Path("there.png").touch()
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "__pycache__" not in path.parts}
    done = se_inject(*arguments, code=code)
    assert done.err.startswith("error: ")
    assert message in done.err
    assert "\nhint: " in done.err
    after = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "__pycache__" not in path.parts}
    assert after == before
    assert "wrote" not in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage"),
        (("tiny.pt", "--stage", "1"), "--stages"),
        (("tiny.pt", "--r", "many"), "not a valid float"),
        (("tiny.pt", "--position", "up"), "conv3x3"),
        (("tiny.pt", "--dtype", "int8"), "float16"),
        (("tiny.pt", "--format", "xml"), "markdown"),
        (("tiny.pt", "tiny.pt"), "unexpected extra argument"),
        (("sites",), "MODEL"),
        (("cost",), "MODEL"),
        (("cost", "tiny.pt", "--r", "4,many"), "4,8,16"),
        (("cost", "tiny.pt", "--at", "two.*"), "--at"),
        (("sites", "tiny.pt", "--r", "4"), "--r"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_command_is_exit_code_2(se_inject, tiny, arguments, message):
    done = se_inject(*arguments, code=2)
    assert message in done.err + done.out
    assert files() == {"tiny.pt"}


def test_a_reduction_above_the_channels_works_and_is_noted(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL, "--r", "24", "-o", "x.pt")
    assert (
        "note: r = 24 is too much for the 16 to 32 channels of some sites: the bottleneck is 4 wide there" in done.out
    )
    injected = si.load("x.pt")
    assert {injected.get_submodule(step.path).width for step in si.plan_of(injected).steps} == {4}
    assert same(tiny, injected)


def test_weights_that_are_no_numbers_are_warned_of(se_inject):
    done = se_inject("nets.py:ill", *SMALL, "-o", "x.pt")
    assert "warning" in done.out
    assert "NaN" in done.out
    assert files() == {"x.pt"}
    assert "NaN" in se_inject("nets.py:ill", *SMALL, "-o", "y.pt", "--json").err


def test_a_dry_run_warns_of_weights_that_are_no_numbers(se_inject):
    done = se_inject("nets.py:ill", *SMALL, "--dry-run")
    assert "NaN" in done.out + done.err


@pytest.mark.parametrize("name", ["x.pt", "x.ts", "x.pt2", "x.onnx"])
def test_a_full_disk_leaves_nothing_behind(se_inject, tiny, name, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "replace", full)
    done = se_inject("tiny.pt", *SMALL, "-o", name, code=1)
    assert "no space left" in done.err
    assert "hint:" in done.err
    assert files() == {"tiny.pt"}


def test_an_interrupt_is_exit_code_130(se_inject, tiny, monkeypatch):
    from se_inject.exporting import outputs as exporting

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "write_networks", interrupted)
    done = se_inject("tiny.pt", *SMALL, code=130)
    assert done.err.strip() == "interrupted"
    assert files() == {"tiny.pt"}


def test_a_fault_of_our_own_is_told_as_one(tiny, monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(injecting, "planned_blocks", broken)
    monkeypatch.setattr(sys, "argv", ["se-inject", "tiny.pt"])
    monkeypatch.delenv("SE_INJECT_TRACEBACK", raising=False)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in told
    assert "SE_INJECT_TRACEBACK" in told
    assert "Traceback" not in told
    monkeypatch.setenv("SE_INJECT_TRACEBACK", "1")
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
        cli.main()
