"""The command in a folder of its own, and the networks that its tests are about."""

import sys
import types
import warnings

import pytest
import torch

import se_inject as si
from se_inject.cli import entry as cli
from se_inject.errors import ExportError
from tests.cli.networks import NETS


@pytest.fixture
def se_inject(tmp_path, monkeypatch, capsys):
    """Run the command in an empty directory that holds ``nets.py``; no run may end in a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["se-inject", *map(str, arguments)])
        capsys.readouterr()
        returned = 0
        with warnings.catch_warnings():
            try:
                cli.main()
            except SystemExit as ending:
                returned = ending.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "should not have happened" not in err, err
        assert returned == code, err
        return types.SimpleNamespace(out=out, err=err)

    yield run
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def tiny(se_inject, tmp_path):
    """The tiny network, and a file ``tiny.pt`` with it. In it no weight is what a new network would have."""
    network = si.load("nets.py:tiny").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator), alpha=0.05)
    torch.save(network, tmp_path / "tiny.pt")
    return network


@pytest.fixture
def onnx_fails(monkeypatch):
    """What is exported to ONNX fails when all else is done."""
    from se_inject.exporting import exporter

    real = exporter._export_one

    def failing(reference, target, path):
        if target.suffix == ".onnx":
            raise ExportError(f"no luck with {target}")
        return real(reference, target, path)

    monkeypatch.setattr(exporter, "_export_one", failing)
