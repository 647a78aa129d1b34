"""``load(…, isolated=True)``: the network of the file, read by another process; its death is an error here."""

import os
import sys

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import se_inject as si
from se_inject.errors import InjectError, LoadError, OptionError, WorkerError
from se_inject.isolation import call_isolated
from se_inject.loading import isolated
from tests.common import outputs, randomise, same_state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


@pytest.mark.parametrize("form", ["pickled", "injected", "exported"])
def test_the_network_comes_back(tmp_path, form):
    network = randomise(small()).eval()
    x = torch.rand(2, 3, 16, 16)
    path = tmp_path / "net.pt"
    if form == "exported":
        torch.export.save(torch.export.export(network, (x,)), path)
    else:
        torch.save(si.inject(network, x, at="*") if form == "injected" else network, path)
    found = si.load(path, isolated=True)
    assert same_state(found, si.load(path))
    assert torch.equal(outputs(found.eval(), x)[0], outputs(network, x)[0])


def test_errors_come_back_as_what_they_are(tmp_path):
    torch.save(small().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(LoadError, match="file of weights") as caught:
        si.load(tmp_path / "weights.pt", isolated=True)
    assert "arch=" in caught.value.hint
    with pytest.raises(FileNotFoundError):
        si.load(tmp_path / "absent.pt", isolated=True)
    for options in ({"trust": "mine"}, {"mmap": True}):
        with pytest.raises(OptionError, match="isolated"):
            si.load(tmp_path / "weights.pt", isolated=True, **options)
    with pytest.raises(OptionError, match="code of yours"):
        si.load("mine.py:net", isolated=True)


def test_weights_of_a_named_network_are_read_there(tmp_path):
    network = randomise(resnet18())
    torch.save(network.state_dict(), tmp_path / "w.pt")
    assert same_state(si.load("torchvision:resnet18", weights=tmp_path / "w.pt", isolated=True), network)


def test_a_death_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "falls.py").write_text(
        "import ctypes\nfrom se_inject.progress import step\n"
        "def now(path, what):\n"
        "    step('reading net.pt')\n"
        "    if what == 'crash': ctypes.string_at(0)\n"
        "    if what == 'escape': open(what, 'w')\n"
        "    raise what\n"
    )
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir())
    with pytest.raises(WorkerError, match="died while reading"):
        call_isolated("falls:now", {"what": "crash"}, tmp_path / "x.pt", readable=[tmp_path])
    with pytest.raises(InjectError, match="Permission denied"):
        call_isolated("falls:now", {"what": "escape"}, tmp_path / "x.pt", readable=[tmp_path])
    assert set(os.listdir()) - before <= {"__pycache__"}
    assert "falls" not in sys.modules


def test_nothing_is_imported_from_the_current_folder(tmp_path, monkeypatch):
    """A stranger's file may come in a folder with modules that are called like Python's own, or torch."""
    torch.save(small(), tmp_path / "net.pt")
    for name in ("json", "contextlib", "selectors", "ctypes", "numpy", "torch", "sitecustomize", "se_inject"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'HIT')!r}, 'a').write({name!r}); raise ImportError")
    monkeypatch.chdir(tmp_path)
    for path in (sys.path, ["", *sys.path]):  # of a script elsewhere; of a session that was begun here
        monkeypatch.setattr(sys, "path", path)
        assert isinstance(si.load("net.pt", isolated=True), nn.Sequential)
    assert not (tmp_path / "HIT").exists()


def test_what_comes_back_is_no_larger_than_a_network(tmp_path, monkeypatch):
    torch.save(small(), tmp_path / "net.pt")
    code = tmp_path / "code"
    code.mkdir()
    (code / "grows.py").write_text(
        "import os\ndef now(path, **_): open(path, 'wb').close(); os.truncate(path, 2 << 30)\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(code)])

    def taken_over(function, arguments, output, **limits):
        return call_isolated("grows:now", {}, output, **limits)

    monkeypatch.setattr(isolated, "call_isolated", taken_over)
    with pytest.raises(InjectError, match="could not write") as caught:
        si.load(tmp_path / "net.pt", isolated=True)
    assert "limit on the size of files" in str(caught.value)
