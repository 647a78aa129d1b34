"""Where a program and Python differ: lists that change under other names, numbers that are tensors, statistics of the batch."""

import operator

import pytest
import torch

import se_inject as si
from se_inject.errors import LoadError
from se_inject.tracing.inputs import observe_model
from tests.common import IMAGES, difference, write
from tests.loading.test_program_details import Conv, Lambda, path, run_by_torch  # noqa: F401


class Listed(Conv):
    def __init__(self):
        super().__init__()
        self.k, self.n = [1, 2], [[1], [2]]

    def add(self, k: list[int]):
        k.append(1)

    def own(self):
        return self.k


class ThroughAList(Listed):
    def forward(self, x):
        lists = [self.k, self.k]
        lists[0].append(1)
        return self.conv(x) * len(self.k)


class ThroughAMethod(Listed):
    def forward(self, x):
        self.add(self.k)
        return self.conv(x) * len(self.k)


class ThroughAResult(Listed):
    def forward(self, x):
        self.own().append(1)
        return self.conv(x) * len(self.k)


class ThroughABranch(Listed):
    def forward(self, x):
        k = self.k if x.shape[0] > 1 else [1]
        k.append(3)
        return self.conv(x) * len(self.k)


class ThroughAnIndex(Listed):
    def forward(self, x):
        self.n[0].append(1)
        return self.conv(x) * len(self.n[0])


class ThroughALoop(Listed):
    def forward(self, x):
        for k in self.n:
            k.append(1)
        return self.conv(x) * len(self.n[0])


@pytest.mark.parametrize(
    "kind", [ThroughAList, ThroughAMethod, ThroughAResult, ThroughABranch, ThroughAnIndex, ThroughALoop]
)
def test_an_attribute_that_is_changed_under_another_name(kind, path):  # noqa: F811
    with pytest.raises(LoadError) as caught:
        si.load(write(kind(), path, "scripted"))
    assert "may change its `" in f"{caught.value.message} {caught.value.seen}"


FLOAT, DOUBLE, HALF, LONG = torch.tensor(2.5), torch.tensor(2.5).double(), torch.tensor(2.5).half(), torch.tensor(2)
NUMBERS = {
    "a float behind": lambda m, x: m.half() * FLOAT,
    "a half behind": lambda m, x: m.long() - HALF,
    "a double in front": lambda m, x: DOUBLE * m,
    "a double in front of many": lambda m, x: DOUBLE / x.long(),
    "an int64 in front": lambda m, x: LONG - m.int(),
    "a double with a rounding mode": lambda m, x: torch.div(m, DOUBLE, rounding_mode="floor"),
    "a power with a size": lambda m, x: m ** x.shape[2],
    "a power of a size": lambda m, x: x.shape[2] ** x,
    "a comparison with a size": lambda m, x: operator.ge(m, x.shape[2] / 20),
    "one half times a quotient of sizes": lambda m, x: x.shape[2] / 3 * m.half(),
    "one int16 and a size": lambda m, x: m.to(torch.int16) + x.shape[2],
    "one double times a quotient of sizes": lambda m, x: m.double() * (x.shape[2] / 3),
    "a size as result": lambda m, x: (m, x.shape[2]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name, path):  # noqa: F811
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded = si.load(write(Lambda(NUMBERS[name]), path, "traced", (images,)))
    assert difference(run_by_torch(path)(images), loaded(images)) == ""


class Batchwise(Conv):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("how", ["traced", "exported"])
def test_normalisation_without_statistics_is_no_training(how, path):  # noqa: F811
    loaded = si.load(write(Batchwise().eval(), path, how))
    assert "program of training mode" not in " ".join(observe_model(loaded, IMAGES).notes)


def test_a_root_of_a_size_in_an_exported_program(path):  # noqa: F811
    class Root(Conv):
        def forward(self, x):
            return self.conv(x) * x.shape[3] ** 0.5 * x.shape[3] ** -1.0

    network = Root().eval()
    shapes = ({3: torch.export.Dim("width", min=4, max=99)},)
    loaded = si.load(write(network, path, "exported", (torch.rand(2, 3, 24, 24),), dynamic_shapes=shapes))
    images = torch.rand(2, 3, 24, 17)
    assert torch.equal(loaded(images), network(images))
