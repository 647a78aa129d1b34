"""What goes in, which sites, what is written: the main command."""

import logging
import re
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import se_inject as si
from tests.cli.networks import SITES, SMALL, document, files, same

# -- what goes in ---------------------------------------------------------------------------------------------


def test_a_file_comes_back_with_blocks_and_the_same_output(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL)
    assert files() == {"tiny.pt", "tiny-se.pt"}
    injected = si.load("tiny-se.pt")
    assert [step.site for step in si.plan_of(injected).steps] == SITES
    assert same(tiny, injected)
    assert sum(p.numel() for p in si.injected_parameters(injected)) == 2 * (2 * 16 * 4 + 4 + 16) + 2 * (
        2 * 32 * 4 + 4 + 32
    )
    assert "4 SE blocks in stages 1, 2: r = 16, bias = yes, identity start" in done.out
    assert len(re.findall(r"^ok ", done.out, re.MULTILINE)) == 6
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


# -- which sites ----------------------------------------------------------------------------------------------


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


# -- what is written ------------------------------------------------------------------------------------------


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


def test_all_files_appear_or_none(se_inject, tiny, onnx_fails):
    done = se_inject("tiny.pt", *SMALL, "-o", "x.pt", "-o", "x.onnx", code=1)
    assert "no luck with x.onnx" in done.err
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
    assert injected.get_submodule("one.0.se").width == 4
    assert same(tiny, injected)
    done = se_inject("first.pt", *SMALL, "--dry-run")
    assert "note: left out: 2 chosen sites with a block of ours already" in done.out
    assert "2 SE blocks in stage 2" in done.out
