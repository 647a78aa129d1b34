"""What is printed: text, tables, JSON; costs side by side; blocks and their cards."""

import csv
import io
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

import se_inject as si
from se_inject.cli import entry as cli
from se_inject.cli import injecting
from se_inject.errors import InjectError
from tests.cli.networks import SITES, SMALL, document, files

# -- what is printed ------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(injecting, "planned_blocks", planning)
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

    monkeypatch.setattr(injecting, "verify", failing)
    done = se_inject("tiny.pt", *SMALL, code=1)
    assert "FAIL weights kept" in done.out
    assert "weights kept: one is gone" in done.err
    assert "hint:" in done.err
    assert files() == {"tiny.pt"}


def test_a_check_that_fails_is_in_the_json(se_inject, tiny, monkeypatch):
    from se_inject.verification import checks as verification

    verdict = verification.Verdict((verification.Check("weights kept", False, "one is gone"),))
    monkeypatch.setattr(injecting, "verify", lambda *_, **__: verdict)
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


# -- costs side by side ---------------------------------------------------------------------------------------


def test_the_grid_in_four_formats(se_inject):
    arguments = ("cost", "nets.py:tiny", *SMALL, "--r", "2,4")
    done = se_inject(*arguments, "--json")
    data = document(done.out)
    assert done.err == ""
    assert [(cell["stages"], cell["r"], cell["blocks"]) for cell in data["cells"]] == [
        (stages, r, blocks)
        for stages, blocks in (("1", 2), ("2", 2), ("all", 4), ("all-but-last", 2))
        for r in (2.0, 4.0)
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
    from se_inject.blocks.building import INITS
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
    arguments = ("cost", "nets.py:tiny", *SMALL, "--r", "2,4", "--plot", "cost.svg")
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


# -- the network's own rows --------------------------------------------------------------------------------


def test_cost_by_module_shows_the_network_with_its_blocks(se_inject, tiny):
    done = se_inject("cost", "nets.py:tiny", *SMALL, "--by", "module", "--stages", "2", "--r", "4")
    assert "with the 2 blocks that would be put in; nothing is written" in done.err
    lines = done.out.splitlines()
    assert re.match(r"module +class +block +output +params +MACs +element-wise +bytes", lines[0])
    assert [line.split()[0] for line in lines if "◆ se" in line] == ["two.0.se", "two.1.se"]
    assert any(line.startswith("    two.0 ") for line in lines)
    se_inject("tiny.pt", *SMALL, "-o", "a.pt")
    data = document(se_inject("cost", "a.pt", *SMALL, "--by", "module", "--depth", "0", "--json").out)
    assert [row["module"] for row in data["modules"]] == ["", *(site.replace("bn2", "se") for site in SITES)]


@pytest.mark.parametrize(
    "arguments",
    [("--depth", "1"), ("--by", "module", "--r", "4,8"), ("--by", "module", "--plot", "x.svg"), ("--by", "layer")],
)
def test_what_does_not_go_with_modules_is_refused(se_inject, arguments):
    assert se_inject("cost", "nets.py:tiny", *SMALL, *arguments, code=2).out == ""


def test_latency_of_the_copies_for_inference(se_inject):
    done = se_inject("nets.py:tiny", *SMALL, "--dry-run", "--latency", "--for-inference", "--json")
    data = json.loads(done.out)
    assert {"latency", "for_inference"} <= data.keys()
    assert data["for_inference"]["rounds"] >= 8
