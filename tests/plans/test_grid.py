"""Costs side by side: the paper's tables, every cell against its own plan, and how blocks start."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

import se_inject as si
from se_inject.errors import ExportError, NoSites, OptionError, PluginError, SiteNotFound
from se_inject.plans import grid_data, grid_text
from se_inject.plans.grid import block_costs
from se_inject.plans.plot import plot_grid
from se_inject.plans.starts import start_factor, start_factors
from se_inject.sites.selection import Sites
from se_inject.sites.site import HeldBack, Site
from se_inject.tables import counted, percent
from tests.common import build

BASE = 25_557_032
TABLE_10 = {2: 45_676_584, 4: 35_616_808, 8: 30_586_920, 16: 28_071_976, 32: 26_814_504}
TABLE_13 = {"1": 25_581_608, "2": 25_688_104, "3": 26_343_464, "4": 27_129_896}
X = torch.empty(2, 3, 20, 20, device="meta")


def wider(i, o):
    return BasicBlock(i, o, 2, nn.Sequential(nn.Conv2d(i, o, 1, 2, bias=False), nn.BatchNorm2d(o)))


class Net(nn.Module):
    """Three stages of 8, 16 and 16 channels; the block of the last is called twice. It counts its calls."""

    def __init__(self, units=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Sequential(*[BasicBlock(8, 8) for _ in range(units)])
        self.two = nn.Sequential(wider(8, 16), *[BasicBlock(16, 16) for _ in range(units)])
        self.three = nn.Sequential(wider(16, 16))
        self.again = BasicBlock(16, 16)
        self.called = 0

    def forward(self, x):
        type(self).count += 1
        x = self.three(self.two(self.one(self.stem(x))))
        return self.again(self.again(x))

    count = 0


@pytest.fixture(scope="module")
def resnet50():
    return build("torchvision:resnet50")


def block_file(tmp_path, body):
    """``file.py:Block``, whose class body this is."""
    path = tmp_path / "made_up.py"
    path.write_text(f"import torch\nfrom torch import nn\n\n\nclass Block(nn.Module):\n{body}")
    return f"{path}:Block"


# -- the paper ---------------------------------------------------------------------------------------------


def test_tables_10_and_13_of_the_paper_in_one_grid(resnet50):
    grid = si.cost_grid(resnet50, bias=False)
    assert grid.before.params == BASE
    assert grid.reductions == (2, 4, 8, 16, 32)
    assert grid.stages == ("1", "2", "3", "4", "all", "all-but-last")
    assert {r: BASE + grid["all", r].added.params for r in grid.reductions} == TABLE_10
    assert {stage: BASE + grid[stage, 16].added.params for stage in TABLE_13} == TABLE_13
    for r in grid.reductions:  # equation 5: 2/r · Σ N_s · C_s², and as many MACs
        parts = {"1": 3 * 256**2, "2": 4 * 512**2, "3": 6 * 1024**2, "4": 3 * 2048**2}
        expected = {stage: 2 * part // r for stage, part in parts.items()}
        expected |= {"all": sum(expected.values()), "all-but-last": sum(expected.values()) - expected["4"]}
        assert {stage: grid[stage, r].added.params for stage in grid.stages} == expected
        assert {stage: grid[stage, r].added.macs for stage in grid.stages} == expected


def test_all_but_the_last_stage_takes_4_percent_instead_of_10(resnet50):
    without, released = si.cost_grid(resnet50, reductions=[16], bias=False), si.cost_grid(resnet50, reductions=[16])
    assert without["all", 16].added.params == 2_514_944
    assert without["all-but-last", 16].added.params == 942_080
    assert BASE + released["all-but-last", 16].added.params == 26_508_632
    assert (without["all", 16].blocks, without["all-but-last", 16].blocks) == (16, 13)
    text = grid_text(without)
    assert "2,514,944 (+9.8 %)" in text
    assert "942,080 (+3.7 %)" in text


# -- cells and plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divisor": 8, "bias": False, "init": "paper"},
        {"position": "identity", "block": "cbam"},
        {"block": "ge", "kind": "plus"},
        {"block": "eca"},
    ],
    ids=str,
)
def test_every_cell_is_what_its_plan_costs(options):
    network = Net()
    ratios = [None] if options.get("block") == "eca" else [3, 16]
    choices = ["1", "2", "3", "4", "all", "all-but-last", "2,3", "two.0,1-2"]
    grid = si.cost_grid(
        network, X, reductions=None if ratios == [None] else ratios, stages=["each", *choices[6:]], **options
    )
    assert [(cell.stages, cell.reduction) for cell in grid.cells] == list(itertools.product(choices, ratios))
    for cell in grid.cells:
        more = {} if cell.reduction is None else {"reduction": cell.reduction}
        plan = si.plan(network, X, stages=cell.stages, **options, **more)
        cost = plan.cost()
        assert (cell.blocks, cell.added, grid.before) == (len(plan), cost.added, cost.before)


def test_the_network_is_called_as_often_for_one_cell_as_for_many():
    network, counts = Net(), []
    for options in ({"reductions": [4], "stages": "1"}, {"reductions": range(1, 40), "stages": "each"}):
        before = Net.count
        si.cost_grid(network, X, **options)
        counts.append(Net.count - before)
    assert counts[0] == counts[1]
    assert not network.state_dict().keys() - Net().state_dict().keys()


def test_equal_blocks_are_measured_once(tmp_path):
    body = """
    count = 0

    def __init__(self, channels, reduction=16):
        super().__init__()

    def forward(self, x):
        type(self).count += 1
        return x * 1
"""
    from se_inject.blocks.registry import find_block

    name, counts = block_file(tmp_path, body), []
    for units in (1, 6):
        find_block(name).count = 0
        si.cost_grid(Net(units), X, reductions=[2, 4], block=name)
        counts.append(find_block(name).count)
    assert counts[0] == counts[1] > 0


def test_blocks_that_are_there_already_are_left_out():
    network = si.inject(Net(), X, stages="all-but-last")
    grid = si.cost_grid(network, X)
    assert grid.stages == ("4", "all")
    assert any("already" in note for note in grid.notes)
    with pytest.raises(NoSites, match="`1`"):
        si.cost_grid(network, X, stages=["1"])


def test_nothing_is_changed():
    network = Net()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    assert si.cost_grid(network, X) == si.cost_grid(network, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training


# -- choices of stages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "labels"),
    [
        ("each", ["1", "2", "3", "4", "all", "all-but-last"]),
        ("2-3", ["2-3"]),
        (2, ["2"]),
        ([1, [2, 3], "all", "all"], ["1", "2,3", "all"]),
        (["each", "one,three"], ["1", "2", "3", "4", "all", "all-but-last", "one,three"]),
    ],
    ids=str,
)
def test_choices(stages, labels):
    assert list(si.cost_grid(Net(), X, stages=stages).stages) == labels


def test_all_but_last_is_a_choice_everywhere():
    network = Net()
    sites = si.find_sites(network, X)
    last = sites.last_stage
    assert last == 4
    chosen = [site.address for site in sites.stages("all-but-last")]
    assert chosen == [site.address for site in sites.stages(f"1-{last - 1}")]
    assert [step.site for step in si.plan(network, X, stages="all-but-last").steps] == chosen
    assert [step.site for step in si.plan(network, X, stages=["all-but-last", 4]).steps] == [
        site.address for site in sites.stages("all")
    ]


def test_the_last_stage_is_the_backbones():
    draft = Site("a", "a", None, "residual", 8, (4, 4), (4.0, 4.0), 0, "", "a", stage=1)
    sites = tuple(
        replace(draft, address=name, order=order, stage=stage, held_back=held)
        for order, (name, stage, held) in enumerate(
            [("a", 1, None), ("b", 2, None), ("c", 3, None), ("n", 4, HeldBack.NECK)]
        )
    )
    found = Sites(sites, (), sites)
    assert found.last_stage == 3
    assert "c" not in [site.address for site in found.stages("all-but-last")]
    assert [site.address for site in found.stages("all-but-last")][:2] == ["a", "b"]


def test_a_network_of_one_stage_has_none_but_the_last():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(BasicBlock(8, 8)))
    assert si.cost_grid(network, X).stages == ("1", "all")
    with pytest.raises(SiteNotFound, match="no stage matches `all-but-last`"):
        si.plan(network, X, stages="all-but-last")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stages": []}, SiteNotFound, "empty choice"),
        ({"stages": [[]]}, SiteNotFound, "empty choice"),
        ({"stages": "9"}, SiteNotFound, "no stage matches `9`"),
        ({"stages": [1, "threee"]}, SiteNotFound, "no stage matches `threee`"),
        ({"reductions": []}, OptionError, "empty list"),
        ({"reductions": [4, 0]}, OptionError, "must be positive"),
        ({"reductions": [4, math.nan]}, OptionError, "must be positive"),
        ({"reductions": [math.inf]}, OptionError, "must be positive and finite"),
        ({"reduction": 4}, OptionError, "several ratios"),
        ({"block": "eca", "reductions": [4]}, OptionError, "no option `reduction`"),
        ({"block": "ecca"}, OptionError, "no block is called"),
        ({"biass": True}, OptionError, "no option `biass`"),
        ({"position": "up"}, OptionError, "no position"),
    ],
    ids=str,
)
def test_what_is_asked_wrongly(options, error, message):
    with pytest.raises(error, match=message):
        si.cost_grid(Net(), X, **options)


def test_a_block_that_fails_with_one_ratio_is_named(tmp_path):
    body = """
    def __init__(self, channels, reduction=16):
        super().__init__()
        self.reduction = reduction

    def forward(self, x):
        return x * 1 if self.reduction == 4 else x[0]
"""
    with pytest.raises(PluginError, match="made_up"):
        si.cost_grid(Net(), X, block=block_file(tmp_path, body), reductions=[2, 4])


def test_a_bottleneck_one_wide_is_noted_once():
    notes = [note for note in si.cost_grid(Net(), X, reductions=[2, 24]).notes if "wide" in note]
    assert [note.partition(",")[0] for note in notes] == [
        "r = 24 is too much for the 8 to 16 channels of some sites: the bottleneck is 4 wide there"
    ]


# -- tables and pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (2_359_296, 4_089_184_256, "+0.058 %"),
        (24_576, 4_089_184_256, "+0.00060 %"),
        (2_372_352, 25_557_032, "+9.3 %"),
        (942_080, 25_557_032, "+3.7 %"),
        (3, 2, "+150 %"),
        (-1, 3, "-33 %"),
        (0, 5, "+0 %"),
        (1, 0, "–"),
    ],
)
def test_a_share_has_two_significant_digits(part, whole, text):
    assert percent(part, whole) == text


def test_one_and_many():
    assert [counted(number, "SE block") for number in (0, 1, 2, 1234)] == [
        "0 SE blocks",
        "1 SE block",
        "2 SE blocks",
        "1,234 SE blocks",
    ]


def test_the_grid_as_data_is_the_grid():
    grid = si.cost_grid(Net(), X, reductions=[4, 16])
    data = grid_data(grid)
    assert [(cell["stages"], cell["r"], cell["params"]) for cell in data["cells"]] == [
        (cell.stages, cell.reduction, cell.added.params) for cell in grid.cells
    ]
    assert data["before"]["flops"] == 2 * grid.before.macs


@pytest.mark.parametrize(
    ("block", "suffix", "start"), [("se", ".png", b"\x89PNG"), ("eca", ".svg", b"<?xml"), ("gct", ".pdf", b"%PDF")]
)
def test_a_picture_of_the_grid(tmp_path, block, suffix, start):
    path = tmp_path / f"cost{suffix}"
    plot_grid(si.cost_grid(Net(), X, block=block), path)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ExportError, match="exists"):
        plot_grid(si.cost_grid(Net(), X, block=block), path)


def test_a_picture_shows_what_the_grid_says(tmp_path):
    from matplotlib.figure import Figure

    from se_inject.plans.plot import _draw

    grid = si.cost_grid(Net(), X, reductions=[2, 8])
    axes = Figure().subplots()
    _draw(axes, grid, "params")
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {
        stages: [pytest.approx(100 * grid[stages, r].added.params / grid.before.params) for r in (2, 8)]
        for stages in grid.stages
    }


# -- every block side by side ------------------------------------------------------------------------------


def test_every_block_on_a_network_costs_what_its_plan_costs():
    network = Net()
    costs = {item.block: item for item in block_costs(network, X)}
    assert {"se", "eca", "simam"} <= costs.keys()
    for name, item in costs.items():
        if item.refused is None:
            plan = si.plan(network, X, block=name)
            assert item.added == plan.cost().added
            assert item.identity == (plan.steps[0].init == "identity")
            assert (item.start == (1, 1)) == item.identity


def test_a_block_for_two_dimensions_is_refused_on_a_signal():
    unit = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
    costs = {item.block: item for item in block_costs(unit, torch.empty(2, 4, 30, device="meta"))}
    assert "two spatial dimensions" in costs["ge"].refused
    assert costs["ge"].added is None
    assert costs["se"].added.params == 8 * 4 * 2 + 8 + 4


# -- how blocks start --------------------------------------------------------------------------------------


def test_the_factor_of_a_block_that_scales_is_that_factor(tmp_path):
    name = block_file(
        tmp_path,
        "    def __init__(self, channels):\n        super().__init__()\n        self.a = channels / 100\n\n    def forward(self, x):\n        return self.a * x\n",
    )
    assert start_factor(name, 16, (20, 20), {}, "paper") == pytest.approx(0.16)
    low, high = start_factors(si.plan(Net(), X, block=name).steps)[name]
    assert (low, high) == (pytest.approx(0.08), pytest.approx(0.16))


def test_an_identity_has_factor_1():
    assert start_factor("se", 16, (7, 7), {}, "identity") == 1
    assert start_factors(si.plan(Net(), X).steps) == {}


def test_simam_starts_as_its_formula_says():
    """y = x · σ(x² / 4 + 1/2) for x of variance 1: the integral of x·y over the normal distribution."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = torch.trapezoid(z.square() * torch.sigmoid(z.square() / 4 + 0.5) * density, z).item()
    assert start_factor("simam", 64, (56, 56), {}, "paper") == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("block", "options"), [("se", {}), ("ge", {"kind": "minus"}), ("ese", {})])
def test_a_plain_gate_starts_near_one_half(block, options):
    assert start_factor(block, 64, (14, 14), options, "paper") == pytest.approx(0.5, abs=0.05)


def test_measuring_a_start_leaves_the_random_state():
    state = torch.get_rng_state()
    first = start_factor("se", 16, (7, 7), {}, "paper")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert start_factor("se", 16, (7, 7), {}, "paper") == first
