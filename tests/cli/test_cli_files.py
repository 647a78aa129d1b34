"""The command line with several blocks, plans, adapters and the way back; and with blocks that are broken."""

import json
import re
from pathlib import Path

import jsonschema
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import se_inject as si
from se_inject.surgery import schema as _schema
from tests.cli.networks import SITES, SMALL, document, files, same

GATES = '''
"""Blocks with one fault each."""
import torch
from torch import nn


class Good(nn.Module):
    def __init__(self, channels, *, start=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), start))

    def identity_init(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        return x * self.weight


class NoBuild(Good):
    def __init__(self, channels):
        raise KeyError("no colour")


class Exits(Good):
    def __init__(self, channels):
        raise SystemExit(3)


class NoInit(Good):
    def identity_init(self):
        raise RuntimeError("no start today")


class Shrinks(Good):
    def forward(self, x):
        return x[..., 1:]


class Widens(Good):
    def forward(self, x):
        return x.double()


class Overwrites(Good):
    def forward(self, x):
        return x.mul_(self.weight)


class Trains(Good):
    def forward(self, x):
        if self.training:
            raise RuntimeError("not in training")
        return super().forward(x)


class Lonely(Good):
    def forward(self, x):
        if x.shape[0] == 1:
            raise RuntimeError("one is too few")
        return super().forward(x)


class Looks(Good):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Later(Good):
    """It can be built twice on tensors without numbers, and fails with numbers."""

    def forward(self, x):
        if x.device.type != "meta":
            raise RuntimeError("numbers are not for me")
        return super().forward(x)


class Lies(Good):
    """What it says is an identity is none."""

    def identity_init(self):
        nn.init.constant_(self.weight, 1.5)


class Dead(Good):
    def forward(self, x):
        return x * self.weight.detach()
'''


@pytest.fixture
def gates(tmp_path):
    """A file with faulty blocks beside the networks."""
    path = tmp_path / "gates.py"
    path.write_text(GATES)
    yield "gates.py"
    path.unlink()


# -- several blocks ----------------------------------------------------------------------------------------


def test_other_blocks_in_other_stages_and_a_chain(se_inject, tiny):
    blocks = ["1=se,reduction=4", "2=se", "2=eca,kernel=5"]
    done = se_inject("tiny.pt", *SMALL, *(part for block in blocks for part in ("--block", block)), "-o", "x.pt")
    assert "2 SE blocks in stage 1: r = 4, bias = yes, identity start" in done.out
    assert "2 SE blocks in stage 2: r = 16, bias = yes, identity start" in done.out
    assert "2 eca blocks in stage 2: kernel = 5, identity start" in done.out
    assert "chained at one site: se → eca" in done.out
    injected = si.load("x.pt")
    told = [(step.site, step.block, step.block_name) for step in si.plan_of(injected, torch.empty(1, 3, 16, 16)).steps]
    assert told == [
        (SITES[0], "se", "se"),
        (SITES[1], "se", "se"),
        (SITES[2], "se", "se"),
        (SITES[2], "eca", "se_2"),
        (SITES[3], "se", "se"),
        (SITES[3], "eca", "se_2"),
    ]
    assert [injected.get_submodule(path).width for path in ("one.0.se", "two.0.se")] == [4, 4]
    assert same(tiny, injected)


def test_a_chain_without_stages_acts_in_the_order_given(se_inject, tiny, gates):
    two, eca = f"{gates}:Good,start=2", f"{gates}:Good,start=0.5"
    for order in ((two, eca, "se"), ("se", eca, two)):
        se_inject(
            "tiny.pt", *SMALL, "--init", "paper", "--seed", 3, *(part for o in order for part in ("--block", o)),
            "--at", "two.1.bn2", "-o", "x.pt", "--force",
        )  # fmt: skip
        steps = si.plan_of(torch.load("x.pt", weights_only=False)).steps
        assert [(step.block, step.options) for step in steps] == [
            (o.partition(",")[0], {"start": float(o[-3:].strip("=t"))} if "," in o else {}) for o in order
        ]


def test_rows_of_a_chain_add_up(se_inject):
    arguments = ("nets.py:tiny", *SMALL, "--dry-run", "--block", "2=se", "--block", "2=eca")
    cost = document(se_inject(*arguments, "--json").out)["cost"]
    assert [row["block"] for row in cost["sites"]] == ["se", "eca"] * 2
    assert sum(row["params"] for row in cost["sites"]) == cost["added"]["params"] == 2 * (2 * 32 * 4 + 4 + 32 + 3)
    lines = [line for line in se_inject(*arguments, "-v").out.splitlines() if line.startswith("two.1.bn2")]
    assert [line.split()[1] for line in lines] == ["se", "eca"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--block", "1=se", "--block", "2=eca", "--r", "4"), "`reduction` is for which of the 2 blocks?"),
        (("--block", "se", "--block", "eca", "--set", "kernel=5"), "`--block se,kernel=VALUE`"),
        (("--block", "1=se", "--stages", "2"), "the stages are given twice"),
        (("--block", "1=se", "--at", "two.*"), "the stages are given twice"),
        (("--block", "1="), "`--block 1=` names no block"),
        (("--block", "=se"), "`--block =se` names no block"),
        (("--block", ""), "names no block"),
        (("--block", "se,reduction"), "`reduction` sets nothing"),
        (("--block", "se,reduction=4,reduction=8"), "`reduction` is given twice"),
        (("--block", "se,reduction=4", "--r", "8"), "`reduction` is given twice"),
        (("--block", "9=se"), "no stage matches `9`"),
        (("--block", "1=eka"), "did you mean `eca`"),
        (("--block", "1=eca,kernle=3"), "did you mean `kernel`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_blocks_that_are_asked_for_wrongly(se_inject, arguments, message):
    assert message in se_inject("nets.py:tiny", *SMALL, *arguments, code=2).err
    assert files() == set()


# -- plans -------------------------------------------------------------------------------------------------


def test_a_plan_is_written_edited_and_replayed(se_inject, tiny):
    first = se_inject("tiny.pt", *SMALL, "--stages", "2", "--r", "4", "--seed", 1, "-o", "plan.json", "-o", "one.pt")
    assert "wrote plan.json" in first.out
    data = json.loads(Path("plan.json").read_text())
    jsonschema.validate(data, _schema.plan_schema())
    se_inject("tiny.pt", "--plan", "plan.json", "--seed", 1, "-o", "two.pt")
    one, two = si.load("one.pt"), si.load("two.pt")
    assert si.plan_of(one).steps == si.plan_of(two).steps
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    data["steps"][0]["options"]["reduction"] = 2
    Path("edited.json").write_text(json.dumps(data))
    done = se_inject("tiny.pt", "--plan", "edited.json", "-o", "three.pt", "--json")
    assert [step["options"] for step in document(done.out)["plan"]] == [{"reduction": 2}, {"reduction": 4.0}]
    assert si.load("three.pt").get_submodule("two.0.se").width == 16


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        (("--r", "4"), 2, "`--plan` leaves nothing to choose, and `--r` is given"),
        (("--no-bias",), 2, "and `--bias` is given"),
        (("--block", "se"), 2, "and `--block` is given"),
        (("--position", "pre"), 2, "and `--position` is given"),
        (("--adapter", "se.safetensors"), 2, "and `--adapter` is given"),
    ],
)
def test_a_plan_leaves_nothing_to_choose(se_inject, tiny, option, code, message):
    assert message in se_inject("tiny.pt", "--plan", "plan.json", *option, code=code).err


def test_a_plan_of_another_network_names_the_step(se_inject, tiny):
    se_inject("tiny.pt", *SMALL, "-o", "plan.json")
    done = se_inject("torchvision:resnet18", "--plan", "plan.json", "-o", "x.pt", code=1)
    assert "step 1 of the plan puts a block at `one.0.bn2`" in done.err
    Path("late.json").write_text('{"se_inject_plan": 2}')
    assert "a plan of version 2" in se_inject("tiny.pt", "--plan", "late.json", code=1).err
    assert "no file `none.json`" in se_inject("tiny.pt", "--plan", "none.json", code=2).err
    assert files() == {"tiny.pt", "plan.json", "late.json"}


def test_code_in_a_plan_needs_trust(se_inject, tiny, gates):
    se_inject("tiny.pt", *SMALL, "--block", f"{gates}:Good", "-o", "plan.json")
    done = se_inject("tiny.pt", "--plan", "plan.json", "-o", "x.onnx", code=1)
    trust = re.search(r"`(--trust .*?)`", done.err)[1].split()
    se_inject("tiny.pt", "--plan", "plan.json", "-o", "x.onnx", *trust)
    assert files() == {"tiny.pt", "plan.json", "x.onnx", "gates.py"}


# -- adapters ----------------------------------------------------------------------------------------------


def trained(network):
    """A copy with blocks whose weights no new block has."""
    injected = si.inject(network, torch.empty(1, 3, 16, 16), stages=[2], reduction=4)
    with torch.no_grad():
        for number, parameter in enumerate(si.injected_parameters(injected)):
            parameter.fill_(0.01 * (number + 1))
    return injected


def test_an_adapter_is_written_and_put_onto_the_backbone_again(se_inject, tiny):
    se_inject("tiny.pt", *SMALL, "-o", "start.safetensors")
    assert all(".se." in name for name in load_file("start.safetensors"))
    injected = trained(tiny)
    si.save_adapter(injected, "se.safetensors")
    done = se_inject("tiny.pt", "--adapter", "se.safetensors", *SMALL, "-o", "x.pt", "-o", "x.onnx")
    assert "the blocks are not at their identity start" in done.out
    assert "other weights" not in done.out
    loaded = si.load("x.pt")
    assert all(torch.equal(value, injected.state_dict()[key]) for key, value in loaded.state_dict().items())
    x = torch.randn(2, 3, 16, 16)
    session = onnxruntime.InferenceSession("x.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), injected(x).detach(), rtol=1e-4, atol=1e-5)


def test_an_adapter_on_other_weights_is_noted_and_on_another_network_refused(se_inject, tiny):
    si.save_adapter(trained(tiny), "se.safetensors")
    done = se_inject("nets.py:tiny", "--adapter", "se.safetensors", *SMALL, "-o", "x.pt")
    assert re.search(r"^note: the adapter was made for other weights: \d+ of its 62 tensors", done.out, re.M), done.out
    refused = se_inject("torchvision:squeezenet1_1", "--adapter", "se.safetensors", "-o", "y.pt", code=1)
    assert "the adapter was made for another network: a Sequential" in refused.err
    assert "not an adapter" in se_inject("tiny.pt", "--adapter", "tiny.pt", code=1).err
    assert files() == {"tiny.pt", "se.safetensors", "x.pt"}


# -- the way back ------------------------------------------------------------------------------------------


def test_eject_writes_the_original(se_inject, tiny):
    se_inject("tiny.pt", *SMALL, "--block", "se", "--block", "eca", "--init", "paper", "-o", "x.pt")
    done = se_inject("eject", "x.pt", *SMALL, "-o", "back.pt", "-o", "back.ts", "-o", "back.onnx", "-o", "back.pt2")
    assert "8 blocks taken out of Sequential from x.pt: 62 of 82 entries of the state dict left" in done.out
    back = torch.load("back.pt", weights_only=False)
    assert list(back.state_dict()) == list(tiny.state_dict())
    assert all(torch.equal(value, tiny.state_dict()[key]) for key, value in back.state_dict().items())
    assert [type(module) for module in back.modules()] == [type(module) for module in tiny.modules()]
    assert b"se_inject" not in Path("back.pt").read_bytes()
    assert same(tiny, back)
    assert files() == {"tiny.pt", "x.pt", "back.pt", "back.ts", "back.onnx", "back.pt2"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("tiny.pt", "-o", "y.pt"), 1, "holds no block"),
        (("tiny.pt",), 2, "--output"),
        (("none.pt", "-o", "y.pt"), 2, "no file"),
        (("tiny.pt", "-o", "y.json"), 2, "no export format"),
        (("tiny.pt", "-o", "tiny.pt"), 1, "exists"),
    ],
)
def test_what_can_not_be_ejected(se_inject, tiny, arguments, code, message):
    assert message in se_inject("eject", *arguments, code=code).err
    assert files() == {"tiny.pt"}


# -- files -------------------------------------------------------------------------------------------------


def test_plans_and_adapters_appear_with_all_other_files_or_not_at_all(se_inject, tiny, onnx_fails):
    Path("old.safetensors").write_text("old")
    for output in ("old.safetensors", "missing/x.onnx"):
        se_inject("tiny.pt", *SMALL, "-o", "x.json", "-o", output, "-o", "x.pt", code=1)
    se_inject("tiny.pt", *SMALL, "-o", "x.json", "-o", "x.onnx", code=1)
    se_inject("tiny.pt", *SMALL, "-o", "x.json", "-o", "./x.json", code=2)
    assert files() == {"tiny.pt", "old.safetensors"}
    se_inject("tiny.pt", *SMALL, "-o", "x.json", "-o", "old.safetensors", "-o", "x.pt", "--force")
    assert load_file("old.safetensors")
    assert files() == {"tiny.pt", "old.safetensors", "x.json", "x.pt"}


# -- blocks that are broken --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoBuild", "KeyError: 'no colour'"),
        ("Exits", "SystemExit: 3"),
        ("NoInit", "fails in its identity_init\nseen: RuntimeError: no start today"),
        ("Shrinks", "must return what it was given"),
        ("Widens", "torch.float64"),
        ("Overwrites", "overwrites the value it is given"),
        ("Trains", "in training\nseen: RuntimeError: not in training"),
        ("Lonely", "(1, 32, 8, 8) in eval\nseen: RuntimeError: one is too few"),
        ("Looks", "can't look at numbers"),
        ("Later", "numbers are not for me"),
        ("Lies", "does not start as x ↦ x"),
        ("Dead", "no gradient reaches"),
    ],
)
def test_a_fault_of_a_block_is_told_as_its_own_and_nothing_is_written(se_inject, tiny, gates, name, message):
    before = Path("tiny.pt").read_bytes()
    done = se_inject("tiny.pt", *SMALL, "--block", f"2={gates}:{name}", "--block", "1=se", "-o", "x.pt", code=1)
    assert f"{gates}:{name}" in done.err
    assert message in done.err
    assert "please report" not in done.err
    assert "hint:" in done.err
    assert files() == {"tiny.pt", "gates.py"}
    assert Path("tiny.pt").read_bytes() == before


def test_a_good_block_beside_them_works(se_inject, tiny, gates):
    se_inject("tiny.pt", *SMALL, "--block", f"{gates}:Good", "-o", "x.onnx")
    assert files() == {"tiny.pt", "gates.py", "x.onnx"}


@pytest.mark.parametrize("text", ["raise OSError('no weights')", "import a_package_that_is_not_there", "def (", "sys"])
def test_a_file_of_blocks_that_can_not_be_imported(se_inject, tiny, gates, text):
    Path(gates).write_text(f"{text}\n")
    done = se_inject("tiny.pt", *SMALL, "--block", f"{gates}:Good", "-o", "x.pt", code=1)
    assert gates in done.err
    assert files() == {"tiny.pt", "gates.py"}
