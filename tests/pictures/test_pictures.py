"""Pictures of networks: what is in them, where blocks sit, that they can be read, and that they are quick to make."""

import os
import time
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torchvision.models.resnet import BasicBlock

import se_inject as si
from se_inject import figures
from se_inject.cli.entry import cli
from se_inject.errors import ExportError, OptionError
from se_inject.pictures.shapes import DARK, LIGHT, Path, Rect, Text, heat, text_width
from se_inject.sites import parts_of, sites_in
from tests.common import build

SVG = "{http://www.w3.org/2000/svg}"


class Net(nn.Module):
    """A stem, two stages of residual units, a concatenation that can't be gated, and a classifier."""

    def __init__(self, units=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(2))
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.one = nn.Sequential(*[BasicBlock(8, 8) for _ in range(units)])
        self.two = nn.Sequential(BasicBlock(8, 16, 2, down), *[BasicBlock(16, 16) for _ in range(units - 1)])
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        fine = self.one(self.stem(x))
        coarse = nn.functional.interpolate(self.two(fine), scale_factor=2)
        return self.head(torch.cat([fine, coarse], 1).mean((2, 3)))


def planned(model=None, size=64, **options):
    return si.plan(model or Net(), torch.empty(2, 3, size, size), reduction=4, **options)


def shapes(plan, kind, *roles):
    return [s for s in plan.draw().drawing.shapes if isinstance(s, kind) and (not roles or s.role in roles)]


def texts(plan):
    return [shape.text for shape in shapes(plan, Text)]


def test_every_block_is_drawn_in_its_unit():
    plan = planned()
    blocks = [rect for rect in shapes(plan, Rect, "b0") if rect.title and rect.width == 6]
    assert [block.title.partition(":")[0] for block in blocks] == [step.path for step in plan.steps]
    units = [rect for rect in shapes(plan, Rect, "unit") if "site" in rect.title]
    assert len(units) == len(blocks) == 4
    for unit, block in zip(units, blocks, strict=True):
        assert unit.x + unit.width / 2 < block.x
        assert block.x + block.width <= unit.x + unit.width
        assert unit.y < block.y
        assert block.y + block.height < unit.y + unit.height


def test_height_is_by_resolution_and_width_by_channels():
    one, _, two, _ = (rect for rect in shapes(planned(), Rect, "unit") if "site" in rect.title)
    assert one.height > two.height
    assert one.width < two.width


@pytest.mark.parametrize("position", ["standard", "pre", "post", "identity", "conv3x3"])
def test_a_block_sits_where_its_position_says(position):
    plan = planned(position=position)
    units = [rect for rect in shapes(plan, Rect, "unit") if "site" in rect.title]
    blocks = [rect for rect in shapes(plan, Rect, "b0") if rect.title and rect.height != 26]
    for unit, block in zip(units, blocks, strict=True):
        middle, centre = block.x + block.width / 2, unit.x + unit.width / 2
        assert {
            "standard": centre < middle < unit.x + unit.width,
            "pre": unit.x < middle < centre,
            "post": middle > unit.x + unit.width,
            "identity": block.y + block.height <= unit.y,
            "conv3x3": abs(middle - centre) < 4,
        }[position]
    inside = [
        shape
        for shape in plan.draw().drawing.shapes
        if isinstance(shape, Text) and shape.bold and shape.text == position
    ]
    assert len(inside) == 2  # the name of the position is drawn in each of the two kinds of unit


@pytest.mark.parametrize(
    ("position", "before", "behind"),
    [
        ("standard", "BN", "+"),
        ("pre", None, "3×3"),
        ("conv3x3", "BN", "+"),
        ("post", "ReLU", None),
        ("identity", None, "+"),
    ],
)
def test_inside_a_unit_a_block_stands_between_its_neighbours(position, before, behind):
    plan = planned(position=position, at=["one.0.*"])
    row = [shape for shape in shapes(plan, Text) if shape.size in (11.5, 12, 14) and shape.anchor == "middle"]
    first = next(shape for shape in row if shape.text == "SE r = 4")
    line = sorted((s for s in row if abs(s.y - first.y) < 2 and s.x < 600), key=lambda shape: shape.x)
    words = [shape.text for shape in line]
    at = words.index("SE r = 4")
    assert (words[at - 1] if at else None) == before
    if behind != "+" or position != "identity":
        assert (words[at + 1] if at + 1 < len(words) else None) == behind


def test_stages_are_named_with_their_path_size_channels_and_stride():
    found = "\n".join(texts(planned()))
    for words in (
        "Net",
        "4 SE blocks",
        "Stage 1",
        "Stage 2",
        "one",
        "16×16 · 8 ch",
        "stride 4 · C2",
        "8×8 · 16 ch",
        "stride 8 · C3",
    ):
        assert words in found
    for words in ("7×7 conv /2", "max pool", "linear → 5", "BasicBlock", "Inside the units"):
        assert words in found


def test_a_refused_place_is_hatched_and_says_why():
    refused = [rect for rect in shapes(planned(), Rect, "refused") if rect.title]
    assert len(refused) == 1
    assert "no place for a block" in refused[0].title
    assert 'class="hatch"' in planned().draw().svg()


def test_the_picture_of_an_injected_network_is_that_of_its_plan():
    model = Net()
    plan = planned(model)
    injected = plan.apply(model)
    again = si.plan_of(injected, torch.empty(2, 3, 64, 64)).draw(injected, example_inputs=torch.empty(2, 3, 64, 64))
    assert again.svg() == plan.draw().svg()
    stored = si.Plan.from_json(plan.to_json())
    assert stored.draw(model).svg() == plan.draw().svg()
    with pytest.raises(OptionError, match="needs the network"):
        stored.draw()


def test_it_can_be_coloured_by_what_gates_did():
    model = Net()
    plan = planned(model, init="paper")
    gates = si.excitations(plan.apply(model), [torch.randn(6, 3, 64, 64)])
    picture = plan.draw(gates=gates, by="between_images")
    levels = [
        s for s in picture.drawing.shapes if isinstance(s, Rect) and s.role.startswith("h") and s.title and s.width == 6
    ]
    figures = [block.between_images for block in gates]
    assert [int(level.role[1:]) for level in levels] == [round(6 * figure / max(figures)) for figure in figures]
    assert "between images, from 0 to the largest" in texts_of(picture)
    with pytest.raises(OptionError, match="no figure"):
        plan.draw(gates=gates, by="colour")


def texts_of(picture):
    return [shape.text for shape in picture.drawing.shapes if isinstance(shape, Text)]


@pytest.mark.parametrize(
    "name", ["torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:densenet121", "timm:hrnet_w18_small"]
)
def test_pictures_of_known_networks_are_whole(name):
    plan = si.plan(build(name))
    picture = plan.draw()
    root = ElementTree.fromstring(picture.svg())
    drawn = [
        each.find(f"{SVG}title")
        for each in root.iter(f"{SVG}rect")
        if each.get("class") == "b0" and each.get("width") == "6.0"
    ]
    counts = [each.text for each in root.iter(f"{SVG}text") if (each.text or "").startswith("×")]
    if not counts:
        assert sum(title is not None for title in drawn) == len(plan)
    assert root.find(f"{SVG}title").text == picture.drawing.title
    assert f"{len(plan)} SE blocks" in root.find(f"{SVG}desc").text
    for shape in picture.drawing.shapes:
        if isinstance(shape, Text) and shape.anchor == "start":
            assert shape.x + 0.8 * text_width(shape.text, shape.size, shape.bold) <= picture.drawing.width + 16
    assert 500 < picture.drawing.width < 1600
    assert len(picture.svg()) < 100_000


def overlapping(picture):
    """Pairs of units or chips that lie on one another."""
    rects = [
        s
        for s in picture.drawing.shapes
        if isinstance(s, Rect) and s.role in ("unit", "plain") and s.height > 15 and s.title
    ]
    return [
        (a.title, b.title)
        for number, a in enumerate(rects)
        for b in rects[number + 1 :]
        if a.x < b.x + b.width - 6.1 and b.x < a.x + a.width - 6.1 and a.y < b.y + b.height - 6.1 and b.y < a.y + a.height - 6.1
        and a.title != b.title
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["torchvision:resnet50", "torchvision:googlenet", "timm:hrnet_w18_small"])
def test_nothing_lies_on_its_neighbour(name):
    assert overlapping(si.plan(build(name)).draw()) == []


class Unit(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def test_a_long_network_is_folded_and_quick_to_draw():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), *[Unit(8) for _ in range(150)], nn.Conv2d(8, 16, 3, 2), *[Unit(16) for _ in range(150)]
    )
    plan = planned(model, size=16)
    assert len(plan) == 300
    times = []
    for _ in range(3):
        start = time.perf_counter()
        picture = plan.draw()
        picture.svg()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2
    assert [text for text in texts_of(picture) if text.startswith("×")] == ["×150", "×150"]
    assert len(picture.svg()) < 12_000


def test_parts_of_a_unit():
    plan = planned()
    site = sites_in(plan.trace)[2]
    parts = parts_of(plan.trace, site)
    assert [[op.text for op in lane if op.kind != "end"] for lane in parts.lanes] == [
        ["3×3 /2", "BN", "ReLU", "3×3", "BN"], ["1×1 /2", "BN"],
    ]  # fmt: skip
    assert (parts.join, [op.text for op in parts.after]) == ("add", ["ReLU"])


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(theme):
    for ground in (theme.ground, theme.band):
        assert contrast(theme.ink, ground) >= 7
        assert contrast(theme.muted, ground) >= 4.5
    assert min(contrast(theme.ink, chip) for chip in (theme.unit, theme.plain)) >= 4.5
    assert min(contrast(theme.on_block, colour) for colour in theme.blocks) >= 4.5
    assert min(contrast(colour, theme.unit) for colour in theme.blocks) >= 3  # a bar in its unit
    assert len(set(heat(theme))) == 7


def test_files(tmp_path):
    picture = planned().draw()
    picture.save(tmp_path / "net.svg")
    assert (tmp_path / "net.svg").read_text() == picture.svg() == picture._repr_svg_()
    assert "prefers-color-scheme:dark" in picture.svg()
    with pytest.raises(ExportError, match="exists"):
        picture.save(tmp_path / "net.svg")
    picture.save(tmp_path / "net.png")
    assert (tmp_path / "net.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(OptionError, match="can't draw to"):
        picture.save(tmp_path / "net.jpg")
    assert "Stage 1 (one, 16×16 · 8 ch, stride 4 · C2): 2 units, 2 blocks." in str(picture)


def test_a_notebook_shows_the_picture_and_the_table():
    html = planned()._repr_html_()
    assert html.startswith("<svg")
    assert "<pre>4 blocks for Net" in html
    assert si.Plan.from_json(planned().to_json())._repr_html_().startswith("<pre>")


def test_names_out_of_a_network_can_not_break_the_picture():
    class Odd(Net):
        pass

    Odd.__name__ = "<script>alert(1)</script>&"
    root = ElementTree.fromstring(planned(Odd()).draw().svg())
    assert not list(root.iter(f"{SVG}script"))


def test_lines_join_what_they_should():
    """The line of data goes from the left of the first box to the right of the last."""
    picture = planned().draw()
    flow = next(s for s in picture.drawing.shapes if isinstance(s, Path) and s.arrow)
    boxes = [
        s
        for s in picture.drawing.shapes
        if isinstance(s, Rect) and s.title and s.y < flow.points[0][1] < s.y + s.height
    ]
    assert flow.points[0][0] < min(box.x for box in boxes)
    assert flow.points[-1][0] > max(box.x + box.width for box in boxes)


def test_the_command(tmp_path):
    source = (
        "import torch\nfrom torchvision.models.resnet import BasicBlock\nimport se_inject as si\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), BasicBlock(8, 8), BasicBlock(8, 8))\n"
        "def injected():\n    return si.inject(net(), torch.empty(2, 3, 12, 12), position='post')\n"
    )
    (tmp_path / "nets.py").write_text(source)
    command = ["draw", f"{tmp_path}/nets.py:net", "--input", "3x12x12", "-o"]
    done = CliRunner().invoke(cli, [*command, f"{tmp_path}/a.svg", "-o", f"{tmp_path}/a.png", "--block", "eca"])
    assert done.exit_code == 0, done.output
    assert "2 ECA blocks" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.png").exists()
    command[1] = f"{tmp_path}/nets.py:injected"
    done = CliRunner().invoke(cli, [*command, f"{tmp_path}/b.svg"])
    assert done.exit_code == 0, done.output
    assert ">post<" in (tmp_path / "b.svg").read_text()
    done = CliRunner().invoke(cli, [*command, f"{tmp_path}/c.svg", "--stages", "1"])
    assert isinstance(done.exception, OptionError)
    done = CliRunner().invoke(cli, [*command, f"{tmp_path}/c.gif"])
    assert isinstance(done.exception, OptionError)
    assert not (tmp_path / "c.svg").exists()


@pytest.mark.parametrize("may_be_read", [True, False])
def test_matplotlib_is_imported_elsewhere_if_its_settings_here_may_not_be_read(may_be_read, tmp_path, monkeypatch):
    """As in a confined process, which sees that there is a `matplotlibrc` in the folder of a stranger's file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "matplotlibrc").touch()
    folders = []

    def opened(path, mode):
        if not may_be_read:
            raise PermissionError(path)
        return open(path, mode)

    monkeypatch.setattr(figures, "open", opened, raising=False)
    monkeypatch.setattr(
        figures.importlib, "import_module", lambda name: folders.append(os.getcwd()) or SimpleNamespace(Figure=1)
    )
    assert figures.figure_class() == 1
    assert (folders == [str(tmp_path)]) is may_be_read
    assert os.getcwd() == str(tmp_path)
