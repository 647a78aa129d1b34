"""Pickles name one address, ``se_inject.generated``; files of every kind that were written once are read for ever.

``python -m tests.forwards.test_generated`` writes the files in ``tests/data`` anew: do so only if the format changes on
purpose, and keep the old ones.
"""

import io
import pickle
import pickletools
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject import generated
from se_inject.forwards import FixedBatchNorm, program_module
from se_inject.surgery import freeze_statistics_

DATA = Path(__file__).parents[1] / "data"
IMAGE = torch.linspace(0, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)


def residual():
    """A network of torch's own classes: every file can be read where only torch is."""
    x, y, z = ({"node": name} for name in "xyz")
    unit = program_module(
        "Unit",
        "nets",
        [["x"]],
        [
            ["call", ["y"], "conv", [x], {}],
            ["call", ["y"], "bn", [y], {}],
            ["set", ["z"], "operator:add", [x, y], {}],
            ["set", ["z"], "torch:relu", [z], {}],
            ["return", z],
        ],
    )
    unit.conv, unit.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 1), unit)


def filled(model):
    """Weights that are not the same anywhere, without a random generator."""
    with torch.no_grad():
        for index, value in enumerate(model.state_dict().values()):
            if value.is_floating_point():
                value.copy_(torch.linspace(0.1, 0.2 + 0.01 * index, value.numel()).reshape(value.shape))
    return model.eval()


def edited():
    return filled(si.inject(residual(), IMAGE, width=1))


def gated_output():
    return filled(si.inject(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE, at="*", width=1))


def frozen():
    model = filled(si.inject(residual(), IMAGE, width=1))
    freeze_statistics_(model[1].bn)
    return model


def fixed():
    return filled(nn.Sequential(nn.Conv2d(3, 4, 1), FixedBatchNorm(4)))


def options():
    return filled(
        si.inject(residual(), IMAGE, squeeze="avg+max", gate="hard_sigmoid", norm=True, init="paper", width=1)
    )


KINDS = {"program": lambda: filled(residual()), "edited": edited, "gated_output": gated_output, "frozen": frozen, "fixed": fixed,
         "options": options, "fused": lambda: si.fuse_(edited()), "inference": lambda: si.for_inference(edited(), IMAGE)}  # fmt: skip


def names_in(data):
    """The globals that a pickle names."""
    names, texts = set(), []
    for op, value, _ in pickletools.genops(data):
        if op.name == "GLOBAL":
            names.add(value.replace(" ", "."))
        elif op.name == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]))
        elif isinstance(value, str) and "UNICODE" in op.name:
            texts.append(value)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_files_name_one_address_of_ours(kind):
    model = KINDS[kind]()
    file = io.BytesIO()
    torch.save(model, file)
    with zipfile.ZipFile(file) as archive:
        names = names_in(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))
    names |= names_in(pickle.dumps(model, protocol=2)) | names_in(pickle.dumps(model, protocol=0))
    ours = {name for name in names if name.startswith("se_inject")}
    assert ours
    assert ours <= {f"se_inject.generated.{name}" for name in generated.__all__}


@pytest.mark.parametrize("kind", KINDS)
def test_files_written_once_are_read(kind):
    answer = torch.load(DATA / f"{kind}.answer.pt", weights_only=True)
    for model in (si.load(DATA / f"{kind}.pt"), torch.load(DATA / f"{kind}.pt", weights_only=False)):
        torch.testing.assert_close(model(IMAGE), answer, rtol=1e-5, atol=1e-6)  # processors round differently
        assert torch.equal(model(IMAGE), KINDS[kind]()(IMAGE))
        assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGE), model(IMAGE))
        assert [type(module).__name__ for module in model.modules()] == [
            type(module).__name__ for module in KINDS[kind]().modules()
        ]


def test_every_address_is_what_a_pickle_finds():
    for name in generated.__all__:
        found = getattr(generated, name)
        assert (found.__module__, found.__qualname__) == ("se_inject.generated", name)


def write(kind):
    torch.save(KINDS[kind](), DATA / f"{kind}.pt")
    torch.save(KINDS[kind]()(IMAGE).detach(), DATA / f"{kind}.answer.pt")


if __name__ == "__main__":
    for each in sys.argv[1:] or KINDS:
        write(each)
