"""Files of every kind, each made by the tool that normally makes it, and damaged copies of them."""

import functools
import io
import pickle
import random
import tempfile
import warnings
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

import se_inject as si
from tests.files.hostile import exported, records, saved, scripted, small, zipped
from tests.fuzz.pickled import altered, base

TARGET = small()


def _injected():
    return si.inject(nn.Sequential(small(), nn.ReLU()), torch.rand(2, 3, 8, 8), at="*", init="paper")


def _adapted():
    return si.inject(TARGET, torch.rand(2, 3, 8, 8), at="*", init="paper")


def _adapter():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "se.safetensors"
        si.save_adapter(_adapted(), path)
        return path.read_bytes()


def _onnx():
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(small().eval(), (torch.rand(2, 3, 8, 8),), dynamo=True, verbose=False)
    onnx.save(program.model_proto, stream)
    return stream.getvalue()


class Branching(nn.Module):
    """A forward that TorchScript keeps as a program: branches, a loop, a list, functions."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)])
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x, times: int = 2, bias: torch.Tensor | None = None):
        found = []
        for layer in self.layers:
            found.append(F.relu(layer(x)))
        if bias is not None and x.shape[0] > 1:
            x = x + bias
        for turn in range(times):
            x = F.dropout(self.norm(x) * (turn + 0.5), 0.1, self.training)
        return torch.cat([x] + found, 1).reshape(x.size(0), -1)  # noqa: RUF005 - TorchScript has no stars


def _program():
    """A network out of a TorchScript archive, pickled again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(original("torchscript"))
        return saved(si.load(path))


MAKERS = {
    "zip": lambda: saved(small()),
    "altered": lambda: zipped(base("resnet")[0]),
    "legacy": lambda: saved(small(), _use_new_zipfile_serialization=False),
    "plain": lambda: pickle.dumps(small()),
    "injected": lambda: saved(_injected()),
    "state dict": lambda: saved(small().state_dict()),
    "checkpoint": lambda: saved(
        {"epoch": 3, "model": small(), "ema": None, "optimizer": torch.optim.Adam(TARGET.parameters()).state_dict()}
    ),
    "safetensors": lambda: save(small().state_dict()),
    "torchscript": lambda: scripted(Branching().eval()),
    "program": _program,
    "pt2": lambda: zipped(exported()),
    "adapter": _adapter,
    "plan": lambda: si.plan_of(_adapted()).to_json().encode(),
    "onnx": _onnx,
}


@functools.cache
def original(kind):
    """A sound file of this kind."""
    return MAKERS[kind]()


def mutated(kind, seed):
    """A damaged copy, the same for the same seed.

    Half of the damaged archives are packed again with right checksums, as someone would who means it. Of the kind "altered"
    nothing is damaged: the pickle of one of several networks says something else.
    """
    if kind == "altered":
        return altered(seed)
    rng = random.Random(f"{kind} {seed}")
    data = original(kind)
    if data[:4] == b"PK\x03\x04" and rng.random() < 0.5:
        parts = records(data)
        for name in rng.sample(sorted(parts), rng.choice((1, 1, 2))):
            parts[name] = _damaged(parts[name], rng)
        return zipped(parts)
    return _damaged(data, rng)


def _damaged(data, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice((_truncated, _flipped, _flipped, _spliced, _inserted, _zeroed, _numbers))(
            bytearray(data), rng
        )
    return bytes(data)


def _at(data, rng):
    return rng.randrange(len(data) + 1)


def _truncated(data, rng):
    return data[: _at(data, rng)]


def _flipped(data, rng):
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _spliced(data, rng):
    start, end = sorted((_at(data, rng), _at(data, rng)))
    other = bytearray(original(rng.choice(sorted(MAKERS)))) if rng.random() < 0.3 else data
    place, length = _at(other, rng), rng.choice((1, 4, 64, end - start))
    data[start : start + length] = other[place : place + length]
    return data


def _inserted(data, rng):
    place = _at(data, rng)
    data[place:place] = rng.randbytes(rng.choice((1, 2, 8, 64)))
    return data


def _zeroed(data, rng):
    place, length = _at(data, rng), rng.choice((1, 4, 64))
    data[place : place + length] = bytes(len(data[place : place + length]))
    return data


def _numbers(data, rng):
    """A length or an index becomes a large one."""
    place, length = _at(data, rng), rng.choice((1, 2, 4, 8))
    data[place : place + length] = rng.choice((b"\xff", b"\x7f", b"\x80")) * length
    return data
