"""Small files that unfold: in error texts, in what libraries make of a state, in TorchScript's parser."""

import io
import json
import re
import struct
import zipfile

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import InjectError, LoadError, WorkerError, quoted
from se_inject.isolation import call_isolated
from se_inject.loading import inspect_file
from tests.files.hostile import archived, records, saved, scripted, text, zipped
from tests.fuzz.run import peak_bytes


def doubled(levels):
    """As many lists as levels, and 2 to that power of ones."""
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def peak_of(data, path):
    """How much memory a refusal takes, and the error."""
    path.write_bytes(data)
    peak_bytes()
    before = peak_bytes()
    with pytest.raises(LoadError) as caught:
        si.load(path)
    return peak_bytes() - before, str(caught.value)


def with_attribute(name, value):
    layer = nn.Conv2d(3, 4, 3)
    layer.__dict__[name] = value
    return saved(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_channels", doubled(60)),
        ("pretrained_cfg", doubled(60)),
        ("pretrained_cfg", {"input_size": doubled(60)}),
        ("_foo_hooks", doubled(60)),
        ("stride", {"a": doubled(60)}),
        ("weight", doubled(60)),
    ],
)
def test_a_value_is_quoted_in_part(name, value, tmp_path):
    taken, said = peak_of(with_attribute(name, value), tmp_path / "net.pt")
    assert taken < 20 << 20
    assert len(said) < 500


def test_how_values_are_quoted():
    assert quoted([1, (2,), {"a": None}, "b"]) == "[1, (2,), {'a': None}, 'b']"
    assert quoted([1] * 10) == "[1, 1, 1, 1, …]"
    assert quoted(10**5000) == "a number of 16,610 bits"
    assert quoted(nn.ReLU()) == "a ReLU"
    assert quoted("a" * 1000) == "'" + "a" * 79


@pytest.mark.parametrize(
    ("table", "name", "size"),
    [("attribute", "__" + "a" * 20_000_000, 20), ("child", "__" + "\u0301" * 5_000_000, 10)],
    ids=["attribute", "child"],
)
def test_long_names(table, name, size, tmp_path):
    layer = nn.Identity()
    (layer.__dict__ if table == "attribute" else layer._modules)[name] = nn.Identity() if table == "child" else 1
    taken, said = peak_of(saved(nn.Sequential(layer)), tmp_path / "net.pt")
    assert taken < (2 * size + 150) << 20
    assert len(said) < 2000


def test_what_states_unfold_to_is_counted(tmp_path):
    identity = b"\x80\x02ctorch.nn.modules.linear\nIdentity\nq\x00}q\x01(" + text("a") + b"K\x01u0("
    taken, _ = peak_of(archived(identity + b"h\x00)\x81h\x01b" * 190_000 + b"l."), tmp_path / "net.pt")
    assert taken < 256 << 20
    recurrent = (
        b"\x80\x02ctorch.nn.modules.rnn\nLSTM\nq\x00}q\x01(" + text("num_layers") + b"M" + struct.pack("<H", 100)
        + text("bidirectional") + b"\x88" + text("bias") + b"\x88" + text("mode") + text("LSTM") + text("all_weights")
        + b"]q\x02]q\x03K\x00aau0("
    )  # fmt: skip
    taken, said = peak_of(archived(recurrent + b"h\x00)\x81h\x01b" * 420 + b"l."), tmp_path / "net.pt")
    assert taken < 256 << 20
    assert "unfolds" in said


def many_forwards(count, text_of):
    called = b"".join(b"h\x00" + text(text_of(number)) + b"\x85R" for number in range(count))
    pickled = b"\x80\x02cse_inject.generated\nprogram_class\nq\x00](" + called + b"e."
    return zipped({f"a/{name}": data for name, data in (("data.pkl", pickled), ("version", b"3\n"))})


def test_stored_forwards_are_counted(tmp_path):
    def forward(number):
        lines = [["return", number]]
        return json.dumps({"class": "A", "home": "b", "inputs": [["x"]], "lines": lines, "example": None})

    taken, said = peak_of(many_forwards(12_000, forward), tmp_path / "many.pt")
    assert taken < 64 << 20
    assert "unfolds" in said
    taken, said = peak_of(
        many_forwards(20_000, lambda number: forward(0)), tmp_path / "same.pt"
    )  # they share one class
    assert "neither a network nor weights" in said


class Rectified(nn.Module):
    def forward(self, x):
        return torch.relu(x)


@pytest.mark.parametrize(
    "line",
    [
        "    y = " + " < ".join(["1"] * 40_000),
        "    y = " + " and ".join(["True"] * 40_000),
        "    y = " + " or ".join(["True"] * 500),
        "    # type: (" + "List[" * 40_000 + "int" + "]" * 40_000 + ") -> Tensor",
        "    # type: (Tensor) -> " + "(" * 40_000 + "Tensor" + ")" * 40_000,
        "    # type: (Tensor) -> Tensor",
    ],
    ids=["compared", "and", "or", "list", "tuple", "plain"],
)
def test_source_that_only_torchscript_nests(line, tmp_path):
    parts = records(scripted(Rectified().eval()))
    changed = {
        name: data.replace(b"    return torch.relu(x)", f"{line}\n    return torch.relu(x)".encode())
        for name, data in parts.items()
    }
    assert changed != parts
    (tmp_path / "net.pt").write_bytes(zipped(changed))
    with pytest.raises(LoadError, match=r"goes too deep|types in comments"):
        si.load(tmp_path / "net.pt")


PAYLOADS = """
import os, sys

def flood(path):
    for _ in range(300):
        view = memoryview(b"x" * (1 << 20))
        while view:
            view = view[os.write(sys.stdout.fileno(), view):]

def say(path, text):
    os.write(sys.stdout.fileno(), text.encode() + b"\\n")
    os._exit(1)
"""


def test_a_flood_of_words_does_not_reach_this_process(tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text(PAYLOADS)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))  # of that process
    peak_bytes()
    before = peak_bytes()
    with pytest.raises(WorkerError, match="without end"):
        call_isolated("payload:flood", {}, tmp_path / "x.pt", readable=[tmp_path])
    assert peak_bytes() - before < 20 << 20
    assert list((tmp_path / "tmp").iterdir()) == [], "it cleans up when it is asked to end"


@pytest.mark.parametrize(
    "said", ['{"kind": "LoadError", "message": "x", "seen": [1], "hint": null}', "[" * 50_000, '{"kind": []}', "7"]
)
def test_nonsense_in_place_of_an_error(said, tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text(PAYLOADS)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InjectError):
        call_isolated("payload:say", {"text": said}, tmp_path / "x.pt", readable=[tmp_path])


BOMBS = {
    "script": {
        "a/constants.pkl": b"\x80\x02).", "a/data.pkl": b"\x80\x02).", "a/code/__torch__.py": b"x=1\n" * 500_000,
        "a/version": "3",
    },
    "program": {"a/archive_format": "pt2", "a/models/model.json": b"[" + b'{"a":1},' * 1_000_000 + b"1]"},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_looking_into_a_file_is_bounded_too(name, tmp_path):
    (tmp_path / "net.pt").write_bytes(zipped(BOMBS[name], compression=zipfile.ZIP_DEFLATED))
    peak_bytes()
    before = peak_bytes()
    found = inspect_file(tmp_path / "net.pt")
    assert peak_bytes() - before < 64 << 20
    assert found.damaged or found.refused


def test_sizes_of_an_exported_program_are_short(tmp_path):
    """Python's parser makes half a kilobyte of every letter of a sum."""
    stream, size = io.BytesIO(), torch.export.Dim("size", min=2, max=64)
    program = torch.export.export(nn.Conv2d(3, 2, 1).eval(), (torch.zeros(4, 3, 8, 8),), dynamic_shapes=({0: size},))
    torch.export.save(program, stream)
    parts = records(stream.getvalue())
    name = next(name for name in parts if name.endswith("models/model.json"))
    graph, count = re.subn(rb'"expr_str": "[^"]*"', b'"expr_str": "' + b"s0+" * 600_000 + b'1"', parts[name], count=1)
    assert count == 1
    parts[name] = graph
    taken, said = peak_of(zipped(parts, compression=zipfile.ZIP_DEFLATED), tmp_path / "net.pt2")
    assert taken < 100 << 20
    assert "not an expression of sizes" in said
