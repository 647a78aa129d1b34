"""What `inspect_file` says of files, and that it makes nothing of them."""

import json
import os

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import LoadError
from se_inject.loading import inspect_file
from se_inject.user_code import NoSuchFile
from tests.files.hostile import CONTAINERS, HIT, PAYLOADS, Reduced, saved, small
from tests.fuzz.mutations import MAKERS, mutated, original


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model.pt"


@pytest.fixture
def nothing_is_made(monkeypatch):
    """No module, tensor or class of a network comes into being."""
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Sequential):
        for name in ("__init__", "__setstate__"):
            monkeypatch.setattr(kind, name, lambda *args, **kwargs: pytest.fail("a module was made"))
    monkeypatch.setattr(torch._utils, "_rebuild_tensor", lambda *args: pytest.fail("a tensor was made"))


@pytest.mark.parametrize("kind", MAKERS)
def test_sound_files(kind, path):
    path.write_bytes(original(kind))
    found = inspect_file(path)
    assert found.damaged is None and found.size == len(original(kind))
    assert found.refused == () or kind in ("checkpoint",)
    assert json.loads(json.dumps(found.data()))["form"] == found.form
    assert str(path) in str(found)


@pytest.mark.parametrize("writer", ["zip", "plain"])
def test_names_of_a_pickle(writer, path, nothing_is_made):
    path.write_bytes(original(writer))
    names = {named.name: named for named in inspect_file(path).names}
    conv = names["torch.nn.modules.conv.Conv2d"]
    assert (conv.kind, conv.use, conv.verdict, conv.count) == ("class", "made", "allowed", 2)
    assert "network class of torch" in conv.by
    assert names["torch._utils._rebuild_parameter"].use == "called"


def test_operators_of_a_stored_forward(path):
    path.write_bytes(original("program"))
    names = {named.name: named.verdict for named in inspect_file(path).names if named.kind == "operator"}
    assert names and set(names.values()) == {"allowed"}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_runs(name, container, path):
    path.write_bytes(CONTAINERS[container](PAYLOADS[name]))
    found = inspect_file(path)
    assert found.refused or found.damaged
    assert not os.path.exists(HIT)
    assert all(letter.isprintable() or letter == "\n" for letter in str(found))


def test_what_is_refused_is_named_first(path):
    path.write_bytes(saved([Reduced(os.system, "true"), Reduced(nn.Conv2d, 3, 4, 1), small()]))
    found = inspect_file(path)
    refused = {named.name: named for named in found.refused}
    assert refused.keys() == {"posix.system", "torch.nn.modules.conv.Conv2d"}
    assert "may not call" in refused["torch.nn.modules.conv.Conv2d"].by
    assert [named.verdict for named in found.names][:2] == ["refused", "refused"]


def test_trusted_packages_are_marked_and_not_imported(path):
    path.write_bytes(b"\x80\x04cmine_that_is_not_here.nets\nNet\n)\x81.")
    (named,) = inspect_file(path).names
    assert (named.name, named.verdict) == ("mine_that_is_not_here.nets.Net", "refused")
    (named,) = inspect_file(path, trust="mine_that_is_not_here").names
    assert (named.verdict, named.by) == ("trusted", "its package was named as `trust`")


def test_blocks_of_a_plan(path):
    plan = si.plan_of(si.inject(small(), torch.rand(2, 3, 8, 8), at="*"))
    path.write_text(plan.to_json())
    assert [(named.name, named.kind, named.verdict) for named in inspect_file(path).names] == [
        ("se", "block", "allowed")
    ]
    path.write_text(plan.to_json().replace('"se"', '"evil.py:Block"', 1))
    assert [named.name for named in inspect_file(path).refused] == ["evil.py:Block"]


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "torchscript", "pt2", "plan", "injected"])
def test_damaged_files(kind, path):
    for seed in range(12):
        path.write_bytes(mutated(kind, seed))
        str(inspect_file(path))


def test_what_is_no_file(path):
    with pytest.raises(NoSuchFile):
        inspect_file(path)
    os.mkfifo(path)
    with pytest.raises(LoadError, match="a device, a pipe"):
        inspect_file(path)
    with pytest.raises(LoadError, match="a device, a pipe"):
        inspect_file("/dev/zero")
