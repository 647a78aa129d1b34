"""Plans as files: the published schema, the first version for ever, and every kind of damage."""

import copy
import dataclasses
import json
import math
import os
import random
from pathlib import Path

import jsonschema
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import se_inject as si
from se_inject.errors import (
    ExportError,
    InjectError,
    LoadError,
    OptionError,
    SurgeryError,
    UntrustedGlobals,
)
from se_inject.plans.value import Plan
from se_inject.surgery import schema as _schema
from tests.common import randomise

STORED = Path(__file__).parent.parent / "data" / "plan_v1.json"
X = torch.empty(2, 3, 64, 64, device="meta")


def resnet(kind=BasicBlock):
    torch.manual_seed(0)
    return randomise(torchvision.models.ResNet(kind, [1, 1, 1, 1])).eval()


@pytest.fixture(scope="module")
def network():
    return resnet()


def stored(change=lambda data: None):
    data = json.loads(STORED.read_text())
    change(data)
    return json.dumps(data)


def step(**values):
    """The stored plan with the second of its four steps changed."""
    return stored(lambda data: data["steps"][1].update(values))


# -- the form ----------------------------------------------------------------------------------------------


def test_the_schema_is_a_schema_and_every_plan_fits_it(network):
    jsonschema.Draft7Validator.check_schema(_schema.plan_schema())
    validator = jsonschema.Draft7Validator(_schema.plan_schema())
    for options in ({}, {"position": "pre"}, {"block": "eca"}, {"stages": 4, "reduction": 2.5, "init": "paper"}):
        validator.validate(json.loads(si.plan(network, X, **options).to_json()))
        validator.validate(json.loads(si.plan_of(si.inject(network, X, **options)).to_json()))


def test_the_schema_uses_no_keyword_that_reading_does_not_check():
    def schemas(schema):
        yield schema
        for key in ("properties", "definitions"):
            for inner in schema.get(key, {}).values():
                yield from schemas(inner)
        inner = schema.get("items", [])
        for each in inner if isinstance(inner, list) else [inner]:
            yield from schemas(each)

    used = {key for schema in schemas(_schema.plan_schema()) for key in schema}
    checked = {
        "$ref", "type", "enum", "required", "properties", "additionalProperties", "items", "minItems", "maxItems",
        "minLength", "minimum", "maximum", "pattern",
    }  # fmt: skip
    assert used - checked == {"$schema", "definitions", "title", "description"}


def mutated(data, generator):
    """The data with one to three values anywhere in it replaced, removed, added or swapped."""
    data = copy.deepcopy(data)
    values = [None, True, 0, -1, 1, 2, 7, 1.5, 10**9, 10**30, "", "x", "se", "a.b", "é", "2nd", "se\n", [], [1], [1, 2],
              {}, {"a": 1}, "identity", "pre", "float32", [[2, 3, 64, 64], "float32"], "__class__", "class"]  # fmt: skip
    for _ in range(generator.randint(1, 3)):
        places = [data]
        while (inner := [item for item in _children(places[-1]) if isinstance(item, dict | list)]) and (
            len(places) == 1 or generator.random() < 0.75
        ):
            places.append(generator.choice(inner))
        place = places[-1]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        action = generator.choice(["replace", "replace", "replace", "remove", "add"])
        if action == "add" or not keys:
            if isinstance(place, dict):
                place[generator.choice(["colour", "options", "readers", "stage"])] = copy.deepcopy(
                    generator.choice(values)
                )
            else:
                place.append(copy.deepcopy(generator.choice(values)))
        elif action == "remove":
            del place[generator.choice(keys)]
        else:
            place[generator.choice(keys)] = copy.deepcopy(generator.choice(values))
    return data


def _children(place):
    return list(place.values()) if isinstance(place, dict) else place


def test_reading_agrees_with_the_schema_and_never_ends_in_anything_but_our_errors(network):
    generator = random.Random(0)
    validator = jsonschema.Draft7Validator(_schema.plan_schema())
    original = json.loads(STORED.read_text())
    kinds, keys = [type(module) for module in network.modules()], list(network.state_dict())
    outcomes = {}
    for _ in range(1500):
        data = mutated(original, generator)
        valid = validator.is_valid(data)
        assert (_schema.first_problem(data) is None) == valid, data
        try:
            plan = Plan.from_json(json.dumps(data))
        except InjectError as error:
            outcome = type(error).__name__
            assert valid or isinstance(error, LoadError)
            assert error.hint
        else:
            assert valid
            outcome = "read"
            assert json.loads(plan.to_json()) == data | {"steps": json.loads(plan.to_json())["steps"]}
            if generator.random() < 0.2:
                outcome = "applied"
                try:
                    plan.apply(network)
                except InjectError as error:
                    outcome = type(error).__name__
                    assert error.message
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert [type(module) for module in network.modules()] == kinds
    assert list(network.state_dict()) == keys
    assert {"read", "applied", "LoadError", "OptionError", "SurgeryError"} <= outcomes.keys(), outcomes


# -- versions ----------------------------------------------------------------------------------------------


def test_the_first_version_keeps_loading(network, tmp_path):
    plan = Plan.load(STORED)
    assert [(item.path, item.block, item.position) for item in plan.steps] == [
        ("layer2.0.gate", "se", "pre"),
        ("layer3.0.se", "se", "standard"),
        ("layer4.0.se", "se", "standard"),
        ("layer4.0.se_2", "cbam", "standard"),
    ]
    injected = plan.apply(network)
    assert si.verify(network, injected, X).passed
    assert si.plan_of(injected).steps == plan.steps
    assert [tuple(injected.get_submodule(path).fc1.weight.shape) for path in ("layer3.0.se", "layer2.0.gate")] == [
        (32, 256, 1, 1),
        (4, 64, 1, 1),
    ]
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == STORED.read_text()


def test_a_stored_plan_on_inputs_of_another_size(network):
    larger = torch.empty(2, 3, 128, 128, device="meta")
    plan = Plan.from_json(si.plan(network, X, stages=[2, 3]).to_json())
    fitted = plan.fitted(network, larger)
    assert fitted.cost().added == si.plan(network, larger, stages=[2, 3]).cost().added != plan.cost(network).added
    assert fitted.to_json() == si.plan(network, larger, stages=[2, 3]).to_json()


def test_fields_with_a_default_may_be_left_out():
    plan = Plan.from_json(stored(lambda data: [data["steps"][1].pop(key) for key in ("init", "readers", "stage")]))
    assert (plan.steps[1].init, plan.steps[1].readers, plan.steps[1].stage) == ("identity", None, None)


@pytest.mark.parametrize("version", [2, 99])
def test_a_later_version(version):
    with pytest.raises(LoadError, match=f"version {version}") as caught:
        Plan.from_json(stored(lambda data: data.update(se_inject_plan=version, colours=[])))
    assert (caught.value.seen, caught.value.hint) == ("this se-inject reads version 1", "update se-inject")


@pytest.mark.parametrize("version", [None, 0, -1, "1", True, [1], 1.5])
def test_no_version(version):
    with pytest.raises(LoadError, match="not a plan"):
        Plan.from_json(stored(lambda data: data.update(se_inject_plan=version)))


# -- what is wrong, and in which step ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (step(channels="many"), 'step 2: `channels` must be integer, not "many"'),
        (step(channels=0), "step 2: `channels` can't be 0"),
        (step(channels=True), "step 2: `channels` must be integer, not true"),
        (step(rank=4), "step 2: `rank` can't be 4"),
        (step(colour="red"), "step 2: `colour` is not known here: site, owner"),
        (step(init="zero"), "step 2: `init` must be one of identity, paper"),
        (step(position="above"), "step 2: `position` must be one of standard"),
        (step(block_name="2nd"), 'step 2: `block_name` can\'t be "2nd"'),
        (step(block_name="se\n"), "step 2: `block_name` can't be"),
        (step(size=[4, "4"]), 'step 2: `size.1` must be integer, not "4"'),
        (step(readers=[]), "step 2: `readers` can't have 0 entries"),
        (step(options=[]), "step 2: `options` must be object"),
        (stored(lambda data: data["steps"][2].pop("site")), "step 3: `site` is missing"),
        (stored(lambda data: data["steps"].append(3)), "step 5: it must be object, not 3"),
        (stored(lambda data: data.update(steps=[])), "`steps` can't have 0 entries"),
        (stored(lambda data: data.pop("steps")), "`steps` is missing"),
        (stored(lambda data: data["inputs"][0].__setitem__(1, "load")), "`inputs.0.1` must be one of float32"),
        ("[" * 100_000, "longer or deeper than any plan"),
        ('"' + "long" * 2_000_000 + '"', "longer or deeper than any plan"),
        (
            stored(lambda data: data["inputs"][0].__setitem__(0, [2**70])),
            "`inputs.0.0.0` can't be 1180591620717411303424",
        ),
        (stored(lambda data: data["inputs"][0].__setitem__(0, [1] * 9)), "`inputs.0.0` can't have 9 entries"),
        (stored(lambda data: data.update({"\x1b[1m\nhint": 1})), "`\\x1b[1m\\nhint` is not known here"),
        ('{"se_inject_plan": NaN}', "NaN is not a JSON number"),
        ("[]", "it must be object"),
        ("", "JSONDecodeError"),
    ],
    ids=range(25),
)
def test_what_is_wrong_is_said(text, seen):
    with pytest.raises(LoadError, match="this is not a plan") as caught:
        Plan.from_json(text)
    assert seen in caught.value.seen
    assert "plan.schema.json" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "error", "message", "more"),
    [
        (step(size=[4]), LoadError, "step 2 of the plan: a step of rank 2 has 1 numbers", ""),
        (step(block="eka"), OptionError, "step 2 of the plan: no block is called `eka`", "`eca`"),
        (
            step(options={"bias": "no"}),
            OptionError,
            "step 2 of the plan: option `bias` of block `se` can't be 'no'",
            "",
        ),
        (step(options={"norm": 1}), OptionError, "step 2 of the plan: option `norm` of block `se` can't be 1", ""),
        (
            step(options={"width": 1.5}),
            OptionError,
            "step 2 of the plan: option `width` of block `se` can't be 1.5",
            "",
        ),
        (step(options={"reduction": "4"}), OptionError, "step 2 of the plan: option `reduction` of block `se`", ""),
        (step(options={"reductoin": 4}), OptionError, "step 2 of the plan: block `se` has no option", "`reduction`"),
        (step(block="os:system"), UntrustedGlobals, "step 2 of the plan: block `os:system` is code", "trust=['os']"),
        (
            step(block="a; rm -r b:G"),
            UntrustedGlobals,
            "step 2 of the plan: block `a; rm -r b:G`",
            "see help(si.load)",
        ),
        (step(block="a\n\x1b[1m:G"), UntrustedGlobals, "step 2 of the plan: block `a\\n\\x1b[1m:G`", "help(si.load)"),
        (step(block_name="\ufb01lter"), LoadError, "step 2 of the plan: `\ufb01lter` can't be the name", ""),
        (step(block_name="class"), LoadError, "step 2 of the plan: `class` can't be the name", ""),
        (step(block="gates.py:G"), UntrustedGlobals, "step 2 of the plan: block `gates.py:G`", "trust=['gates.py']"),
    ],
    ids=[
        "rank",
        "block",
        "flag",
        "number",
        "fraction",
        "text",
        "option",
        "module",
        "shell",
        "terminal",
        "letters",
        "keyword",
        "file",
    ],
)
def test_what_is_not_known_here_names_its_step(text, error, message, more):
    with pytest.raises(error) as caught:
        Plan.from_json(text)
    assert caught.value.message.startswith(message)
    assert more in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (step(site="layer9.0.bn2"), "step 2 of the plan puts a block at `layer9.0.bn2`"),
        (step(channels=255), "step 2 of the plan expects 255 channels"),
        (step(owner="layer4"), "step 2 of the plan puts a block at `layer3.0.bn2`"),
        (step(value="relu"), "step 2 of the plan puts a block at `layer3.0.bn2`"),
        (step(readers=["nobody"]), "step 2 of the plan puts a block at `layer3.0.bn2`"),
        (step(position="pre"), "step 2 of the plan puts a block at `layer3.0.bn2`"),
        (step(block_name="forward"), "`layer3.0.forward` is to become a block"),
        (step(size=[4, 4, 4], rank=3), "step 2 of the plan expects 256 channels"),
    ],
    ids=["site", "channels", "owner", "value", "readers", "position", "name", "rank"],
)
def test_what_does_not_fit_the_network_names_its_step(network, text, message):
    plan = Plan.from_json(text)
    kinds = [type(module) for module in network.modules()]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(SurgeryError) as caught:
        plan.apply_(network)
    assert message in caught.value.message
    assert caught.value.seen
    assert [type(module) for module in network.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_network():
    with pytest.raises(SurgeryError, match=r"step 1 of the plan puts a block at `layer2.0.bn2`"):
        Plan.load(STORED).apply_(resnet(Bottleneck))


def test_options_that_a_block_refuses_are_found_before_the_network_is_touched(network):
    for options, error in (({"reduction": "half"}, OptionError), ({"reduction": -3}, OptionError)):
        with pytest.raises(error):
            Plan.from_json(step(options=options)).apply_(network)
        assert si.find_sites(network, X).everything().chosen


@pytest.mark.parametrize("value", [torch.float32, object(), {1, 2}])
def test_an_option_that_no_file_can_hold(network, value):
    with pytest.raises(OptionError, match="can't be stored"):
        si.plan(network, X, reduction=value)
    plan = si.plan(network, X)
    infinite = dataclasses.replace(plan, steps=(dataclasses.replace(plan.steps[0], options={"reduction": math.inf}),))
    with pytest.raises(OptionError, match="can't be stored"):
        infinite.to_json()


# -- files -------------------------------------------------------------------------------------------------


def test_a_file_and_back(network, tmp_path):
    plan = si.plan(network, X, stages=[4])
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path).steps == plan.steps
    with pytest.raises(ExportError, match="exists"):
        plan.save(path)
    si.plan(network, X, stages=[3]).save(path, force=True)
    assert Plan.load(path).steps != plan.steps
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("case", ["missing", "folder", "bytes"])
def test_files_that_are_none(case, tmp_path):
    path = tmp_path / "plan.json"
    if case == "folder":
        path.mkdir()
    elif case == "bytes":
        path.write_bytes(b"\x80\x04\xff")
    with pytest.raises(LoadError, match=r"plan\.json") as caught:
        Plan.load(path)
    assert caught.value.hint


GATE = """
import pathlib
from se_inject.blocks.registry import SqueezeExcitation

pathlib.Path(__file__).with_name("ran").touch()

class Gate(SqueezeExcitation):
    pass
"""


def test_code_that_a_plan_names_runs_only_if_it_is_trusted(network, tmp_path):
    (tmp_path / "own_gates.py").write_text(GATE)
    place = f"{tmp_path}/own_gates.py"
    text = step(block=f"{place}:Gate")
    for trust in ((), ("other",), ("own_gates",), ("/",)):
        with pytest.raises(UntrustedGlobals):
            Plan.from_json(text, trust=trust)
    assert not (tmp_path / "ran").exists()
    plan = Plan.from_json(text, trust=[place])
    assert (tmp_path / "ran").exists()
    assert type(plan.apply(network).get_submodule("layer3.0.se")).__name__ == "Gate"


def test_a_plan_that_an_editor_saved_with_a_mark_in_front(network, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(stored(lambda data: None), "utf-8-sig")
    assert Plan.load(path).to_json() == Plan.from_json(stored(lambda data: None)).to_json()


def test_a_whole_number_may_be_written_with_a_point(network):
    text = stored(lambda data: [each.update(channels=float(each["channels"])) for each in data["steps"]])
    assert '.0, "' in text
    assert [step.channels for step in Plan.from_json(text).steps] == [step.channels for step in Plan.load(STORED).steps]
    assert all(type(step.channels) is int for step in Plan.from_json(text).steps)


# -- plans of strangers ------------------------------------------------------------------------------------


def _plain():
    convs = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*(part for conv in convs for part in (conv, nn.BatchNorm2d(4), nn.ReLU())))


def _stored(tmp_path, change):
    data = json.loads(si.plan(_plain(), torch.rand(2, 3, 16, 16), at="*").to_json())
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "__deepcopy__",
        "__len__",
        "__torch_function__",
        "_se_inject_body",
        "_se_inject_original",
        "_ungated_forward",
        "class",
    ],
)
def test_names_that_a_block_can_not_have(name, tmp_path):
    path = _stored(tmp_path, lambda data: data["steps"][0].update(block_name=name))
    with pytest.raises(LoadError, match=f"`{name}` can't be the name of an attribute"):
        si.Plan.load(path)


@pytest.mark.parametrize("name", ["training", "_modules", "state_dict", "_forward_hooks"])
def test_names_that_the_class_has(name, tmp_path):
    plan = si.Plan.load(_stored(tmp_path, lambda data: data["steps"][0].update(block_name=name)))
    with pytest.raises(SurgeryError, match=rf"`2\.{name}` is to become a block"):
        plan.apply(_plain())


@pytest.mark.parametrize("shape", [[0, 3, 16, 16], [1, 3, 30_000, 30_000], [2**24, 2**24]])
def test_inputs_that_no_network_is_tried_on(shape, tmp_path):
    path = _stored(tmp_path, lambda data: data.update(inputs=[[shape, "float32"]]))
    with pytest.raises(LoadError, match=r"the plan's inputs are (empty|too large)"):
        si.Plan.load(path)


def test_a_plan_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/stdin"):
        for read in (si.Plan.load, lambda path: si.load_adapter(nn.ReLU(), path)):
            with pytest.raises(LoadError, match=r"a device, a pipe or a socket|not a regular file"):
                read(path)
    (tmp_path / "large").write_bytes(b" " * 9_000_000)
    with pytest.raises(LoadError):
        si.Plan.load(tmp_path / "large")
