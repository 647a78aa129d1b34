"""Networks that were injected and thrown away leave nothing: no class, no source, no block."""

import gc
import io
import linecache
import pickle
import sys
import weakref

import torch
from torch import nn

import se_inject as si
from se_inject.forwards import program_module
from se_inject.surgery import freeze_statistics_


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))


IMAGE = torch.rand(1, 3, 8, 8)


def used(index):
    """Use a network whose generated classes nobody else has."""
    model = si.inject(nn.Sequential(nn.Conv2d(3, 4, 1), Unit()), IMAGE, name=f"se{index}")
    freeze_statistics_(model[1].bn)
    model(IMAGE).sum().backward()
    again = pickle.loads(pickle.dumps(model))
    torch.save(again, io.BytesIO())
    program = program_module(f"N{index}", "n", [["x"]], [["return", {"node": "x"}]])
    return [weakref.ref(type(module)) for module in (model[1], program)]


def sources():
    return [name for name in linecache.cache if name.startswith("<se_inject ")]


def test_dead_networks_leave_no_classes_and_no_sources():
    used("first")
    gc.collect()
    before = len(sources())
    references = [reference for index in range(8) for reference in used(index)]
    assert len(sources()) > before or all(reference() is None for reference in references)
    gc.collect()
    assert not [reference() for reference in references if reference() is not None]
    assert len(sources()) <= before
    assert not [kind for kind in Unit.__subclasses__() if kind.__name__ == "InjectedUnit"]


def test_equal_networks_share_a_class_as_long_as_one_lives():
    one, other = (si.inject(nn.Sequential(nn.Conv2d(3, 4, 1), Unit()), IMAGE) for _ in range(2))
    kind = type(one[1])
    assert type(other[1]) is kind
    del one
    gc.collect()
    assert type(si.inject(nn.Sequential(nn.Conv2d(3, 4, 1), Unit()), IMAGE)[1]) is kind
    assert type(pickle.loads(pickle.dumps(other))[1]) is kind
    assert linecache.getline(kind.forward.__code__.co_filename, 1).startswith("def forward(")


def main(count):
    """Inject so many networks; print the memory taken at ten moments. Run: ``python -m tests.surgery.test_memory 10000``."""
    for index in range(count):
        used(index)
        if (index + 1) % (count // 10) == 0:
            gc.collect()
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * 4 // 1024
            print(f"{index + 1} injections: {resident} MiB, {len(sources())} sources, {len(gc.get_objects())} objects")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
