"""Text in a file that torch makes source of, or takes apart by recursion: keys of arguments, tags of types."""

import io
import json
from typing import Dict, List, Optional, Tuple  # noqa: UP035 - TorchScript's words

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import InjectError, LoadError
from se_inject.loading import load_program
from tests.files.hostile import records, scripted, text, zipped


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x, *, gate):
        return torch.relu(self.layer(x)) * gate


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Gated()
        self.last = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.last(self.inner(x, gate=x + 1))


IMAGES = torch.rand(2, 3, 16, 16)


def exported(net, *args, **options):
    stream = io.BytesIO()
    torch.export.save(torch.export.export(net.eval(), args, **options), stream)
    return records(stream.getvalue())


def with_key(parts, key):
    """The same program with another name for its argument `gate`, in every tree."""
    name = next(name for name in parts if name.endswith("models/model.json"))
    program = json.loads(parts[name])
    for call in program["graph_module"]["module_call_graph"]:
        if call.get("signature"):
            call["signature"]["in_spec"] = call["signature"]["in_spec"].replace("gate", key)
    return zipped({**parts, name: json.dumps(program)})


KEYS = ["gate=__import__('os').mkdir('hit')", "gate, a=print('hit')", "class", "__class__", "x\\\\n", "gate.x", "ﬁ"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("where", ["submodule", "network"])
def test_keys_of_arguments_are_names(key, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if where == "submodule":
        parts = exported(Outer(), IMAGES, preserve_module_call_signature=("inner",))
    else:
        parts = exported(Gated(), IMAGES, kwargs={"gate": IMAGES})
    (tmp_path / "net.pt2").write_bytes(with_key(parts, key))
    for door in (si.load, lambda path: load_program(path).module()):
        if where == "network":
            with pytest.raises(LoadError):
                door("net.pt2")
        else:  # nothing of it is read
            door("net.pt2")
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("where", ["submodule", "network"])
def test_sound_keywords(where, tmp_path):
    if where == "submodule":
        net = Outer().eval()
        parts, call = exported(net, IMAGES, preserve_module_call_signature=("inner",)), {}
    else:
        net, call = Gated().eval(), {"gate": IMAGES}
        parts = exported(net, IMAGES, kwargs=call)
    (tmp_path / "net.pt2").write_bytes(zipped(parts))
    assert torch.equal(si.load(tmp_path / "net.pt2")(IMAGES, **call), net(IMAGES, **call))


class Tagged(nn.Module):
    d: Dict[str, List[int]]  # noqa: UP006
    e: Optional[List[float]]  # noqa: UP006, UP045
    f: Dict[str, torch.Tensor]  # noqa: UP006
    g: List[Tuple[int, str]]  # noqa: UP006

    def __init__(self):
        super().__init__()
        self.d, self.e, self.f, self.g = {"abc": [1]}, [1.0], {"x": torch.ones(2)}, [(1, "a")]
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return (
            torch.relu(self.layer(x)) * self.d["abc"][0] * self.f["x"][0] * self.g[0][0] * (1 if self.e is None else 2)
        )


def test_sound_types_are_read(tmp_path):
    net = Tagged().eval()
    (tmp_path / "net.pt").write_bytes(scripted(net))
    assert torch.equal(load_program(tmp_path / "net.pt")(IMAGES), net(IMAGES))


@pytest.mark.parametrize(
    "kind",
    [
        "List[" * 100_000 + "int" + "]" * 100_000,
        "(" * 100_000 + "int" + ")" * 100_000,
        "Dict[str, Tensor]",
        "List[int]",
        "",
        "x()",
    ],
    ids=["nested", "brackets", "other", "list", "none", "call"],
)
def test_types_of_values_are_those_declared(kind, tmp_path):
    parts = records(scripted(Tagged().eval()))
    name = next(name for name in parts if name.endswith("data.pkl"))
    changed = parts[name].replace(text("Dict[str, List[int]]"), text(kind))
    assert changed != parts[name]
    (tmp_path / "net.pt").write_bytes(zipped({**parts, name: changed}))
    with pytest.raises(LoadError):
        si.load(tmp_path / "net.pt")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/proc/self/mem", "/proc/self/maps", "/proc/kmsg"])
def test_paths_that_are_no_file(path, tmp_path):
    for door in (
        si.load,
        lambda path: si.load_weights_(nn.ReLU(), path),
        lambda path: si.load_adapter(nn.ReLU(), path),
    ):
        with pytest.raises(InjectError):
            door(path)
