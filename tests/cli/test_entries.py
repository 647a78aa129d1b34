"""``--entry``, and the notes about what was taken from a checkpoint and what was left out."""

import json

import pytest
import torch

import se_inject as si


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """``last.pt`` with two states of the tiny network; the second is returned too."""
    ema = si.load("nets.py:tiny").eval()
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.fill_(0.25)
    torch.save({"model": tiny, "ema": ema, "epoch": 3}, tmp_path / "last.pt")
    return tiny, ema


def holds(path, model):
    found = si.load(path).state_dict()
    return all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_entry(se_inject, checkpoint, tmp_path):
    tiny, ema = checkpoint
    said = "`--entry ema` takes another"
    ran = se_inject("last.pt", "-o", "a.pt")
    assert "note: `last.pt` holds `model`, `ema`: `model` is taken; " + said in ran.out
    assert holds(tmp_path / "a.pt", tiny)
    assert said not in se_inject("last.pt", "--entry", "ema", "-o", "b.pt").out
    assert holds(tmp_path / "b.pt", ema)
    for command in (["sites"], ["cost"], ["draw", "-o", "a.svg"], ["export", "-o", "c.pt"]):
        assert (
            f"note: `last.pt` holds `model`, `ema`: `model` is taken; {said}"
            in se_inject(command[0], "last.pt", *command[1:]).err
        )
    assert any(said in note for note in json.loads(se_inject("last.pt", "--dry-run", "--json").out)["notes"])
    assert any(said in note for note in json.loads(se_inject("sites", "last.pt", "--json").out)["notes"])
    ran = se_inject("last.pt", "--entry", "emma", "-o", "d.pt", code=2)
    assert "has no entry `emma`" in ran.err
    assert "networks and weights are under `model`, `ema`" in ran.err
    assert not (tmp_path / "d.pt").exists()


def test_weights_under_a_prefix_with_others_beside(se_inject, tiny, tmp_path):
    state = {f"_forward_module.{key}": value for key, value in tiny.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(3)}}, tmp_path / "w.ckpt")
    ran = se_inject("nets.py:tiny", "--weights", "w.ckpt", "-o", "a.pt")
    assert "note: of `w.ckpt` what is under `_forward_module.` is taken, and 1 key left out: `loss.weight`" in ran.out
    assert holds(tmp_path / "a.pt", tiny)
