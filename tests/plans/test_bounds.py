"""A short plan, option or adapter that asks for gigabytes is refused before any memory is taken."""

import json
import resource
import sys
import time

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.blocks import block_numbers, build_block
from se_inject.blocks.building import LARGEST
from se_inject.cli import entry
from se_inject.errors import InjectError, LoadError, OptionError
from se_inject.surgery import swap

MIB = 2**20


def network(channels=16):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4),
    ).eval()


X = torch.zeros(1, 3, 16, 16)
HUGE = 10**4000
OPTIONS = [
    ("se", {"width": 30_000_000}),
    ("se", {"width": 10**12}),
    ("se", {"width": HUGE}),
    ("se", {"width": 12_000_000}),  # a wide one that alone is below the bound of a block
    ("se", {"reduction": 1e-9}),
    ("se", {"reduction": 1e-300}),
    ("se", {"reduction": 5e-324}),
    ("se", {"divisor": 10**9}),
    ("se", {"divisor": HUGE}),
    ("gc", {"reduction": 1e-9}),
    ("coord", {"least": 10**9}),
    ("coord", {"least": HUGE}),
    ("coord", {"least": 12_000_000}),
    ("cbam", {"kernel": 30_001}),
    ("cbam", {"kernel": 10**9 + 1}),
    ("triplet", {"kernel": 30_001}),
    ("eca", {"kernel": 10**9 + 1}),
    ("eca", {"gamma": 1e-300}),
    ("eca", {"beta": 1e300}),
    ("bam", {"reduction": 1e-3}),
    ("bam", {"dilation": 10**9}),
    ("bam", {"dilation": -1}),
    ("ge", {"extent": 2**40}),
    ("ge", {"extent": 2**13000}),
    ("fca", {"frequencies": 10**9}),
    ("fca", {"reduction": 1e-9}),
]


pytestmark = pytest.mark.no_cover  # time is measured


def bounded(call, error, seconds=1.0, mebibytes=40):
    """What a call refuses, with little time and memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(error) as refused:
        call()
    assert time.process_time() - start < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < mebibytes
    assert error is InjectError or "Error" not in str(refused.value)
    return refused.value


def stored(change, model=None):
    data = json.loads(si.plan(model or network(), X).to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(("block", "options"), OPTIONS)
def test_options_that_ask_for_gigabytes(block, options):
    model = network()
    si.plan(model, X, block=block).apply(model)  # whatever is imported late
    bounded(lambda: si.plan(model, X, block=block, **options), OptionError)

    def change(data):
        for step in data["steps"]:
            step.update(block=block, options=options)

    if all(abs(value) < 10**400 for value in options.values()):
        text = stored(change, model)
        bounded(lambda: si.Plan.from_json(text).apply(model), OptionError)
    assert not hasattr(model[3], "se")


def test_a_block_that_is_within_its_bound_but_beyond_the_networks():
    model, options = network(), {"width": 3_000_000}
    assert block_numbers("se", 16, (16, 16), options) < LARGEST
    error = bounded(lambda: si.plan(model, X, **options), OptionError)
    assert "in the network" in error.seen
    large = network(1024)  # 9.5 M numbers: blocks may have 38 M and 67 M more
    si.plan(large, X, width=15_000)
    bounded(lambda: si.plan(large, X, width=30_000), OptionError)


def test_many_small_blocks_are_counted_together(monkeypatch):
    model = network()
    monkeypatch.setattr(swap, "_SPARE", 0)
    own = sum(each.numel() for each in model.state_dict().values())
    plan = si.plan(model, X, width=100)
    each = block_numbers("se", 16, (16, 16), {"width": 100})
    assert each < 4 * own
    both = plan
    for _ in range(5):
        if len(both) * each > 4 * own:
            break
        both = both + plan
    bounded(lambda: both.apply(model), OptionError)
    assert not si.surgery.steps_of(model)


def test_what_is_counted_is_what_is_built():
    for block, options in (("se", {}), ("se", {"norm": True, "bias": False}), ("cbam", {"kernel": 3}), ("ge", {})):
        built = build_block(block, 32, (8, 8), options, "paper")
        numbers = sum(each.numel() for each in (*built.parameters(), *built.buffers()))
        assert block_numbers(block, 32, (8, 8), options) == numbers


def test_counting_draws_no_random_number():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    block_numbers("se", 48, (5, 5), {"width": 7})
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("inputs", [[[[1], "float32"]] * 100_000, [[[1], "float32"]] * 65])
def test_many_inputs(inputs):
    text = stored(lambda data: data.update(inputs=inputs))
    start = time.process_time()
    json.loads(text)
    alone = time.process_time() - start
    bounded(lambda: si.Plan.from_json(text), LoadError, seconds=0.5 + 3 * alone, mebibytes=80)


def test_many_steps():
    text = stored(lambda data: data.update(steps=data["steps"][:1] * 5000))
    bounded(lambda: si.Plan.from_json(text), LoadError, seconds=2)


@pytest.mark.parametrize("shape", [[16384, 16384], [16, 2**24], [1, 7, 5000, 5000]])
def test_large_inputs_that_do_not_fit(shape):
    model = network()
    text = stored(lambda data: data.update(inputs=[[shape, "float32"]]))
    plan = si.Plan.from_json(text)
    bounded(lambda: plan.apply(model), InjectError, mebibytes=100)


def test_a_size_that_no_memory_holds_and_one_that_is_large():
    text = stored(lambda data: data["steps"][0].update(size=[2**24, 2**24]))
    bounded(lambda: si.Plan.from_json(text), LoadError)
    text = stored(lambda data: [step.update(size=[2**16, 2**16], init="paper") for step in data["steps"]])
    from se_inject.plans.starts import start_factors

    low, high = start_factors(si.Plan.from_json(text).steps)["se"]
    assert 0.3 < low <= high < 0.7


def test_an_adapters_plan_is_bounded_too(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = network()
    si.save_adapter(si.inject(model, X), tmp_path / "se.safetensors")
    with safe_open(tmp_path / "se.safetensors", "pt") as file:
        (key, text), tensors = (
            next(iter(file.metadata().items())),
            {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 - it is no dict
            },
        )
    for options in ({"width": 30_000_000}, {"width": 12_000_000}, {"reduction": 1e-9}):
        data = json.loads(text)
        for step in data["plan"]["steps"]:
            step["options"] = options
        save_file(tensors, tmp_path / "other.safetensors", {key: json.dumps(data)})
        bounded(lambda: si.load_adapter(model, tmp_path / "other.safetensors"), InjectError)


@pytest.mark.parametrize("arguments", [["--r", "1e-9"], ["--set", "width=30000000"], ["--set", "width=3000000"]])
def test_the_command(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16),"
        " nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["se-inject", "net.py:make", "--input", "3x16x16", "--dry-run", *arguments])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    assert "too wide" in (text := capsys.readouterr().err) or "too large" in text
