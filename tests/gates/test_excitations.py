"""Gates on data: against ten independent lines, in constant memory, on every kind of data, and on bad data."""

import copy
import gc
import json
import warnings

import numpy
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

import se_inject as si
from se_inject.cli.entry import cli
from se_inject.errors import DataError, OptionError, SurgeryError
from se_inject.gates import excitations_data, excitations_text, open_data, plot_gates, preprocessing_for
from se_inject.gates.moments import Moments
from se_inject.gates.recording import gate_method, gate_range
from se_inject.surgery import injected_blocks
from tests.common import portrait, randomise, same_portrait


class Net(nn.Module):
    """Three residual units of 8, 8 and 16 channels, a classifier."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.one = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.two = nn.Sequential(BasicBlock(8, 16, 2, down))
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))


def injected(block="se", seed=0, **options):
    """An injected network whose gates depend on the image."""
    torch.manual_seed(seed)
    model = si.inject(randomise(Net()), torch.empty(2, 3, 12, 12), block=block, init="paper", reduction=2, **options)
    with torch.no_grad():
        for _, each in injected_blocks(model):
            for parameter in each.parameters():
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def examples(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 12, 12, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 3
    return images, torch.arange(count) % 3


def in_batches(images, labels, size=7):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


def independent(model, images):
    """The gate of each block for each image: the ratio of what goes out of it and what goes in, one image at a time."""
    gates = {path: [] for path, _ in injected_blocks(model)}
    for path, block in injected_blocks(model):
        block.register_forward_hook(
            lambda block, args, out, path=path: gates[path].append((out / args[0]).flatten(2).nanmedian(2).values[0])
        )
    model = model.double()
    with torch.no_grad():
        for image in images:
            model(image[None].double())
    return {path: torch.stack(rows) for path, rows in gates.items()}


# -- the numbers -------------------------------------------------------------------------------------------


def test_figures_are_those_of_an_independent_computation():
    model, (images, labels) = injected(), examples()
    found = si.excitations(model, in_batches(images, labels))
    gates = independent(copy.deepcopy(model), images)
    assert [block.path for block in found] == ["one.0.se", "one.1.se", "two.0.se"]
    for block in found:
        g = gates[block.path]
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(block.mean, g.mean(0), **close)
        torch.testing.assert_close(block.std, g.std(0, correction=0), **close)
        torch.testing.assert_close(block.low, g.amin(0), **close)
        torch.testing.assert_close(block.high, g.amax(0), **close)
        by_class = torch.stack([g[labels == k].mean(0) for k in range(3)])
        torch.testing.assert_close(block.class_mean, by_class, **close)
        within = torch.stack([g[labels == k].std(0, correction=0) for k in range(3)])
        torch.testing.assert_close(block.class_std, within, **close)
        saturated = ((g <= 0.05) | (g >= 0.95)).double().mean()
        assert block.saturation == pytest.approx(saturated.item(), abs=1e-9)
        assert block.always_on == (g >= 0.95).all(0).double().mean().item()
        assert block.always_off == (g <= 0.05).all(0).double().mean().item()
        assert block.between_images == pytest.approx((g.var(0, correction=0).mean() / g.var(correction=0)).item(), 1e-3)
        means = by_class[labels]
        share = (means - g.mean(0)).square().sum() / (g - g.mean(0)).square().sum()
        assert block.class_share == pytest.approx(share.item(), 1e-3)
        assert block.variation == pytest.approx(
            (g.var(0, correction=0).mean() / g.mean(0).square().mean()).sqrt().item(), 1e-3
        )
    assert found.class_counts == (14, 13, 13)
    assert found.examples == 40
    depth = numpy.corrcoef([0, 1, 2], [block.average for block in found])[0, 1]
    assert found.depth_correlation["average"] == pytest.approx(depth)


def test_the_size_of_batches_and_the_order_change_nothing_but_rounding():
    model, (images, labels) = injected(), examples()
    whole = si.excitations(model, [(images, labels)])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    parts = si.excitations(model, in_batches(images[order], labels[order], 3))
    for one, other in zip(whole, parts, strict=True):
        for name in ("mean", "std", "low", "high", "class_mean", "class_std"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)


def test_the_network_is_as_it_was():
    model, (images, labels) = injected().train(), examples()
    before = portrait(model)
    si.excitations(model, in_batches(images, labels))
    same_portrait(before, portrait(model))
    with pytest.raises(DataError):
        si.excitations(model, [torch.ones(2, 5, 12, 12)])
    same_portrait(before, portrait(model))


@pytest.mark.parametrize("squeeze", ["avg", "max", "avg+max", "std"])
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "tanh", "relu"])
def test_every_gate_of_se_is_within_its_range(squeeze, gate):
    model, (images, _) = injected(squeeze=squeeze, gate=gate), examples()
    for path, block in injected_blocks(model):
        low, high = gate_range(block)
        found = si.excitations(model, [images])[path]
        assert found.ends == (low, high)
        assert float(found.low.min()) >= low
        assert float(found.high.max()) <= high
        assert (found.always_on is None) == (gate == "relu")


@pytest.mark.parametrize("block", ["eca", "ese", "fca", "gct", "srm", "nosqueeze", "simam", "ge", "bam"])
def test_any_block_with_a_gate_takes_part(block):
    torch.manual_seed(0)
    model = si.inject(randomise(Net()), torch.empty(2, 3, 12, 12), block=block, init="paper").eval()
    images, _ = examples(6)
    found = si.excitations(model, [images])
    assert len(found) == 3
    for path, module in injected_blocks(model):
        value = []
        handle = module.register_forward_pre_hook(lambda module, args, value=value: value.append(args[0]))
        with torch.no_grad():
            model(images)
            gate = module.gate(value[0]).expand_as(value[0])
        handle.remove()
        torch.testing.assert_close(found[path].mean, gate.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        if found[path].ends is not None:
            assert found[path].ends[0] <= float(gate.min())
            assert float(gate.max()) <= found[path].ends[1]


@pytest.mark.parametrize("block", ["cbam", "scse"])
def test_of_a_block_with_a_channel_part_that_part_is_seen(block):
    torch.manual_seed(0)
    model = si.inject(randomise(Net()), torch.empty(2, 3, 12, 12), block=block, init="paper").eval()
    found = si.excitations(model, [examples(6)[0]])
    assert [(each.positions, each.ends) for each in found] == [(1, (0.0, 1.0))] * 3
    assert 0 < float(found["one.0.se"].low.min()) < float(found["one.0.se"].high.max()) < 1
    assert not found.notes


def test_a_gate_that_is_computed_elsewhere_is_computed_again():
    model, (images, _) = injected(), examples()
    plain = si.excitations(model, [images])
    for _, block in injected_blocks(model):
        block.forward = lambda x, block=block: x * block.gated(block.excite(block.squeezed(x)))
    other = si.excitations(model, [images])
    for one, two in zip(plain, other, strict=True):
        assert torch.equal(one.mean, two.mean)
        assert torch.equal(one.std, two.std)


class Twice(Net):
    def forward(self, x):
        x = self.one(self.stem(x))
        return self.head(self.two(self.one(x)).mean((2, 3)))


def test_each_call_of_a_block_has_its_own_figures():
    torch.manual_seed(0)
    model = si.inject(Twice(), torch.empty(2, 3, 12, 12), init="paper", reduction=2).eval()
    found = si.excitations(model, [examples()[0]])
    names = ["one.0.se", "one.1.se", "one.0.se (call 2)", "one.1.se (call 2)", "two.0.se"]
    assert [block.name for block in found] == names
    assert not torch.equal(found["one.0.se"].mean, found["one.0.se (call 2)"].mean)


class Sometimes(Net):
    def forward(self, x):
        x = self.one(self.stem(x))
        x = self.one[0](x) if len(x) == 5 else x
        return self.head(self.two(x).mean((2, 3)))


def test_batches_may_call_other_blocks():
    torch.manual_seed(0)
    model = si.inject(Sometimes(), torch.empty(2, 3, 12, 12), init="paper", reduction=2).eval()
    images, labels = examples(17)
    found = si.excitations(model, in_batches(images, labels, 6))  # the last one has five
    assert [(block.name, block.examples) for block in found] == [
        ("one.0.se", 17), ("one.1.se", 17), ("two.0.se", 17), ("one.0.se (call 2)", 5),
    ]  # fmt: skip
    alone = si.excitations(model, [(images[:12], labels[:12])])["one.1.se"]
    rest = si.excitations(model, [(images[12:], labels[12:])])["one.1.se"]
    mean = (alone.mean * 12 + rest.mean * 5) / 17
    torch.testing.assert_close(found["one.1.se"].mean, mean)
    squares = alone.std**2 * 12 + rest.std**2 * 5 + (alone.mean - mean) ** 2 * 12 + (rest.mean - mean) ** 2 * 5
    torch.testing.assert_close(found["one.1.se"].std, (squares / 17).sqrt())


def test_moments_of_constants_are_exact():
    for value in (1.0, 0.1, 1e-30, 3e30):
        moments = Moments(3, torch.tensor([[0.05] * 3, [0.95] * 3]))
        for rows in (7, 1, 13):
            moments.add(torch.full((rows, 3), value))
        found = moments.summary(slice(0, 3), 0)
        assert found.std.eq(0).all()
        assert found.mean.eq(float(torch.tensor(value))).all()


def test_memory_does_not_grow_with_the_data():
    model = injected()
    images = torch.randn(64, 3, 12, 12)
    kept = []

    def batches(count):
        for number in range(count):
            if number % 10 == 0:
                gc.collect()
                kept.append(sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor))
            yield images, torch.arange(64) % 3

    si.excitations(model, batches(30))
    assert max(kept[2:]) <= kept[1] + 1000


# -- data of every kind ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three images in each of two folders, one that can't be read, one beside them, an empty folder."""
    from PIL import Image

    generator = numpy.random.default_rng(0)
    for name in ("cat", "dog", "empty"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for name in ("cat", "dog"):
        for number, size in enumerate([(20, 14), (12, 12), (13, 31)]):
            pixels = generator.integers(0, 255, (*size, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "cat" / "broken.png").write_bytes(b"\x89PNG no more")
    Image.fromarray(pixels).convert("L").save(tmp_path / "images" / "loose.jpg")
    (tmp_path / "images" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_a_folder_of_images(folder):
    model = injected()
    data = open_data(str(folder), lambda: preprocessing_for(model, (1, 3, 12, 12)), batch=4)
    assert data.classes == ("cat", "dog")
    found = si.excitations(model, data)
    assert (found.classes, found.class_counts, found.examples) == (("cat", "dog"), (3, 3), 6)
    notes = "\n".join(data.all_notes())
    assert "skipped" in notes and "broken.png" in notes
    assert "1 folder without images, `empty`" in notes
    assert "1 image beside the folders of classes" in notes
    assert "resized and cropped to 12×12" in notes
    again = si.excitations(model, data)
    assert all(torch.equal(one.mean, two.mean) for one, two in zip(found, again, strict=True))


def test_an_image_becomes_what_torchvision_makes_of_it(folder):
    from PIL import Image
    from torchvision.transforms import v2

    model = injected()
    data = open_data(str(folder), lambda: preprocessing_for(model, (1, 3, 12, 12)), batch=4)
    images = torch.cat([images for images, _ in data])
    steps = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    file = folder / "dog" / "1.png"  # 12 × 12: resized to 14, cropped to 12
    want = Image.open(file).resize((14, 14), Image.Resampling.BICUBIC).crop((1, 1, 13, 13))
    torch.testing.assert_close(images[4], v2.Compose(steps)(want))


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_arrays(tmp_path, suffix):
    model, (images, labels) = injected(), examples()
    path = tmp_path / f"data{suffix}"
    if suffix == ".pt":
        torch.save((images, labels), path)
    else:
        numpy.savez(path, images=images.numpy(), labels=labels.numpy())
    data = open_data(str(path), lambda: preprocessing_for(model, (1, 3, 12, 12)), batch=7)
    assert data.count == 40
    found, want = si.excitations(model, data), si.excitations(model, in_batches(images, labels))
    assert found.class_counts == want.class_counts
    assert all(torch.equal(one.class_mean, two.class_mean) for one, two in zip(found, want, strict=True))


def test_bytes_with_the_colours_last_are_prepared_as_images_are(tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 255, (5, 12, 12, 3), dtype=numpy.uint8)
    numpy.savez(tmp_path / "data.npz", x=pixels, y=numpy.arange(5))
    prepared = preprocessing_for(Net(), (1, 3, 12, 12), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    data = open_data(str(tmp_path / "data.npz"), lambda: prepared)
    ((images, labels),) = data
    want = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(images, want)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert "the colours are the last dimension" in "\n".join(data.all_notes())


def test_a_function_of_the_users(tmp_path):
    (tmp_path / "my_data.py").write_text(
        "import torch\n\ndef batches():\n    for _ in range(3):\n        yield torch.ones(2, 3, 12, 12), torch.tensor([0, 1])\n"
    )
    data = open_data(f"{tmp_path}/my_data.py:batches", lambda: None)
    found = si.excitations(injected(), data)
    assert (found.examples, found.class_counts) == (6, (3, 3))


def test_forms_of_batches():
    model, (images, labels) = injected(), examples(12)
    want = si.excitations(model, [(images, labels)])
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    for batches in (loader, [[images, labels]], [(images, labels[:, None])], [{"x": images, "labels": labels}]):
        found = si.excitations(model, batches, classes=["a", "b", "c"])
        assert found.classes == ("a", "b", "c")
        assert found.class_counts == want.class_counts
        torch.testing.assert_close(found["one.0.se"].mean, want["one.0.se"].mean)
    assert si.excitations(model, images).classes == ()  # a tensor is one batch
    assert si.excitations(model, iter([images])).source is None
    assert si.excitations(model, loader).source is loader


# -- bad data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "no example"),
        ([torch.empty(0, 3, 12, 12)], "no example"),
        ([torch.randn(2, 4, 12, 12)], "fails on the data"),
        ([torch.randn(2, 3)], "fails on the data"),
        (["images"], "not a batch"),
        ([None], "not a batch"),
        (7, "can't be iterated"),
        ([torch.full((2, 3, 12, 12), torch.nan)], "NaN"),
        ([1.0, None], "not a batch"),
        ([(torch.randn(2, 3, 12, 12), torch.tensor([0, -1]))], "negative"),
    ],
)
def test_bad_batches(batches, says):
    with pytest.raises(DataError, match=says):
        si.excitations(injected(), batches)


def test_an_exception_in_the_users_data_is_told():
    def batches():
        yield torch.randn(2, 3, 12, 12)
        raise OSError("disk gone")

    with pytest.raises(DataError) as caught:
        si.excitations(injected(), batches())
    assert "disk gone" in str(caught.value)


def test_networks_without_gates():
    with pytest.raises(SurgeryError, match="no block"):
        si.excitations(Net(), [examples()[0]])
    triplet = si.inject(Net(), torch.empty(2, 3, 12, 12), block="coord", init="paper")
    if all(gate_method(block) is None for _, block in injected_blocks(triplet)):
        with pytest.raises(SurgeryError, match="offers its gate"):
            si.excitations(triplet, [examples()[0]])


def test_examples_that_give_nan_are_left_out_and_counted():
    model, (images, labels) = injected(), examples(10)
    images[3] = 1e38  # overflows behind the first convolutions
    found = si.excitations(model, [(images, labels)])
    assert found.examples == 9
    assert any("1 example of 10 gave NaN" in note for note in found.notes)
    others = torch.arange(10) != 3
    want = si.excitations(model, [(images[others], labels[others])])
    torch.testing.assert_close(found["two.0.se"].mean, want["two.0.se"].mean)
    with pytest.raises(DataError, match="every one of 2 examples"):
        si.excitations(model, [torch.full((2, 3, 12, 12), 1e38)])


def test_notes_on_what_the_figures_can_not_say():
    model, (images, _) = injected(), examples(4)
    fresh = si.inject(Net(), torch.empty(2, 3, 12, 12)).eval()
    found = si.excitations(fresh, [images])
    assert any("exactly 1" in note and "nothing was trained" in note for note in found.notes)
    assert [block.average for block in found] == [1.0] * 3
    assert [block.spread for block in found] == [0.0] * 3
    found = si.excitations(model, [(images, torch.tensor([0, 0, 0, 1]))])
    assert any("1 class with one example" in note for note in found.notes)
    with torch.no_grad():
        for _, block in injected_blocks(model):
            block.fc2.weight.zero_()
    assert any("every gate is constant" in note for note in si.excitations(model, [images]).notes)
    assert any("no spread" in note for note in si.excitations(model, [images[:1]]).notes)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.npz", b"PK\x03\x04 no archive", "can't be read"),
        ("data.pt", b"garbage", "more than tensors|can't be read"),
        ("data.csv", b"1,2", "can't be read as data"),
    ],
)
def test_bad_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        open_data(str(tmp_path / name), lambda: None)


def test_bad_sources(tmp_path):
    prepared = preprocessing_for(Net(), (1, 3, 12, 12))
    with pytest.raises(DataError, match="no images"):
        open_data(str(tmp_path), lambda: prepared)
    with pytest.raises(FileNotFoundError):
        open_data(str(tmp_path / "none"), lambda: prepared)
    (tmp_path / "one.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 1 image could be read"):
        list(open_data(str(tmp_path), lambda: prepared))
    torch.save({"words": ["a"]}, tmp_path / "words.pt")
    with pytest.raises(DataError, match="no array"):
        open_data(str(tmp_path / "words.pt"), lambda: prepared)
    numpy.savez(tmp_path / "objects.npz", x=numpy.array([{}], dtype=object))
    with pytest.raises(DataError):
        open_data(str(tmp_path / "objects.npz"), lambda: prepared)
    (tmp_path / "seven.py").write_text("def batches():\n    return 7\n")
    with pytest.raises(DataError, match="gave no batches"):
        list(open_data(f"{tmp_path}/seven.py:batches", lambda: prepared))
    with pytest.raises(OptionError):
        preprocessing_for(Net(), (1, 3, 12, 12), mean=(0.5,))
    with pytest.raises(OptionError):
        preprocessing_for(Net(), (1, 3, 12))


# -- tables, data, picture, command ------------------------------------------------------------------------


def test_text_and_data():
    found = si.excitations(injected(), in_batches(*examples()))
    text = str(found)
    assert "Gates of Net over 40 examples" in text
    assert "correlation with depth: mean" in text
    assert text.count("one.0.se") == 1
    assert excitations_text(found, by_class=True).count("one.0.se") == 4
    assert excitations_text(found, "csv").splitlines()[0].startswith("stage,block,kind,channels,mean")
    assert len(excitations_text(found, "csv", by_class=True).splitlines()) == 10
    data = json.loads(json.dumps(excitations_data(found, by_class=True), allow_nan=False))
    assert len(data["blocks"]) == 3
    assert len(data["blocks"][2]["class_mean"][1]) == 16
    assert data["classes"][0] == {"class": "0", "examples": 14}


def test_the_picture_has_a_panel_for_each_block_and_a_line_for_each_class(tmp_path):
    found = si.excitations(injected(), in_batches(*examples()), classes=["cat", "dog", "owl"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plot_gates(found, tmp_path / "gates.svg")
        plot_gates(si.excitations(injected(), [examples()[0]]), tmp_path / "gates.png")
    text = (tmp_path / "gates.svg").read_text()
    for word in ("one.0.se", "one.1.se", "two.0.se", "cat", "dog", "owl", "all images"):
        assert f"<!-- {'stage' if 'se' in word else word}" in text
    with pytest.raises(OptionError, match="no block"):
        plot_gates(found, tmp_path / "other.svg", blocks=["nowhere"])
    with pytest.raises(OptionError, match="no class"):
        plot_gates(found, tmp_path / "other.svg", classes=["cow"])
    assert not (tmp_path / "other.svg").exists()


def test_the_command(folder, tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torchvision.models.resnet import BasicBlock\nimport se_inject as si\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), BasicBlock(8, 8), BasicBlock(8, 8))\n"
        "    return si.inject(body, torch.empty(2, 3, 12, 12), init='paper', reduction=2)\n"
    )
    command = ["excitations", f"{tmp_path}/nets.py:net", "--input", "3x12x12", "--data"]
    done = CliRunner().invoke(
        cli, [*command, str(folder), "--classes", "--plot", f"{tmp_path}/gates.png", "--draw", f"{tmp_path}/net.svg"]
    )
    assert done.exit_code == 0, done.output
    assert "Gates of Sequential over 6 examples" in done.stdout
    assert "cat" in done.stdout
    assert "broken.png" in done.stderr
    assert (tmp_path / "gates.png").stat().st_size > 1000
    assert "variation, from 0 to the largest" in (tmp_path / "net.svg").read_text()
    done = CliRunner().invoke(cli, [*command, str(folder), "--json", "--limit", "1"])
    assert json.loads(done.stdout)["examples"] == 6
    done = CliRunner().invoke(cli, [*command, str(tmp_path / "none")])
    assert isinstance(done.exception, FileNotFoundError)
    assert done.stdout == ""
