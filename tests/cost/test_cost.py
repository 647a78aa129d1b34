"""Cost: closed forms for blocks and layers in one, two and three dimensions, and numbers that agree."""

import dataclasses

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

import se_inject as si
from se_inject.cost import cost_lines
from se_inject.cost.counting import Cost, CostReport, CostRow, Latency, measure_latency
from se_inject.errors import TraceError

SIZES = {1: (50,), 2: (10, 6), 3: (4, 6, 5)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
C, D = 12, 20


def plain(rank, dtype=torch.float32, more=()):
    """A stem, and a convolution with normalisation and activation; every length stays as it is."""
    convolution, norm = CONVOLUTIONS[rank], NORMS[rank]
    layers = [convolution(3, C, 1), norm(C), nn.ReLU(), convolution(C, D, 3, padding=1, bias=False), norm(D), nn.ReLU()]
    return nn.Sequential(*layers, *more).to(dtype)


def example(rank, batch=2, dtype=torch.float32):
    return torch.empty(batch, 3, *SIZES[rank], device="meta", dtype=dtype)


def volume(rank):
    return torch.Size(SIZES[rank]).numel()


def block_by_hand(channels, width, positions, item=4, identity=True, bias=True):
    """Squeeze, two layers, the gate and the scale, operation by operation."""
    fewer = 0 if identity else 1
    gates = [(channels, 2 * channels)] * (2 - fewer)  # σ, and times 2: reads and writes a vector
    squeeze = (channels * positions, channels * positions + channels)
    scale = (channels * positions, 2 * channels * positions + channels)
    rectify = (width, 2 * width)
    operations = [squeeze, rectify, *gates, scale]
    layers = 2 * (channels + width)
    return Cost(
        2 * channels * width + (channels + width) * bias,
        2 * channels * width,
        sum(count for count, _ in operations),
        item * (sum(moved for _, moved in operations) + layers),
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"init": "paper"}, {"reduction": 3}], ids=str)
def test_a_block_by_hand(rank, options):
    report = si.plan(plain(rank), example(rank), **options).cost()
    assert [(row.channels, row.width) for row in report.rows] == [
        (channels, max(4, channels // options.get("reduction", 16))) for channels in (C, D)
    ]
    for row in report.rows:
        assert row.cost == block_by_hand(
            row.channels,
            row.width,
            volume(rank),
            identity=options.get("init") != "paper",
            bias=options.get("bias", True),
        )


@pytest.mark.parametrize(("dtype", "item"), [(torch.float64, 8), (torch.float16, 2), (torch.bfloat16, 2)], ids=str)
def test_bytes_follow_the_number_format(dtype, item):
    report = si.plan(plain(2, dtype), example(2, dtype=dtype)).cost()
    assert report.rows[0].cost == block_by_hand(C, 4, volume(2), item=item)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_macs_and_elementwise_operations_of_the_network_by_hand(rank):
    n = volume(rank)
    before = si.plan(plain(rank), example(rank)).cost().before
    assert before.macs == n * (3 * C + C * D * 3**rank)
    assert before.params == 3 * C + C + C * D * 3**rank + 2 * C + 2 * D
    assert before.elementwise == n * 2 * (C + D)  # a normalisation and an activation each


def activations_by_hand(rank, item=4):
    """What two convolutions, two normalisations and two activations read and write, statistics left out."""
    n = volume(rank)
    return item * n * ((3 + C) + 2 * C + 2 * C + (C + D) + 2 * D + 2 * D)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_bytes_of_the_network_by_hand(rank):
    before = si.plan(plain(rank), example(rank)).cost().before
    statistics = 4 * 4 * (C + D)  # running mean and variance, and up to two more vectors of that length
    assert activations_by_hand(rank) <= before.bytes <= activations_by_hand(rank) + statistics


def test_after_one_injection_is_before_the_next():
    network = plain(2)
    first = si.plan(network, example(2), at="2")
    second = si.plan(first.apply(network), example(2), at="5")
    assert second.cost().before == first.cost().after


def test_after_one_injection_is_before_the_next_but_for_bytes():
    network = plain(2)
    first = si.plan(network, example(2), at="2")
    second = si.plan(first.apply(network), example(2), at="5")
    one, other = first.cost().after, second.cost().before
    assert (other.params, other.macs, other.elementwise) == (one.params, one.macs, one.elementwise)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_cost_is_for_one_example(batch):
    assert si.plan(plain(2), example(2, batch)).cost() == si.plan(plain(2), example(2)).cost()


def test_nothing_is_computed_or_changed():
    network = plain(2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    plan = si.plan(network, example(2))
    assert plan.cost() == plan.cost()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training


def test_a_block_that_runs_twice_costs_twice_and_has_its_parameters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, C, 1)
            self.unit = BasicBlock(C, C)

        def forward(self, x):
            return self.unit(self.unit(self.stem(x)))

    report = si.plan(Twice(), example(2)).cost()
    (row,) = report.rows
    once = block_by_hand(C, 4, volume(2))
    assert row.cost == Cost(once.params, 2 * once.macs, 2 * once.elementwise, 2 * once.bytes)


def test_what_is_not_counted_is_listed():
    class Spectral(nn.Module):
        def forward(self, x):
            return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])

    assert si.plan(plain(2), example(2)).cost().uncounted == ()
    report = si.plan(plain(2, more=[Spectral()]), example(2)).cost()
    assert report.uncounted
    assert all("fft" in name for name in report.uncounted)
    lines = "\n".join(cost_lines(report))
    assert "not counted" in lines
    assert report.uncounted[0] in lines


# -- values ------------------------------------------------------------------------------------------------


def test_costs_add_up():
    one, other = Cost(1, 2, 3, 4), Cost(10, 20, 30, 40)
    assert one + other == Cost(11, 22, 33, 44)
    assert (one + Cost()) == one
    assert other.flops == 40


def test_a_report_adds_its_rows_up():
    rows = tuple(CostRow(f"s{i}", stage, "se", 8, 1, Cost(i, i, i, i)) for i, stage in enumerate([1, 1, 2, None]))
    report = CostReport(Cost(100, 100, 100, 100), rows)
    assert report.added == Cost(6, 6, 6, 6)
    assert report.after == Cost(106, 106, 106, 106)
    assert report.stages == {1: Cost(1, 1, 1, 1), 2: Cost(2, 2, 2, 2), None: Cost(3, 3, 3, 3)}
    assert CostReport(Cost(1, 1, 1, 1), ()).after == Cost(1, 1, 1, 1)


def test_values_can_not_be_changed():
    for value in (Cost(), CostReport(Cost(), ()), CostRow("a", 1, "se", 8, 1, Cost()), Latency(1, 1, 1, 1, 1, 8)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, 0)


# -- latency -----------------------------------------------------------------------------------------------


def test_latency_counts_rounds_and_orders_its_quartiles():
    x = torch.randn(1, 3, 10, 6)
    network = plain(2).eval()
    latency = measure_latency(network, network, (x,), {}, seconds=0.2)
    assert latency.before_ms > 0
    assert latency.after_ms > 0
    assert 0 < latency.low <= latency.ratio <= latency.high
    assert 8 <= latency.rounds <= 200


def test_a_network_against_itself_is_timed_twice():
    network = plain(2).eval()
    latency = measure_latency(network, network, (torch.randn(1, 3, 10, 6),), {}, seconds=0.2)
    assert latency.low < latency.high


def test_latency_sees_which_of_the_two_is_slower(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("se_inject.cost.counting.time.perf_counter", lambda: clock[0])
    calls = []

    def takes(name, seconds):
        def call(*args, **kwargs):
            calls.append(name)
            assert not torch.is_grad_enabled()
            clock[0] += seconds

        return call

    latency = measure_latency(takes("a", 0.010), takes("b", 0.015), (), {}, seconds=1.0)
    assert latency == Latency(*(pytest.approx(v) for v in (10.0, 15.0, 1.5, 1.5, 1.5)), rounds=40)
    assert calls[:6] == ["a", "b", "b", "a", "a", "b"]  # in turns, after one call each to warm up


def test_a_slow_network_is_timed_at_least_eight_times(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("se_inject.cost.counting.time.perf_counter", lambda: clock[0])

    def slow():
        clock[0] += 100

    assert measure_latency(slow, lambda: slow(), (), {}).rounds == 8


def test_a_forward_that_fails_when_it_is_counted_is_named():
    """A standardised convolution is not run while sites are looked for: its shape is known."""
    timm = pytest.importorskip("timm")
    net = nn.Sequential(timm.layers.StdConv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    plan = si.plan(net, torch.rand(2, 3, 8, 8), at="*")
    net[0].eps = "small"
    with pytest.raises(TraceError, match="own forward fails on 1 input of") as refused:
        plan = si.plan(net, torch.rand(2, 3, 8, 8), at="*")
        plan.cost()
    assert "TypeError" in str(refused.value)
