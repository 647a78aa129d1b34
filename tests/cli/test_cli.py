"""The command line, end to end: what it prints, what it writes, what it returns, and what it says to bad input."""

import csv
import errno
import io
import itertools
import json
import logging
import pickle
import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import se_inject as si
from se_inject import atomic_files as _files
from se_inject.cli import commands
from se_inject.cli import entry as cli
from se_inject.errors import InjectError

NETS = '''
"""Networks of a user's own. ``tiny`` is made of public classes only, so its pickle needs nobody's trust."""
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock


def plain(i, o, size=3, stride=1):
    return [nn.Conv2d(i, o, size, stride, size // 2, bias=False), nn.BatchNorm2d(o)]


def tiny():
    """Four residual units: 16 channels in `one`, 32 in `two`."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*plain(3, 16), nn.ReLU()),
            one=nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)),
            two=nn.Sequential(BasicBlock(16, 32, 2, nn.Sequential(*plain(16, 32, 1, 2))), BasicBlock(32, 32)),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )
    )


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, x):
        return self.net(x)


class Picky(Own):
    def forward(self, x):
        if x.shape[-1] != 40:
            raise ValueError("forty pixels, no more and no less")
        return super().forward(x)


class Undecided(nn.Module):
    """A unit whose way depends on the data, behind one that is as it should be."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*plain(3, 16), nn.ReLU())
        self.good = BasicBlock(16, 16)
        self.odd = Odd()

    def forward(self, x):
        return self.odd(self.good(self.stem(x)))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        self.last = x
        return x + self.conv(x)


def cifar():
    """Its linear layer takes 32×32 images alone, so that other sizes are tried in vain before."""
    layers = [*plain(3, 8), nn.ReLU(), nn.MaxPool2d(4), *plain(8, 16), nn.ReLU(), nn.MaxPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 2 * 2, 10))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))


def ill():
    network = tiny()
    with torch.no_grad():
        network.head[2].weight[0, 0] = float("nan")
    return network


def explodes():
    raise ValueError("no luck today")


def number():
    return 3
'''

SITES = ["one.0.bn2", "one.1.bn2", "two.0.bn2", "two.1.bn2"]
SMALL = ("--input", "3x16x16")


@pytest.fixture
def se_inject(tmp_path, monkeypatch, capsys):
    """Run the command in an empty directory that holds ``nets.py``; no run may end in a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["se-inject", *map(str, arguments)])
        capsys.readouterr()
        returned = 0
        with warnings.catch_warnings():
            try:
                cli.main()
            except SystemExit as ending:
                returned = ending.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "should not have happened" not in err, err
        assert returned == code, err
        return types.SimpleNamespace(out=out, err=err)

    yield run
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def tiny(se_inject, tmp_path):
    """The tiny network, and a file ``tiny.pt`` with it. In it no weight is what a new network would have."""
    network = si.load("nets.py:tiny").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator), alpha=0.05)
    torch.save(network, tmp_path / "tiny.pt")
    return network


def files():
    return {path.name for path in Path().iterdir() if path.name not in ("nets.py", "__pycache__")}


def document(text):
    """The one JSON document that a text is."""
    assert text.startswith("{")
    return json.loads(text)


def same(one, other, shape=(2, 3, 16, 16)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


# -- what goes in ------------------------------------------------------------------------------------------


def test_a_file_comes_back_with_blocks_and_the_same_output(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL)
    assert files() == {"tiny.pt", "tiny-se.pt"}
    injected = si.load("tiny-se.pt")
    assert [step.site for step in si.plan_of(injected).steps] == SITES
    assert same(tiny, injected)
    assert sum(p.numel() for p in si.injected_parameters(injected)) == 2 * 49 + 2 * 162
    assert "4 SE blocks in stages 1, 2: r = 16, bias = yes, identity start" in done.out
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) == 5
    assert "FAIL" not in done.out
    assert "wrote tiny-se.pt" in done.out
    assert done.err == ""


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("nets.py:tiny", "tiny-se.pt"),
        ("nets:tiny", "tiny-se.pt"),
        ("torchvision:squeezenet1_1", "squeezenet1_1-se.pt"),
        pytest.param("timm:test_convnext.r160_in1k", "test_convnext-se.pt"),
    ],
)
def test_a_name_gives_a_file_of_that_name(se_inject, model, output):
    done = se_inject(model, "--input", "3x64x64", "--json")
    (written,) = document(done.out)["files"]
    injected = si.load(output)
    assert files() == {written["path"]} == {output}
    assert len(si.plan_of(injected)) == len(document(done.out)["plan"])


@pytest.mark.parametrize("writer", ["plain", "wrapped", "safetensors"])
def test_weights_arrive(se_inject, tiny, writer):
    state = tiny.state_dict()
    if writer == "plain":
        torch.save(state, "w.pt")
    elif writer == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, "w.pt")
    else:
        save_file(state, "w.pt")
    se_inject("nets.py:tiny", "--weights", "w.pt", *SMALL, "-o", "out.pt")
    assert same(tiny, si.load("out.pt"))


def test_a_class_of_ones_own_needs_trust_on_the_way_back(se_inject):
    se_inject("nets.py:Own", *SMALL, "-o", "own.pt")
    refused = se_inject("own.pt", *SMALL, code=1)
    assert "hint:" in refused.err
    name = re.search(r"--trust (\w+)", refused.err)[1]
    done = se_inject("own.pt", *SMALL, "--trust", name, code=1)
    assert "hold blocks of ours already" in done.err
    assert files() == {"own.pt"}


def test_seed_makes_random_weights_the_same(se_inject):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        se_inject("nets.py:tiny", *SMALL, "--init", "paper", "--seed", seed, "-o", f"{name}.pt")
    a, b, c = (si.load(f"{name}.pt").state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["one.0.se.fc1.weight"], c["one.0.se.fc1.weight"])
    assert not torch.equal(a["stem.0.weight"], c["stem.0.weight"])


@pytest.fixture
def logged():
    """What torch logs while a test runs; it goes to stderr."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("torch", "torch._subclasses.fake_tensor")]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


def test_the_size_is_left_open_on_request(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL, "-o", "net.onnx", "--dynamic-size", "--opset", "13")
    assert "tracing exporter, opset 13, dynamic batch, input batch×3×height×width)" in done.out
    assert " and at " in done.out
    done = se_inject("tiny.pt", *SMALL, "-o", "other.onnx", "--opset", "9", code=2)
    assert "no file of opset 9 can be written" in done.err and "verif" not in done.out


def test_the_input_is_inferred_and_told(se_inject):
    done = se_inject("nets.py:cifar", "--dry-run")
    assert "note: input inferred: 1 input of 2×3×32×32" in done.out


@pytest.mark.parametrize(("arguments", "code"), [(("--dry-run",), 0), (("--dry-run", "--input", "3x64x64"), 1)])
def test_torch_logs_nothing_about_inputs_that_were_tried(se_inject, logged, arguments, code):
    se_inject("nets.py:cifar", *arguments, code=code)
    assert [record.getMessage()[:80] for record in logged] == []


# -- which sites -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ((), SITES),
        (("--stages", "1"), SITES[:2]),
        (("--stages", "1,2"), SITES),
        (("--stages", "1-2"), SITES),
        (("--stages", "all"), SITES),
        (("--stages", "all-but-last"), SITES[:2]),
        (("--stages", "two"), SITES[2:]),
        (("--stages", "one, two"), SITES),
        (("--stages", "2,two.0"), SITES[2:]),
        (("--stages", "two.1"), SITES[3:]),
        (("--at", "two.*"), SITES[2:]),
        (("--at", "*.0.*"), [SITES[0], SITES[2]]),
        (("--at", r"re:.*\.1\.bn2"), [SITES[1], SITES[3]]),
        (("--at", "re:(one|two).0.bn[12]"), [SITES[0], SITES[2]]),
        (("--at", "two.1.bn2", "--at", "one.0.bn2"), [SITES[0], SITES[3]]),
        (("--stages", "1", "--at", "two.0.bn2"), SITES[:3]),
        (("--at", "stem.*"), ["stem.2"]),
    ],
    ids=" ".join,
)
def test_sites_are_chosen(se_inject, choice, expected):
    done = se_inject("nets.py:tiny", *SMALL, "--dry-run", "--json", *choice)
    assert [step["site"] for step in document(done.out)["plan"]] == expected


def test_a_range_beyond_the_last_stage_is_no_silent_success(se_inject):
    done = se_inject("nets.py:tiny", *SMALL, "--dry-run", "--stages", "2-4", code=2)
    assert "`2-4`" in done.err


def test_sites_lists_the_stages(se_inject):
    done = se_inject("sites", "nets.py:tiny", *SMALL)
    rows = [re.split(r"\s{2,}", line.strip()) for line in done.out.splitlines()]
    assert rows[0] == ["stage", "path", "stride", "channels", "sites", "free", "alias"]
    assert rows[2][:6] == ["1", "one", "1", "16", "2", "2"]
    assert rows[3][:6] == ["2", "two", "2", "32", "2", "2"]
    assert len(rows) == 4
    assert files() == set()


def test_sites_as_json_are_the_same(se_inject):
    data = document(se_inject("sites", "nets.py:tiny", *SMALL, "--json").out)
    assert [(stage["path"], stage["channels"], stage["sites"]) for stage in data["stages"]] == [
        ("one", [16], SITES[:2]),
        ("two", [32], SITES[2:]),
    ]
    assert [site["address"] for site in data["sites"]] == ["stem.2", *SITES]
    assert data["sites"][0]["stage"] is None
    assert data["sites"][0]["held_back"]
    assert data["refused"] == []


def test_refusals_are_counted_and_with_v_explained(se_inject):
    brief = se_inject("sites", "nets.py:Undecided", *SMALL)
    assert "1 place refused: -v says why" in brief.err
    long = se_inject("sites", "nets.py:Undecided", *SMALL, "-v").out
    table = long.partition("refused")[2]
    assert re.search(r"^odd\b.*self\.last", table, re.MULTILINE), long
    assert "good.bn2" in long.partition("refused")[0]
    (refusal,) = document(se_inject("sites", "nets.py:Undecided", *SMALL, "--json").out)["refused"]
    assert refusal["address"].startswith("odd")
    assert "self.last" in refusal["reason"]


def test_all_can_be_required(se_inject):
    done = se_inject("nets.py:Undecided", *SMALL, "--dry-run")
    assert "1 module that can't be traced" in done.out
    refused = se_inject("nets.py:Undecided", *SMALL, "--require-all", code=1)
    assert "1 module with convolutions can't be traced" in refused.err
    assert "`odd`: its forward stores into `self.last`" in refused.err
    assert not list(Path().glob("*.pt"))
    se_inject("nets.py:tiny", *SMALL, "--require-all", "--dry-run")


def test_attention_that_is_there_is_left_alone_unless_asked_for(se_inject):
    network = ("timm:seresnet18", "--input", "3x64x64")
    refused = se_inject(*network, "--dry-run", code=1)
    assert "already has attention" in refused.err
    assert "hint: " in refused.err
    assert "--attended" in refused.err
    listed = se_inject("sites", *network)
    assert "8 sites already have attention" in listed.err
    assert "--attended" in listed.err
    done = se_inject(*network, "--dry-run", "--attended", "--json")
    assert len(document(done.out)["plan"]) == 8


# -- what is printed ---------------------------------------------------------------------------------------


def test_json_is_one_document_and_the_talk_is_on_stderr(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL, "--json", "-v", "--latency")
    data = document(done.out)
    assert list(data) == ["model", "plan", "notes", "cost", "verification", "latency", "files"]
    assert "4 SE blocks" in done.err
    assert "ok " in done.err
    assert "wrote tiny-se.pt" in done.err
    assert data["verification"]["passed"] is True
    assert data["latency"]["low"] <= data["latency"]["ratio"] <= data["latency"]["high"]
    assert data["files"][0]["bytes"] == Path("tiny-se.pt").stat().st_size


def test_json_csv_markdown_and_text_agree(se_inject):
    arguments = ("nets.py:tiny", *SMALL, "--dry-run", "--r", "4")
    cost = document(se_inject(*arguments, "--json").out)["cost"]
    text = se_inject(*arguments, "--format", "csv", "-v").out
    rows = list(csv.DictReader(io.StringIO(text[text.index("site,") :])))
    names = {"params": "params", "macs": "MACs", "elementwise": "element-wise", "bytes": "bytes"}
    assert [row["site"] for row in rows] == [site["site"] for site in cost["sites"]] == SITES
    for row, site in zip(rows, cost["sites"], strict=True):
        assert (int(row["stage"]), int(row["channels"]), int(row["width"])) == (
            site["stage"],
            site["channels"],
            site["width"],
        )
        assert all(int(row[column]) == site[key] for key, column in names.items())
    for key in names:
        assert sum(site[key] for site in cost["sites"]) == sum(stage[key] for stage in cost["stages"])
        assert sum(site[key] for site in cost["sites"]) == cost["added"][key]
        assert cost["before"][key] + cost["added"][key] == cost["after"][key]
    assert cost["added"]["flops"] == 2 * cost["added"]["macs"]
    markdown = se_inject(*arguments, "--format", "markdown").out
    assert f"| {cost['after']['params']:,} |" in re.sub(" +", " ", markdown)
    assert re.search(r"^\|[ -]*-\|", markdown, re.MULTILINE)
    assert f"{cost['before']['macs']:,}" in se_inject(*arguments).out


def test_csv_is_all_there_is_on_stdout(se_inject):
    done = se_inject("nets.py:tiny", *SMALL, "--dry-run", "--format", "csv")
    assert done.out.startswith("site,")


def test_v_prints_every_site(se_inject):
    brief = se_inject("nets.py:tiny", *SMALL, "--dry-run").out
    long = se_inject("nets.py:tiny", *SMALL, "--dry-run", "-v").out
    assert not any(site in brief for site in SITES)
    assert all(site in long for site in SITES)


def test_latency_is_a_ratio_with_its_spread(se_inject):
    done = se_inject("nets.py:tiny", *SMALL, "--dry-run", "--latency")
    numbers = re.search(r"ratio ([\d.]+) \(quartiles ([\d.]+) to ([\d.]+), (\d+) rounds", done.out)
    ratio, low, high = (float(number) for number in numbers.groups()[:3])
    assert 0 < low <= ratio <= high
    assert int(numbers[4]) >= 8
    assert files() == set()


def test_latency_does_not_change_what_is_written(se_inject):
    se_inject("nets.py:tiny", *SMALL, "-o", "a.pt")
    se_inject("nets.py:tiny", *SMALL, "-o", "b.pt", "--latency")
    assert [m.training for m in si.load("b.pt").modules()] == [m.training for m in si.load("a.pt").modules()]


def test_a_dry_run_finds_what_the_run_would(se_inject):
    se_inject("nets.py:tiny", *SMALL, "--dry-run", "--name", "conv1", code=1)


def test_an_option_given_twice(se_inject):
    se_inject("nets.py:tiny", *SMALL, "--dry-run", "--r", "8", "--set", "reduction=4", code=2)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("-o", "x.tflite"), 2), (("-o", "x.pt", "-o", "x.pt"), 2), (("-o", "x.pt", "--device", "abacus"), 2)],
)
def test_wrong_outputs_are_refused_before_any_work(se_inject, arguments, code, monkeypatch):
    def planning(*_):
        raise InjectError("planning has begun")

    monkeypatch.setattr(commands, "_plan", planning)
    assert "planning has begun" not in se_inject("nets.py:tiny", *SMALL, *arguments, code=code).err


def test_options_of_the_block_are_told(se_inject):
    done = se_inject("nets.py:tiny", *SMALL, "--dry-run", "--no-bias", "--r", "4", "--init", "paper")
    assert "r = 4, bias = no, the paper's start" in done.out
    done = se_inject("nets.py:tiny", *SMALL, "--dry-run", "--set", "width=3", "--set", "gate=tanh")
    assert ": bias = yes, width = 3, gate = tanh, identity start" in done.out
    data = document(se_inject("nets.py:tiny", *SMALL, "--dry-run", "--json", "--divisor", "8", "--position", "pre").out)
    assert {site["width"] for site in data["cost"]["sites"]} == {8}
    assert {step["position"] for step in data["plan"]} == {"pre"}
    data = document(se_inject("nets.py:tiny", *SMALL, "--dry-run", "--json", "--block", "eca", "--set", "kernel=5").out)
    assert {site["params"] for site in data["cost"]["sites"]} == {5}


def test_blocks_are_listed(se_inject):
    done = se_inject("blocks", "--format", "csv")
    rows = {row["block"]: row for row in csv.DictReader(io.StringIO(done.out))}
    assert int(rows["se"]["params at C = 256"]) == 2 * 256 * 16 + 256 + 16
    assert "broken" not in done.out
    assert "squeeze" in se_inject("blocks").out.lower()


def test_a_block_has_a_card(se_inject):
    card = se_inject("blocks", "se").out
    assert "1709.01507" in card
    for option in ("reduction", "divisor", "bias"):
        assert f"    {option}: " in card
    wrong = se_inject("blocks", "eka", code=2)
    assert "hint: did you mean `eca`?" in wrong.err
    assert wrong.out == ""


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",), ("sites", "--help"), ("inject", "--help")])
def test_help_and_version(se_inject, arguments):
    done = se_inject(*arguments)
    assert done.out.strip()
    assert done.err == ""


def test_a_check_that_fails_is_exit_code_1_and_no_file(se_inject, tiny, monkeypatch):
    from se_inject.verification import checks as verification

    def failing(*_, **__):
        return verification.Verdict((verification.Check("weights kept", False, "one is gone"),))

    monkeypatch.setattr(commands, "verify", failing)
    done = se_inject("tiny.pt", *SMALL, code=1)
    assert "FAIL weights kept" in done.out
    assert "weights kept: one is gone" in done.err
    assert "hint:" in done.err
    assert files() == {"tiny.pt"}


def test_a_check_that_fails_is_in_the_json(se_inject, tiny, monkeypatch):
    from se_inject.verification import checks as verification

    verdict = verification.Verdict((verification.Check("weights kept", False, "one is gone"),))
    monkeypatch.setattr(commands, "verify", lambda *_, **__: verdict)
    data = document(se_inject("tiny.pt", *SMALL, "--json", code=1).out)
    assert data["verification"]["passed"] is False
    assert data["verification"]["checks"] == [{"name": "weights kept", "passed": False, "detail": "one is gone"}]
    assert "files" not in data


def test_a_file_that_is_equal_bit_for_bit_says_so(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL, "-o", "x.pt", "-o", "x.ts")
    told = {line.split()[1]: after for line, after in itertools.pairwise(done.out.splitlines()) if "wrote" in line}
    assert told["x.pt"].strip() == "loaded back and run at batch 1, 2, 5: outputs bit-equal"
    assert "(limit 1e-04)" in told["x.ts"]


def test_one_block_is_no_blocks(se_inject):
    done = se_inject("nets.py:tiny", *SMALL, "--at", "two.1.bn2", "-o", "x.pt")
    assert "1 SE block in stage 2" in done.out
    assert re.search(r"\b1 (SE )?(blocks|sites|modules|new parameters)\b", done.out) is None


def test_a_block_without_identity_start_says_how_it_starts(se_inject):
    done = se_inject("nets.py:tiny", *SMALL, "--dry-run", "--block", "simam")
    assert "note: block `simam` has no identity start" in done.out
    assert re.search(r"^note: at the start, block `simam` scales its input by 0\.\d+( to 0\.\d+)? ", done.out, re.M)
    notes = document(se_inject("nets.py:tiny", *SMALL, "--dry-run", "--init", "paper", "--json").out)["notes"]
    assert any(re.match(r"at the start, block `se` scales its input by 0\.[3-7]", note) for note in notes), notes
    assert "at the start" not in se_inject("nets.py:tiny", *SMALL, "--dry-run").out


# -- costs side by side ------------------------------------------------------------------------------------


def test_the_grid_in_four_formats(se_inject):
    arguments = ("cost", "nets.py:tiny", *SMALL, "--r", "4,16")
    done = se_inject(*arguments, "--json")
    data = document(done.out)
    assert done.err == ""
    assert [(cell["stages"], cell["r"], cell["blocks"]) for cell in data["cells"]] == [
        (stages, r, blocks)
        for stages, blocks in (("1", 2), ("2", 2), ("all", 4), ("all-but-last", 2))
        for r in (4.0, 16.0)
    ]
    rows = list(csv.DictReader(io.StringIO(se_inject(*arguments, "--format", "csv").out)))
    for row, cell in zip(rows, data["cells"], strict=True):
        assert (row["stages"], float(row["r"])) == (cell["stages"], cell["r"])
        assert all(int(row[key]) == cell[key] for key in ("blocks", "params", "macs", "elementwise", "bytes"))
    text, markdown = se_inject(*arguments).out, se_inject(*arguments, "--format", "markdown").out
    for cell in data["cells"]:
        for key in ("params", "macs", "elementwise", "bytes"):
            assert re.search(rf"^{cell['stages']} .* {cell[key]:,} \(", text, re.M)
            assert re.search(rf"^\| {cell['stages']} .* {cell[key]:,} \(", markdown, re.M)
            assert f"added to {data['before'][key]:,}" in text
    assert files() == set()


def test_the_options_offer_what_the_package_knows():
    from se_inject.blocks.registry import INITS
    from se_inject.sites.positions import POSITIONS

    choices = {option.name: getattr(option.type, "choices", None) for option in cli.cli.commands["cost"].params}
    assert tuple(choices["position"]) == tuple(POSITIONS)
    assert tuple(choices["init"]) == INITS


def test_the_grid_takes_several_choices_of_stages(se_inject):
    arguments = ("cost", "nets.py:tiny", *SMALL, "--block", "eca", "--json")
    data = document(se_inject(*arguments, "--stages", "two", "--stages", "1,2", "--stages", "all-but-last").out)
    assert [(cell["stages"], cell["r"], cell["blocks"]) for cell in data["cells"]] == [
        ("two", None, 2),
        ("1,2", None, 4),
        ("all-but-last", None, 2),
    ]


def test_the_grid_is_drawn_and_no_file_replaced(se_inject):
    arguments = ("cost", "nets.py:tiny", *SMALL, "--r", "4,16", "--plot", "cost.svg")
    done = se_inject(*arguments, "--format", "csv")
    assert done.err == "wrote cost.svg\n"
    first = Path("cost.svg").read_bytes()
    assert first.startswith(b"<?xml")
    Path("cost.svg").write_text("mine")
    assert "`cost.svg` exists" in se_inject(*arguments, code=1).err
    assert Path("cost.svg").read_text() == "mine"
    se_inject(*arguments, "--force")
    assert Path("cost.svg").read_bytes().startswith(b"<?xml")
    assert files() == {"cost.svg"}


def test_a_plot_without_matplotlib_is_refused_first(se_inject, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    done = se_inject("cost", "absent.pt", "--plot", "cost.png", code=1)
    assert "matplotlib is not installed" in done.err
    assert "hint: pip install 'se-inject[plot]'" in done.err


def test_blocks_on_a_network(se_inject):
    done = se_inject("blocks", "--on", "nets.py:tiny", "--json")
    data = {item["block"]: item for item in json.loads(done.out)}
    network = si.load("nets.py:tiny")
    for name in ("se", "eca", "simam", "cbam"):
        assert data[name]["added"]["params"] == si.plan(network, block=name).cost().added.params
    assert (data["se"]["identity_start"], data["se"]["start_factor"]) == (True, [1, 1])
    assert (data["simam"]["identity_start"], data["simam"]["refused"]) == (False, None)
    text = se_inject("blocks", "--on", "nets.py:tiny").out
    (one,) = json.loads(se_inject("blocks", "eca", "--on", "nets.py:tiny", *SMALL, "--json").out)
    assert one["added"]["params"] == data["eca"]["added"]["params"]
    assert one["added"]["bytes"] < data["eca"]["added"]["bytes"]
    assert re.search(rf"^se  .* {data['se']['added']['bytes']:,}  .* yes  1\s*$", text, re.M)


# -- what is written ---------------------------------------------------------------------------------------


def test_all_formats_at_once_compute_the_same(se_inject, tiny):
    outputs = ["x.onnx", "x.ts", "x.pt2", "x.pt"]
    done = se_inject("tiny.pt", *SMALL, "--json", *(part for name in outputs for part in ("-o", name)))
    written = document(done.out)["files"]
    assert [item["path"] for item in written] == outputs
    assert [item["format"] for item in written] == ["onnx", "torchscript", "pt2", "pt"]
    assert files() == {"tiny.pt", *outputs}
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = tiny(x)
        session = onnxruntime.InferenceSession("x.onnx", providers=["CPUExecutionProvider"])
        (seen,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(seen, expected.numpy(), rtol=1e-4, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = [torch.jit.load("x.ts"), torch.export.load("x.pt2").module(), si.load("x.pt").eval()]
        for network in loaded:
            torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_all_files_appear_or_none(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL, "-o", "x.pt", "-o", "x.onnx", "--opset", "99", code=1)
    assert "opset 99" in done.err
    assert "hint:" in done.err
    assert files() == {"tiny.pt"}


def test_dry_run_writes_nothing(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL, "--dry-run", "-o", "x.pt")
    assert "added" in done.out
    assert "wrote" not in done.out
    assert files() == {"tiny.pt"}


def test_nothing_is_replaced_without_force(se_inject, tiny):
    before = Path("tiny.pt").read_bytes()
    refused = se_inject("tiny.pt", *SMALL, "-o", "tiny.pt", code=1)
    assert "`tiny.pt` exists" in refused.err
    assert "--force" in refused.err
    assert refused.out == ""
    assert Path("tiny.pt").read_bytes() == before
    se_inject("tiny.pt", *SMALL, "-o", "tiny.pt", "--force")
    assert len(si.plan_of(si.load("tiny.pt"))) == 4


def test_conversions_reach_the_file(se_inject, tiny):
    se_inject("tiny.pt", *SMALL, "-o", "half.pt", "--dtype", "bfloat16", "--memory-format", "channels_last")
    half = si.load("half.pt")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.get_submodule("one.0.conv1").weight.is_contiguous(memory_format=torch.channels_last)


def test_more_blocks_go_into_a_network_that_has_some(se_inject, tiny):
    se_inject("tiny.pt", *SMALL, "--stages", "1", "-o", "first.pt")
    refused = se_inject("first.pt", *SMALL, "--stages", "1", "-o", "again.pt", code=1)
    assert "hold blocks of ours already" in refused.err
    assert "`one.0.se`" in refused.err
    assert "hint:" in refused.err
    assert files() == {"tiny.pt", "first.pt"}
    se_inject("first.pt", *SMALL, "--stages", "2", "-o", "second.pt", "--r", "4")
    injected = si.load("second.pt")
    assert sorted(step.site for step in si.plan_of(injected).steps) == SITES
    assert injected.get_submodule("two.0.se").width == 8
    assert injected.get_submodule("one.0.se").width == 1
    assert same(tiny, injected)
    done = se_inject("first.pt", *SMALL, "--dry-run")
    assert "note: left out: 2 chosen sites with a block of ours already" in done.out
    assert "2 SE blocks in stage 2" in done.out


# -- bad input ---------------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled by one who runs what a pickle says."""

    def __reduce__(self):
        return exec, ("open('payload_ran', 'w').close()",)


def empty(network):
    Path("bad.pt").touch()


def text(network):
    Path("bad.pt").write_text("these are not the weights you are looking for\n" * 9)


def truncated(network):
    data = Path("tiny.pt").read_bytes()
    Path("bad.pt").write_bytes(data[: len(data) * 2 // 3])


def poisoned(network):
    network.extra = Payload()
    torch.save(network, "bad.pt")


def poisoned_plain(network):
    Path("bad.pt").write_bytes(pickle.dumps([Payload()]))


def state_dict(network):
    torch.save(network.state_dict(), "bad.pt")


def checkpoint(network):
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, "bad.pt")


def safetensors(network):
    save_file(network.state_dict(), "bad.pt")


def other_weights(network):
    torch.save(nn.Linear(2, 2).state_dict(), "bad.pt")


def wrapped(network):
    network.add_module("inner", nn.DataParallel(nn.ReLU()))
    torch.save(network, "bad.pt")


def quantised(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.add_module("more", torch.ao.nn.quantized.ReLU6())
    torch.save(network, "bad.pt")


def folder(network):
    Path("bad.pt").mkdir()


def nothing(network):
    pass


TINY = ("tiny.pt", *SMALL)
BAD = {
    "no such file": (nothing, ("absent.pt",), 2, "no file `absent.pt`"),
    "nearly that file": (nothing, ("tinny.pt",), 2, "did you mean `tiny.pt`"),
    "a bare name": (nothing, ("resnet50",), 2, "torchvision:resnet50"),
    "empty": (empty, ("bad.pt",), 1, "an empty file"),
    "text": (text, ("bad.pt",), 1, "a text file"),
    "truncated": (truncated, ("bad.pt",), 1, "truncated, damaged"),
    "directory": (folder, ("bad.pt",), 1, "a directory"),
    "code in a pickle": (poisoned, ("bad.pt",), 1, "code that it may not use: `builtins.exec`"),
    "code in a plain pickle": (poisoned_plain, ("bad.pt",), 1, "`builtins.exec`"),
    "code in the weights": (poisoned_plain, ("nets.py:tiny", "--weights", "bad.pt"), 1, "no state dict"),
    "trust does not help code": (poisoned, ("bad.pt", "--trust", "builtins"), 2, "can't be trusted"),
    "a state dict": (state_dict, ("bad.pt",), 1, "se-inject bad.pt --arch"),
    "a checkpoint": (checkpoint, ("bad.pt",), 1, "se-inject bad.pt --arch"),
    "a safetensors file": (safetensors, ("bad.pt",), 1, "se-inject bad.pt --arch"),
    "DataParallel": (wrapped, ("bad.pt", *SMALL), 1, "pass `model.module`"),
    "quantised": (quantised, ("bad.pt",), 1, "inject first, then quantise"),
    "no convolution": (nothing, ("nets.py:mlp",), 1, "no convolution"),
    "no convolution, input given": (nothing, ("nets.py:mlp", "--input", "3x2x2"), 1, "no convolution"),
    "unknown network": (nothing, ("torchvision:resnet81",), 1, "did you mean `resnet18`"),
    "unknown package": (nothing, ("nowhere.at_all:net",), 1, "no module `nowhere`"),
    "unknown callable": (nothing, ("nets.py:tny",), 1, "did you mean `tiny`"),
    "unknown code file": (nothing, ("knots.py:tiny",), 2, "no file `knots.py`"),
    "code that fails": (nothing, ("nets.py:explodes",), 1, "ValueError: no luck today"),
    "code that gives no network": (nothing, ("nets.py:number",), 1, "no torch.nn.Module"),
    "a web address": (nothing, ("https://example.org/net.pt",), 1, "download it"),
    "other weights": (other_weights, ("nets.py:tiny", "--weights", "bad.pt"), 1, "unexpected: `weight`, `bias`"),
    "no weights": (nothing, ("nets.py:tiny", "--weights", "absent.pt"), 2, "no file `absent.pt`"),
    "no such stage": (nothing, (*TINY, "--stages", "7"), 2, "no stage matches `7`"),
    "no such path": (nothing, (*TINY, "--stages", "three"), 2, "no stage matches `three`"),
    "one stage of two": (nothing, (*TINY, "--stages", "1,3"), 2, "no stage matches `3`"),
    "no stage": (nothing, (*TINY, "--stages", ""), 2, "matches nothing"),
    "no such site": (nothing, (*TINY, "--at", "twoo.*"), 2, "did you mean `two.*`"),
    "no such expression": (nothing, (*TINY, "--at", "re:three.*"), 2, "no site matches `re:three.*`"),
    "no expression": (nothing, (*TINY, "--at", "re:(("), 2, "not a regular expression"),
    "r = 0": (nothing, (*TINY, "--r", "0"), 2, "must be positive"),
    "r < 0": (nothing, (*TINY, "--r", "-4"), 2, "must be positive"),
    "r = inf": (nothing, (*TINY, "--r", "inf"), 2, "must be positive and finite"),
    "r = inf as a setting": (nothing, (*TINY, "--set", "reduction=inf"), 2, "must be positive and finite"),
    "r = inf in a grid": (nothing, ("cost", *TINY, "--r", "4,inf"), 2, "must be positive and finite"),
    "r = 0 in a grid": (nothing, ("cost", *TINY, "--r", "4,0,2"), 2, "must be positive and finite"),
    "a ratio set in a grid": (nothing, ("cost", *TINY, "--set", "reduction=4"), 2, "--r 4,8,16"),
    "ratios of a block without": (nothing, ("cost", *TINY, "--block", "eca", "--r", "4"), 2, "no option `reduction`"),
    "no such stage of a grid": (nothing, ("cost", *TINY, "--stages", "1", "--stages", "7"), 2, "no stage matches `7`"),
    "no stage of a grid": (nothing, ("cost", *TINY, "--stages", ""), 2, "no stage matches ``"),
    "a plot in no format": (nothing, ("cost", *TINY, "--plot", "x.gif"), 2, ".svg"),
    "a plot over a file": (nothing, ("cost", *TINY, "--plot", "there.png"), 1, "`there.png` exists"),
    "blocks on nothing": (nothing, ("blocks", "--on", "absent.pt"), 2, "no file `absent.pt`"),
    "r = nan": (nothing, (*TINY, "--r", "nan"), 2, "must be positive"),
    "divisor = 0": (nothing, (*TINY, "--divisor", "0"), 2, "at least 1"),
    "unknown block": (nothing, (*TINY, "--block", "eka"), 2, "did you mean `eca`"),
    "unknown option of a block": (nothing, (*TINY, "--block", "eca", "--set", "kernl=3"), 2, "did you mean `kernel`"),
    "option of another block": (nothing, (*TINY, "--block", "eca", "--r", "4"), 2, "no option `reduction`"),
    "option without a value": (nothing, (*TINY, "--set", "reduction"), 2, "key=value"),
    "option of another type": (nothing, (*TINY, "--set", "divisor=many"), 2, "can't be `many`"),
    "unknown value": (nothing, (*TINY, "--set", "gate=sigmiod"), 2, "did you mean `sigmoid`"),
    "width beside r": (nothing, (*TINY, "--r", "4", "--set", "width=8"), 2, "given twice"),
    "no shape": (nothing, ("tiny.pt", "--input", "3x"), 2, "3x224x224"),
    "a rejected input": (nothing, ("nets.py:Picky", *SMALL), 1, "forty pixels, no more and no less (nets.py:"),
    "no input found": (nothing, ("nets.py:Picky",), 1, "forty pixels"),
    "too many inputs": (nothing, (*TINY, *SMALL), 1, "takes 2 positional arguments but 3 were given"),
    "a block where an attribute is": (nothing, (*TINY, "--name", "conv1"), 1, "--name"),
    "no name": (nothing, (*TINY, "--name", "2nd"), 2, "`2nd`"),
    "no directory": (nothing, (*TINY, "-o", "no/where.onnx"), 1, "does not exist"),
    "a file for a directory": (nothing, (*TINY, "-o", "nets.py/x.onnx"), 1, "is not a directory"),
    "a directory for a file": (folder, (*TINY, "-o", "bad.pt"), 1, "it is a directory"),
    "the same file twice": (nothing, (*TINY, "-o", "x.pt", "-o", "x.pt"), 2, "x.pt, x.pt"),
    "unknown suffix": (nothing, (*TINY, "-o", "x.tflite"), 2, ".onnx"),
    "no GPU": (nothing, (*TINY, "-o", "x.pt", "--device", "cuda"), 1, "torch finds none here"),
    "no device": (nothing, (*TINY, "-o", "x.pt", "--device", "abacus"), 2, "abacus"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_and_nothing_is_written(se_inject, tiny, case, monkeypatch):
    make, arguments, code, message = BAD[case]
    if case == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make(tiny)
    Path("there.png").touch()
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "__pycache__" not in path.parts}
    done = se_inject(*arguments, code=code)
    assert done.err.startswith("error: ")
    assert message in done.err
    after = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "__pycache__" not in path.parts}
    assert after == before
    assert "wrote" not in done.out


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_hint(se_inject, tiny, case, monkeypatch):
    make, arguments, code, _ = BAD[case]
    if case == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make(tiny)
    Path("there.png").touch()
    assert "\nhint: " in se_inject(*arguments, code=code).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage"),
        (("tiny.pt", "--stage", "1"), "--stages"),
        (("tiny.pt", "--r", "many"), "not a valid float"),
        (("tiny.pt", "--position", "up"), "conv3x3"),
        (("tiny.pt", "--dtype", "int8"), "float16"),
        (("tiny.pt", "--format", "xml"), "markdown"),
        (("tiny.pt", "tiny.pt"), "unexpected extra argument"),
        (("sites",), "MODEL"),
        (("cost",), "MODEL"),
        (("cost", "tiny.pt", "--r", "4,many"), "4,8,16"),
        (("cost", "tiny.pt", "--at", "two.*"), "--at"),
        (("sites", "tiny.pt", "--r", "4"), "--r"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_command_is_exit_code_2(se_inject, tiny, arguments, message):
    done = se_inject(*arguments, code=2)
    assert message in done.err + done.out
    assert files() == {"tiny.pt"}


def test_a_reduction_above_the_channels_works_and_is_noted(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL, "--r", "24", "-o", "x.pt")
    assert "note: r = 24 is more than the 16 channels of some sites: the bottleneck is 1 wide" in done.out
    assert "32 channels" not in done.out
    injected = si.load("x.pt")
    assert {injected.get_submodule(step.path).width for step in si.plan_of(injected).steps} == {1}
    assert same(tiny, injected)


def test_weights_that_are_no_numbers_are_warned_of(se_inject):
    done = se_inject("nets.py:ill", *SMALL, "-o", "x.pt")
    assert "warning" in done.out
    assert "NaN" in done.out
    assert files() == {"x.pt"}
    assert "NaN" in se_inject("nets.py:ill", *SMALL, "-o", "y.pt", "--json").err


def test_a_dry_run_warns_of_weights_that_are_no_numbers(se_inject):
    done = se_inject("nets.py:ill", *SMALL, "--dry-run")
    assert "NaN" in done.out + done.err


@pytest.mark.parametrize("name", ["x.pt", "x.ts", "x.pt2", "x.onnx"])
def test_a_full_disk_leaves_nothing_behind(se_inject, tiny, name, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "replace", full)
    done = se_inject("tiny.pt", *SMALL, "-o", name, code=1)
    assert "no space left" in done.err
    assert "hint:" in done.err
    assert files() == {"tiny.pt"}


def test_an_interrupt_is_exit_code_130(se_inject, tiny, monkeypatch):
    from se_inject.exporting import exporter as exporting

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "write_networks", interrupted)
    done = se_inject("tiny.pt", *SMALL, code=130)
    assert done.err.strip() == "interrupted"
    assert files() == {"tiny.pt"}


def test_a_fault_of_our_own_is_told_as_one(tiny, monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(commands, "_plan", broken)
    monkeypatch.setattr(sys, "argv", ["se-inject", "tiny.pt"])
    monkeypatch.delenv("SE_INJECT_TRACEBACK", raising=False)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in told
    assert "SE_INJECT_TRACEBACK" in told
    assert "Traceback" not in told
    monkeypatch.setenv("SE_INJECT_TRACEBACK", "1")
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
        cli.main()
