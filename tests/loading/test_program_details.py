"""Details of TorchScript archives and exported programs: lists, sizes and numbers as torch has them, inputs and notes."""

import operator
import sys
import warnings
import zipfile
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import se_inject as si
from se_inject.cli import entry as cli
from se_inject.errors import LoadError, NoSites, UnsupportedModel
from se_inject.loading import load_program
from se_inject.tracing.inputs import inferred_shapes, observe_model
from se_inject.verification.checks import check_against_file
from tests.common import IMAGES, difference, randomise, same, same_state, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.pt2"


def run_by_torch(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)


def passes_against(path, loaded):
    check = check_against_file(loaded, load_program(path), observe_model(loaded))
    assert check.passed is True, check.detail


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)


# -- lists and dicts that are one object --------------------------------------------------------------------


class Ordered(Conv):
    def forward(self, x):
        found = OrderedDict()
        found["a"] = self.conv(x)
        found["b"] = found["a"] * 2
        return found


class Nested(Conv):
    def forward(self, x):
        y = self.conv(x)
        lists = [[y], [y]]
        for turn in range(4):
            lists[turn % 2].append(y * turn)
        return torch.cat(lists[0], 1), torch.cat(lists[1], 1)


class NestedEmpty(Conv):
    def forward(self, x):
        y = self.conv(x)
        lists: list[list[torch.Tensor]] = [[], []]
        turn = 0
        while turn < x.shape[0] + 1:
            lists[turn % 2].append(y * turn)
            turn += 1
        return lists


class InDict(Conv):
    def forward(self, x):
        y = self.conv(x)
        pair = [y, y]
        named = {"k": pair}
        named["k"][1] = y * 3
        return torch.cat(pair, 1), named


class Picking(Conv):
    def pick(self, a: list[torch.Tensor], b: list[torch.Tensor], first: bool):
        return (a, b) if first else (b, a)

    def forward(self, x):
        y = self.conv(x)
        a, b = [y], [y * 2]
        one, other = self.pick(a, b, x.shape[0] > 1)
        one.append(y * 3)
        other.append(y * 4)
        return torch.cat(a + b, 1)


class Two(Conv):
    def two(self, y):
        return [y], [y * 2]

    def forward(self, x):
        one, other = self.two(self.conv(x))
        one.append(x)
        return one, other


class Kernels(Conv):
    def forward(self, x):
        sizes = [[1, 1], [2, 2]]
        sizes[0][0] = 2
        last = sizes[1]
        last[1] = 1
        y = self.conv(x)
        return F.avg_pool2d(y, sizes[0]), F.avg_pool2d(y, sizes[1])


class Twice(Conv):
    def forward(self, x):
        size = [1, 1]
        sizes = [size, size]
        sizes[0][0] = 2
        return F.avg_pool2d(self.conv(x), size), F.avg_pool2d(self.conv(x), sizes[1])


class Turns(Conv):
    def forward(self, x):
        sizes: list[list[int]] = []
        for turn in range(x.dim()):
            size = [1, 1]
            sizes.append(size)
            size[0] = turn
        while len(sizes) < x.shape[0] + 5:
            size = [2, 2]
            sizes.append(size)
            size[1] = len(sizes)
        return self.conv(x), sizes


class Numbers(Conv):
    def fill(self, named: dict[str, int]):
        named["z"] = 5

    def forward(self, x):
        named = {"k": 2, "l": 3}
        again = named
        self.fill(again)
        named["k"] = 1
        return self.conv(x) * again["k"] + named["z"], named


class Alternatives(Conv):
    def forward(self, x):
        a, b = [1, 2], [3, 4, 5]
        c = a if x.shape[0] > 1 else b
        c.append(6)
        d = c[:]
        d.append(7)
        return self.conv(x) * len(a) + len(b), d


class InTuples(Conv):
    def forward(self, x):
        y = self.conv(x)
        a = [y]
        tuples = [(a, 1), (a, 2)]
        tuples[0][0].append(y * 5)
        return tuples[1][0], a


class Walked(Conv):
    def forward(self, x):
        y = self.conv(x)
        named = {"a": [y], "b": [y * 2]}
        for number, value in enumerate(named.values()):
            value.append(y * number)
        for one, factor in zip([named["a"], named["b"]], [3, 4]):  # noqa: B905
            one.append(y * factor)
        return named


class Calling(Conv):
    class Part(nn.Module):
        def forward(self, found: list[torch.Tensor], size: list[int], more: bool):
            own = [found[0]]
            if more:
                own.append(found[0] * 2)
            found.append(F.avg_pool2d(found[0], size))
            size[0] = 2
            return own, found

    def __init__(self):
        super().__init__()
        self.part = self.Part()

    def forward(self, x):
        found, size = [self.conv(x)], [1, 1]
        one, other = self.part(found, size, True)
        other.append(x)
        one.append(found[-1] * 2)
        return one, other, found, F.avg_pool2d(x, size)


class OfAttribute(Conv):
    def __init__(self):
        super().__init__()
        self.k = [1, 2]

    def forward(self, x):
        size = self.k.copy()
        size.append(self.k[0])
        return self.conv(x) * len(size), size


LISTS = [
    Ordered, Nested, NestedEmpty, InDict, Picking, Two, Kernels, Twice, Turns, Numbers, Alternatives, InTuples, Walked,
    Calling, OfAttribute,
]  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
def test_lists_that_are_one_object(kind, path):
    network = kind().eval()
    loaded = si.load(write(network, path, "scripted"))
    program = run_by_torch(path)
    assert same_state(loaded, network)
    for images in (torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8), torch.rand(3, 3, 9, 6)):
        for _ in range(2):
            assert difference(program(images), loaded(images)) == ""
        assert same(loaded(images), network(images))


class Appending(Conv):
    def __init__(self):
        super().__init__()
        self.k = [1, 2]

    def forward(self, x):
        self.k.append(1)
        return self.conv(x) * len(self.k)


class Setting(Conv):
    def __init__(self):
        super().__init__()
        self.k = {"a": 1}

    def forward(self, x):
        self.k["b"] = x.shape[0]
        return self.conv(x) * len(self.k)


@pytest.mark.parametrize("kind", [Appending, Setting])
def test_an_attribute_that_the_forward_changes(kind, path):
    with pytest.raises(LoadError) as caught:
        si.load(write(kind(), path, "scripted"))
    assert "it may change its `k`" in f"{caught.value.message} {caught.value.seen}"


class InputBack(Conv):
    def forward(self, x):
        return x, self.conv(x)


class InputTwice(Conv):
    def forward(self, x):
        y = self.conv(x)
        return y.mean(), x, [x, y]


@pytest.mark.parametrize("kind", [InputBack, InputTwice])
@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_a_root_that_returns_its_input(kind, how, path):
    network = kind().eval()
    loaded = si.load(write(network, path, how))
    got = loaded(IMAGES)
    assert type(got) is tuple
    assert difference(run_by_torch(path)(IMAGES), got) == ""
    assert same(got, network(IMAGES))
    assert any(part is IMAGES for part in got)


# -- sizes as lists ----------------------------------------------------------------------------------------


class Equal(Conv):
    def __init__(self):
        super().__init__()
        self.size = [24, 24]

    def forward(self, x):
        y = self.conv(x)
        return y + 1 if y.shape[-2:] == self.size else y


class Unequal(Equal):
    def forward(self, x):
        y = self.conv(x)
        return y + 1 if self.size != y.shape[-2:] else y


class Sum(Conv):
    def forward(self, x):
        y = self.conv(x)
        return y + 1 if y.shape[1:] + [3] == [8, 24, 24, 3] else y  # noqa: RUF005


class SumOfSizes(Conv):
    def forward(self, x):
        sizes = [1] + x.shape[2:] + x.shape[:1]  # noqa: RUF005
        return self.conv(x) + 1 if sizes == [1, 24, 24, 2] else self.conv(x).flatten(0), sizes


class OfOthers(Conv):
    def forward(self, x):
        y = self.conv(x)
        sizes = [x.size(2), x.size(3)]
        return y + 1 if x.shape[2:] == sizes and list(x.shape)[:2] == [2, 3] else y


@pytest.mark.parametrize("kind", [Equal, Unequal, Sum, SumOfSizes, OfOthers])
def test_sizes_are_lists(kind, path):
    network = kind().eval()
    loaded = si.load(write(network, path, "scripted"))
    program = run_by_torch(path)
    taken = set()
    for images in (torch.rand(2, 3, 24, 24), torch.rand(3, 3, 24, 23)):
        wanted, got = program(images), loaded(images)
        assert difference(wanted, got) == ""
        first = got[0] if isinstance(got, tuple) else got
        plain = network.conv(images)
        taken.add(first.shape == plain.shape and not torch.equal(first, plain))
    assert taken == {True, False}


# -- numbers in traces -------------------------------------------------------------------------------------


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.mean(), x)


NUMBERS = {
    "product": lambda m, x: m * 2.5,
    "product from the left": lambda m, x: 2.5 * m,
    "quotient": lambda m, x: m / 3,
    "quotient of a number": lambda m, x: 3 / (m + 1),
    "sum": lambda m, x: m + 1,
    "difference": lambda m, x: m - 1.5,
    "difference from a number": lambda m, x: 1.5 - m,
    "difference with alpha": lambda m, x: torch.sub(m, 2.5, alpha=2),
    "power": lambda m, x: m**2,
    "power of a number": lambda m, x: 2.5**m,
    "remainder": lambda m, x: (m * 10) % 0.3,
    "in place": lambda m, x: m.clone().mul_(2.5).add_(1).div_(3),
    "comparison": lambda m, x: m > 0.5,
    "where": lambda m, x: torch.where(m > 0, m, 0.5),
    "maximum": lambda m, x: torch.maximum(m, torch.tensor(0.1)),
    "integers times a float": lambda m, x: x.long() * 2.5,
    "one integer times a float": lambda m, x: m.long() * 2.5,
    "one integer and a float": lambda m, x: 2.5 - m.long(),
    "one integer and an integer": lambda m, x: m.int() * 2 + 1,
    "a float minus uint8": lambda m, x: m.to(torch.uint8) - 2.5,
    "bool": lambda m, x: (m > 0) * 2.5 + 1,
    "one half": lambda m, x: m.half() * 2.5,
    "one half in a vector": lambda m, x: m.half().view(1) * 2.5,
    "halves": lambda m, x: x.half() * 2.5 + 1e-3,
    "one half and a tensor": lambda m, x: m.half() * torch.tensor(2.5),
    "one half and a double": lambda m, x: m.half() * torch.tensor(2.5, dtype=torch.float64),
    "bfloat16": lambda m, x: m.bfloat16() / 3,
    "double": lambda m, x: m.double() * 2.5,
    "a double's tensor": lambda m, x: m * torch.tensor(2.0, dtype=torch.float64),
    "int32 and int64": lambda m, x: m.int() * torch.tensor(2),
    "from double": lambda m, x: (m.double() + 1).float() + 1e-5,
    "floor division": lambda m, x: (m * 10) // 0.3,
    "floor division of integers": lambda m, x: (x * 100).long() // 3,
    "floor division by a size": lambda m, x: (x * 100) // x.shape[2],
    "floor division of a number": lambda m, x: 3 // (m + 1),
    "truncated": lambda m, x: torch.div(m * -100, 3, rounding_mode="trunc"),
    "remainder of integers": lambda m, x: (x * 10).long() % 3 + (-x * 10) % 2.5,
    "size": lambda m, x: m * x.shape[2],
    "size of integers": lambda m, x: x.shape[2] * m.long(),
    "size of halves": lambda m, x: x.shape[2] / 3 * x.half(),
    "quotient of a size": lambda m, x: x.shape[2] / 7 * m,
    "quotient by sizes": lambda m, x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "quotient of sizes": lambda m, x: x * (x.shape[2] / x.shape[3]),
    "half a size": lambda m, x: x * (x.shape[2] * 0.5),
    "negative size": lambda m, x: -(x.shape[2] * 0.25) * m + (-x.shape[3]) // 4,
    "root of a size": lambda m, x: m / (x.shape[2] ** 0.5),
    "power of a size": lambda m, x: m * x.shape[2] ** 2,
    "size as a tensor": lambda m, x: torch.tensor(x.shape[2] * 0.5) * m,
    "size and a remainder": lambda m, x: x.shape[2] % 3 * m - (x.shape[3] - 1),
    "mixed": lambda m, x: torch.stack([m, torch.tensor(2.0)]) * torch.tensor(3),
    "number of elements": lambda m, x: x.half() / x.numel(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_traces(name, path):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded = si.load(write(Lambda(NUMBERS[name]), path, "traced", (images,)))
    program = run_by_torch(path)
    for given in (images, images[:, :, :6, 1:], -images):
        for _ in range(2):  # torch optimises after the first
            assert difference(program(given), loaded(given)) == ""


# -- constants ---------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """Residual units behind constants of the trace: vectors and numbers."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            y = F.relu(self.norm(self.conv(x))) * 0.5 + 0.1
            return x + F.dropout(y, 0.25, self.training)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.units = nn.Sequential(self.Unit(), self.Unit())
        self.register_buffer("table", torch.rand(8, 1, 1))

    def forward(self, x):
        x = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(0.2, dtype=torch.float16)
        return self.units(self.stem(x) + self.table)


def test_constants_of_a_trace_are_no_part_of_the_state(path, tmp_path):
    network = randomise(Normalised()).eval()
    loaded = si.load(write(network, path, "traced"))
    assert list(loaded.state_dict()) == list(network.state_dict())
    assert len(list(loaded.buffers())) > len(list(network.buffers()))
    assert same(loaded(IMAGES), network(IMAGES))
    others = randomise(Normalised(), seed=1).eval()
    loaded.load_state_dict(others.state_dict())
    assert same(loaded(IMAGES), others(IMAGES))
    torch.save(loaded, tmp_path / "again.pt")
    again = si.load(tmp_path / "again.pt")
    assert same_state(again, others)
    assert same(again(IMAGES), others(IMAGES))
    injected = si.inject(loaded, IMAGES, stages="all")
    si.verify(loaded, injected, IMAGES).expect_passed()


def test_a_frozen_archive(path):
    network = randomise(Normalised()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = torch.jit.freeze(torch.jit.script(network))
        frozen.save(path)
    loaded = si.load(path)
    assert not list(loaded.parameters())
    assert set(loaded.state_dict()) == {name for name, _ in loaded.named_buffers()}
    assert network.stem.weight.numel() in {value.numel() for value in loaded.state_dict().values()}
    assert difference(run_by_torch(path)(IMAGES), loaded(IMAGES)) == ""
    assert "the file is a frozen program" in " ".join(si.plan(loaded, IMAGES).notes)
    with pytest.raises(NoSites, match="no convolution layer") as caught:
        si.plan(loaded)
    assert "example_inputs=" in str(caught.value)


def test_no_other_program_is_frozen(path):
    for how in ("scripted", "traced", "exported"):
        loaded = si.load(write(Normalised().eval(), path, how))
        assert "frozen" not in " ".join(si.plan(loaded, IMAGES).notes)


# -- programs of training mode -----------------------------------------------------------------------------


class Dropping(Conv):
    def __init__(self, p=0.5):
        super().__init__()
        self.drop, self.channels = nn.Dropout(p), nn.Dropout2d(p)

    def forward(self, x):
        return self.channels(self.drop(self.conv(x)).relu())


class Norming(Conv):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x))


class Instances(Conv):
    def __init__(self):
        super().__init__()
        self.norm, self.plain = nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8)

    def forward(self, x):
        return self.plain(self.norm(self.conv(x)).relu())


class Without(Dropping):
    def __init__(self):
        super().__init__(p=0.0)


class Always(Conv):
    """Dropout that no mode takes out, in one branch of two."""

    def forward(self, x):
        y = self.conv(x)
        if x.shape[0] > 1:
            y = F.dropout(y, 0.5)
        return y


def written(kind, mode, how, path):
    """The network that was written, in a mode and a way."""
    network = randomise(kind()).train(mode == "train")
    if how != "core":
        write(network, path, how)
    else:
        torch.export.save(torch.export.export(network, (IMAGES,)).run_decompositions(), path)
    return si.load(path)


@pytest.mark.parametrize(
    ("kind", "mode", "how", "noted"),
    [
        *((kind, "train", how, True) for kind in (Dropping, Norming, Normalised) for how in ("traced", "exported", "core")),
        *((kind, "eval", how, False) for kind in (Dropping, Norming, Normalised) for how in ("traced", "exported", "core")),
        *((kind, "eval", "scripted", False) for kind in (Dropping, Norming)),
        *((Always, mode, how, True) for mode in ("train", "eval") for how in ("scripted", "traced")),
        *((kind, "train", "scripted", False) for kind in (Dropping, Norming)),
        *((Instances, mode, how, False) for mode in ("train", "eval") for how in ("traced", "exported", "core")),
        *((Without, "train", how, False) for how in ("traced", "exported", "core")),
    ],
)  # fmt: skip
def test_programs_of_training_mode(kind, mode, how, noted, path):
    loaded = written(kind, mode, how, path)
    notes = " ".join(observe_model(loaded, IMAGES).notes)
    assert ("program of training mode" in notes) == noted


@pytest.mark.parametrize("how", ["traced", "exported", "core"])
@pytest.mark.parametrize("kind", [Dropping, Normalised])
def test_a_program_with_dropout_is_compared_with_the_same_numbers(kind, how, path):
    loaded = written(kind, "train", how, path)
    before = torch.get_rng_state()
    for _ in range(2):
        check = check_against_file(loaded, load_program(path), observe_model(loaded, IMAGES))
        assert check.passed is True, check.detail
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    first = loaded(IMAGES)
    assert not torch.equal(loaded(IMAGES), first)  # it does drop


# -- exported programs -------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, *, mask, scale):
        y = self.one(x)
        return (self.other(y.relu()) + y) * mask * scale - mask


MASK, SCALE = torch.rand(2, 1, 16, 16), torch.rand(1)
SMALL = IMAGES[:, :, :16, :16]


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "told"),
    [
        (Normalised, (), {"x": SMALL}, "1 input of 2×3×16×16"),
        (Named, (SMALL,), {"mask": MASK, "scale": SCALE}, "3 inputs of 2×3×16×16, 2×1×16×16, 1"),
        (Named, (SMALL,), {"scale": SCALE, "mask": MASK}, "3 inputs of 2×3×16×16, 1, 2×1×16×16"),
        (Named, (), {"scale": SCALE, "x": SMALL, "mask": MASK}, "3 inputs of 1, 2×3×16×16, 2×1×16×16"),
    ],
)
def test_exported_with_keywords(kind, args, kwargs, told, path):
    network = randomise(kind()).eval()
    loaded = si.load(write(network, path, "exported", args, kwargs=kwargs))
    trace = observe_model(loaded)
    assert f"input as the program was made for: {told}" in trace.notes
    passes_against(path, loaded)
    assert same(loaded(*args, **kwargs), network(*args, **kwargs))
    plan = si.plan(loaded, stages="all")
    si.verify(loaded, plan.apply(loaded)).expect_passed()


SIZES = {
    "quotient": lambda y, x: y * (float(x.shape[2]) / x.shape[3]),
    "quotient by a float": lambda y, x: y * (x.shape[3] / 2.5),
    "product": lambda y, x: y * (x.shape[3] * 0.1),
    "negative": lambda y, x: y * (x.shape[3] * 1.5 - 2.75) + -1.5 / x.shape[3],
    "small": lambda y, x: y * (x.shape[3] * 1e-5 + 1e20),
    "scaled": lambda y, x: F.interpolate(y, scale_factor=0.7, mode="bilinear"),
    "larger": lambda y, x: F.interpolate(y, scale_factor=1.5),
}


class Sized(Conv):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(torch.relu(self.conv(x)), x)


@pytest.mark.parametrize("name", SIZES)
def test_floats_in_expressions_of_sizes(name, path):
    network = Sized(SIZES[name]).eval()
    shapes = ({0: torch.export.Dim("batch"), 3: torch.export.Dim("width", min=4, max=99)},)
    write(network, path, "exported", (torch.rand(2, 3, 24, 24),), dynamic_shapes=shapes)
    with zipfile.ZipFile(path) as archive:
        assert any(b"Float('" in archive.read(entry) for entry in archive.namelist() if "/models/" in entry)
    loaded = si.load(path)
    for images in (torch.rand(2, 3, 24, 24), torch.rand(3, 3, 24, 17)):
        assert same(loaded(images), network(images))
    passes_against(path, loaded)


def largest(y, x):
    return y * max(x.shape[3], 20) + min(x.shape[3], 20)


@pytest.mark.parametrize(
    "function",
    [largest, lambda y, x: y * (not x.shape[3] > 200), lambda y, x: y * operator.neg(x.shape[3]) + sum(x.shape)],
)
def test_functions_of_sizes(function, path):
    network = Sized(function).eval()
    shapes = ({0: torch.export.Dim("batch"), 3: torch.export.Dim("width", min=4, max=99)},)
    loaded = si.load(write(network, path, "exported", (torch.rand(2, 3, 24, 24),), dynamic_shapes=shapes))
    for images in (torch.rand(2, 3, 24, 24), torch.rand(3, 3, 24, 17)):
        assert same(loaded(images), network(images))


# -- inputs and weights that are not there -----------------------------------------------------------------


def test_metadata_of_other_channels():
    network = timm.create_model("resnet18", in_chans=1)
    assert inferred_shapes(network) == [(2, 3, 224, 224), (2, 1, 224, 224)]
    assert "input inferred: 1 input of 2×1×224×224" in si.plan(network).notes
    assert inferred_shapes(timm.create_model("resnet18")) == [(2, 3, 224, 224)]


def test_a_network_without_numbers():
    network = torchvision.models.resnet18().to("meta")
    plan = si.plan(network)
    assert plan.steps == si.plan(torchvision.models.resnet18()).steps
    assert plan.cost().before.params == 11_689_512
    with pytest.raises(UnsupportedModel, match="have no numbers") as caught:
        si.verify(network, plan.apply(network))
    assert caught.value.seen == "`conv1.weight`"


@pytest.mark.parametrize("dry", [False, True])
def test_a_network_without_numbers_on_the_command_line(dry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.resnet18().to("meta"), "meta.pt")
    monkeypatch.setattr(sys, "argv", ["se-inject", "meta.pt", "--stages", "3,4", *(["--dry-run"] if dry else [])])
    code = None
    try:
        cli.main()
    except SystemExit as error:
        code = error.code
    told = capsys.readouterr()
    assert [file.name for file in tmp_path.iterdir()] == ["meta.pt"]
    if dry:
        assert code in (None, 0)
        assert "11,689,512" in told.out
    else:
        assert code == 1
        assert "error: the weights of this ResNet have no numbers" in told.err
