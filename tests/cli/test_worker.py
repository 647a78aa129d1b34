"""The command as a user starts it: in a process without torch, so that the work is done in a confined fork."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import se_inject as si

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a network in it, whose own temporary folder can be looked into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    torch.save(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)), "net.pt")
    return tmp_path


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(Path("tmp").resolve()), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "se_inject", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def run(*arguments, code=0, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    assert list(Path("tmp").iterdir()) == []
    return out, err


def files():
    return {path.name for path in Path().iterdir()} - {"tmp"}


def test_a_file_is_read_injected_verified_and_written_in_confinement(folder):
    out, err = run("net.pt", "--at", "*", "--input", "3x16x16", "-o", "a.pt", "-o", "a.onnx", "--json", "-v")
    assert files() == {"net.pt", "a.pt", "a.onnx"}
    data = json.loads(out)
    assert data["verification"]["passed"]
    assert [item["bytes"] for item in data["files"]] == [Path("a.pt").stat().st_size, Path("a.onnx").stat().st_size]
    assert err.startswith("confined, with at most ")
    assert len(si.plan_of(si.load("a.pt"))) == len(data["plan"])


def test_errors_and_exit_codes_come_through(folder):
    out, err = run("absent.pt", code=2)
    assert (out, err.splitlines()[0]) == ("", "error: no file `absent.pt`")
    _, err = run("net.pt", "--r", "0", code=2)
    assert err.startswith("error: the reduction r must be positive")
    Path("bad.pt").write_bytes(b"PK\3\4 nothing more")
    _, err = run("sites", "bad.pt", code=1)
    assert "hint:" in err


def test_a_file_size_limit_is_told_and_leaves_nothing(folder):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    _, err = run("net.pt", "--at", "*", "--input", "3x16x16", "-o", "a.pt", code=1, preexec_fn=limited)
    assert "could not write `a.pt`" in err
    assert "ulimit -f" in err
    assert files() == {"net.pt"}


def test_memory_that_runs_out_is_told_with_the_step(folder):
    def limited():
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))

    _, err = run("net.pt", "--at", "*", "--input", "3x16000x16000", "-o", "a.pt", code=1, preexec_fn=limited)
    assert re.match(r"error: memory ran out while \w+.*\nseen: this process may take 3.0 GiB\n", err)
    assert files() == {"net.pt"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly(folder, number, code):
    process = start("net.pt", "--at", "*", "--input", "3x16x16", "-o", "a.pt")
    deadline = time.monotonic() + 60
    while not any(Path("tmp").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "interrupted\n" if code == 130 else "terminated\n")
    assert files() == {"net.pt"}
    assert list(Path("tmp").iterdir()) == []


def test_of_two_with_the_same_output_one_wins_whole(folder):
    processes = [start("net.pt", "--at", "*", "--input", "3x16x16", "-o", "a.pt", "--r", r) for r in (2, 4)]
    codes = [(process.communicate(timeout=120), process.returncode)[1] for process in processes]
    assert sorted(codes) == [0, 1]
    assert files() == {"net.pt", "a.pt"}
    (r,) = {step.options["reduction"] for step in si.plan_of(si.load("a.pt")).steps}
    assert r == (2, 4)[codes.index(0)]


def test_code_of_ones_own_is_not_confined(folder):
    Path("nets.py").write_text(
        "from torch import nn\n"
        "def make():\n    open('mine', 'w').close()\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())\n"
    )
    _, err = run("sites", "nets.py:make", "--input", "3x16x16", "-v")
    assert "not confined: `nets.py:make` is code of yours" in err
    assert "mine" in files()
