"""What is checked is what is used: one thing that two readers find in two places, or read in two ways."""

import json
import re
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

import se_inject as si
from se_inject.errors import InjectError, LoadError
from se_inject.forwards import program
from se_inject.gates.data import preprocessing_for
from se_inject.loading import load_program, load_weights_
from se_inject.loading.torchscript import reader
from tests.files.hostile import records, scripted, zipped

IMAGES = torch.rand(2, 3, 16, 16)
SOURCE = "test_two_readers.py"
OWN = "__torch__.tests.loading.test_two_readers"


class A(nn.Module):
    def __init__(self):
        super().__init__()
        self.k0 = 1

    def forward(self, x):
        return x * self.k0


class B(nn.Module):
    def forward(self, x):
        return x


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = A(), B()

    def forward(self, x):
        return self.b(self.a(x))


def parts_of(net):
    return records(scripted(net))


def name_of(parts, ending):
    return next(name for name in parts if name.endswith(ending))


def replaced(parts, ending, *changes):
    name = name_of(parts, ending)
    data = parts[name] if isinstance(parts[name], bytes) else parts[name].encode()
    for old, new in changes:
        assert old in data, (old, data)
        data = data.replace(old, new)
    return {**parts, name: data}


@pytest.mark.parametrize(
    ("union", "made", "is_sound"),
    [
        ("Union[Tensor, List[int]]", "List[int]", True),
        ("Union[Tensor, Tuple[Tensor, Tensor, Tensor]]", "Tuple[Tensor, Tensor, Tensor]", True),
        ("Union[List[int], List[Tensor]]", "List[Tensor]", True),
        ("Union[Tuple[Tensor], Tuple[Tensor, Tensor, Tensor]]", "Tuple[Tensor, Tensor, Tensor]", False),
        (f"Union[List[{OWN}.A], List[Tensor]]", f"List[{OWN}.A]", False),
        (f"Union[{OWN}.A, {OWN}.B]", f"{OWN}.A", False),
        (f"Union[Tensor, {OWN}.A]", f"{OWN}.A", True),
    ],
)
def test_a_cast_from_a_union_is_to_what_the_interpreter_tells_apart(union, made, is_sound, tmp_path):
    """What it doesn't tell apart it would read as if it were the other: beyond the end of an object."""
    source = f"z = annotate(List[{union}], [])\n    n = torch.len([unchecked_cast({made}, z[0])])\n    return torch.add(x, n)"
    parts = replaced(parts_of(Pair()), SOURCE, (b"return x", source.encode()))
    (tmp_path / "a.pt").write_bytes(zipped(parts))
    if is_sound:
        load_program(tmp_path / "a.pt")
    else:
        with pytest.raises(LoadError, match="unchecked cast"):
            load_program(tmp_path / "a.pt")


def chain(count, write):
    """Source of classes, each of which has a parameter of the next one's."""
    lines = [f"def f0(x: Tensor) -> {write(0)}:\n  return None\n"]
    for k in range(count):
        following = write(k + 1) if k < count - 1 else "Optional[int]"
        lines.append(
            f"class C{k}(Module):\n  __parameters__ = []\n  __buffers__ = []\n"
            f"  def g(self: __torch__.h.C{k},\n    y: {following}) -> int:\n    return 1\n"
        )
    return "".join(lines)


WRITTEN = {
    "a string": 'Optional["__torch__.h.C{}"]',
    "another string": "Optional['__torch__.h.C{}']",
    "letters by number": 'Optional["\\137_torch__.h.C{}"]',
    "two strings": 'Optional["__torch__" ".h.C{}"]',
    "a sum": "__torch__.h.C{} | None",
}


@pytest.mark.parametrize("how", WRITTEN)
def test_types_are_written_as_torch_writes_them(how, tmp_path):
    parts = replaced(parts_of(B()), SOURCE, (b"return x", b"z = __torch__.h.f0(x)\n    return x"))
    root = next(iter(parts)).partition("/")[0]
    source = chain(400, lambda k: WRITTEN[how].format(k))
    (tmp_path / "a.pt").write_bytes(zipped({**parts, f"{root}/code/__torch__/h.py": source}))
    with pytest.raises(LoadError, match="declares a type in a form of its own"):
        si.load(tmp_path / "a.pt")


CALLS = ['annotate(Optional["__torch__.h.C0"], None)', 'isinstance(x, "__torch__.h.C0")']


@pytest.mark.parametrize("call", CALLS)
def test_text_that_names_a_class_counts_as_its_name(call, tmp_path):
    parts = replaced(parts_of(B()), SOURCE, (b"return x", f"z = {call}\n    return x".encode()))
    root = next(iter(parts)).partition("/")[0]
    source = chain(400, lambda k: f"Optional[__torch__.h.C{k}]")
    source = re.sub("def f0.*\n.*\n", "", source)
    (tmp_path / "a.pt").write_bytes(zipped({**parts, f"{root}/code/__torch__/h.py": source}))
    with pytest.raises(LoadError, match="need one another in turn"):
        si.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "record", ["__torch__.h.py", "__torch__/h.x.py", "other.py", "__torch__/h h.py", "__torch__//h.py"]
)
def test_source_is_where_torch_looks_for_it(record, tmp_path):
    parts = parts_of(B())
    root = next(iter(parts)).partition("/")[0]
    (tmp_path / "a.pt").write_bytes(zipped({**parts, f"{root}/code/{record}": "class C(Module):\n  pass\n"}))
    with pytest.raises(LoadError, match=r"record of another name|read differently|damaged"):
        si.load(tmp_path / "a.pt")


def test_a_class_is_defined_once(tmp_path):
    parts = parts_of(Pair())
    source = parts[name_of(parts, SOURCE)]
    again = source + (
        b"class A(Module):\n  z : int\n" if isinstance(source, bytes) else "class A(Module):\n  z : int\n"
    )
    (tmp_path / "a.pt").write_bytes(zipped({**parts, name_of(parts, SOURCE): again}))
    with pytest.raises(LoadError, match="defines a name twice"):
        si.load(tmp_path / "a.pt")


STATE = b"}(X\x08\x00\x00\x00training\x88X\x16\x00\x00\x00_is_full_backward_hookNu"


def test_an_object_that_a_call_makes_is_refused(tmp_path):
    parts = parts_of(Pair())
    data = parts[name_of(parts, "/data.pkl")]
    kind = f"c{OWN}\nB\n".encode()
    start, end = data.index(f"c{OWN}\nA\n".encode()), data.index(b"X\x01\x00\x00\x00b")
    data = data[:start] + kind + STATE + b"R" + data[end:].replace(b"h\x07", kind)
    (tmp_path / "a.pt").write_bytes(zipped({**parts, name_of(parts, "/data.pkl"): data}))
    with pytest.raises(LoadError, match="an object that is made by a call"):
        load_program(tmp_path / "a.pt")


def test_a_state_needs_an_object(tmp_path):
    parts = parts_of(Pair())
    data = parts[name_of(parts, "/data.pkl")]
    kind = f"c{OWN}\nB\n".encode()
    start, end = data.index(f"c{OWN}\nA\n".encode()), data.index(b"X\x01\x00\x00\x00b")
    data = data[:start] + kind + b")\x81" + STATE + b"b" + data[end:].replace(b"h\x07", kind)
    whole = f"c{OWN}\nPair\nq\x00".encode()
    assert data.count(whole + b")\x81") == 1
    for content, words in (
        (data, "holds an object of another class"),
        (data.replace(whole + b")\x81", whole), "not an object"),
    ):
        (tmp_path / "a.pt").write_bytes(zipped({**parts, name_of(parts, "/data.pkl"): content}))
        with pytest.raises(LoadError, match=words):
            load_program(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("kind", "more"), [(b"Dict[str, Tensor]", b"(X\x01\x00\x00\x00aK\x01u"), (b"List[str]", b"(K\x01e")]
)
def test_nothing_is_added_to_what_has_a_type(kind, more, tmp_path):
    parts = parts_of(Holder())
    data = parts[name_of(parts, "/data.pkl")]
    end = data.index(b"R", data.index(kind)) + 1
    changed = data[:end] + more + data[end:]
    (tmp_path / "a.pt").write_bytes(zipped({**parts, name_of(parts, "/data.pkl"): changed}))
    with pytest.raises(LoadError, match="whole already"):
        load_program(tmp_path / "a.pt")


class Holder(nn.Module):
    """Attributes of every kind."""

    def __init__(self):
        super().__init__()
        self.numbers, self.words = [1, 2], ["a"]
        self.pair: tuple[int, str, torch.Tensor] = (1, "x", torch.ones(2))
        self.table: dict[str, torch.Tensor] = {"a": torch.ones(1)}
        self.rates, self.flags, self.tensors = [1.5], [True], [torch.ones(1)]
        self.empty = ()
        self.place = torch.device("cpu")

    def forward(self, x):
        return x * self.numbers[0] + self.pair[2].sum() + self.table["a"] + self.rates[0] + self.tensors[0]


OTHERS = [
    (b"pair : Tuple[int, str, Tensor]", b"pair : Tuple[int, str]"),
    (b"pair : Tuple[int, str, Tensor]", b"pair : Tuple[int, str, Tensor, int]"),
    (b"pair : Tuple[int, str, Tensor]", b"pair : Tuple[int, int, Tensor]"),
    (b"pair : Tuple[int, str, Tensor]", f"pair : {OWN}.NT".encode()),
    (b"table : Dict[str, Tensor]", b"table : Dict[str, int]"),
    (b"rates : List[float]", b"rates : List[int]"),
    (b"tensors : List[Tensor]", f"tensors : List[{OWN}.Holder]".encode()),
    (b"numbers : List[int]", f"numbers : {OWN}.Holder".encode()),
    (b"place : Device", f"place : {OWN}.Holder".encode()),
    (b"words : List[str]", b"words : Tuple[str]"),
    (b"empty : Tuple[()]", b"empty : Tuple[int]"),
]


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: change[1].decode())
def test_every_value_is_of_the_type_that_is_declared(change, tmp_path):
    parts = replaced(parts_of(Holder()), SOURCE, change)
    name = name_of(parts, SOURCE)
    parts[name] += b"class NT(NamedTuple):\n  a : int\n  b : str\n"
    (tmp_path / "a.pt").write_bytes(zipped(parts))
    with pytest.raises(LoadError, match=f"`{change[0].split()[0].decode()}` holds an object of another class"):
        load_program(tmp_path / "a.pt")


def test_sound_values_of_every_kind(tmp_path):
    (tmp_path / "a.pt").write_bytes(scripted(Holder()))
    assert torch.equal(load_program(tmp_path / "a.pt")(IMAGES), Holder()(IMAGES))
    parts = replaced(
        parts_of(Holder()),
        SOURCE,
        (b"pair : Tuple[int, str, Tensor]", f"pair : {OWN}.NT".encode()),
        (b"(pair)[2]", b"(pair).c"),
    )
    parts[name_of(parts, SOURCE)] += b"class NT(NamedTuple):\n  a : int\n  b : str\n  c : Tensor\n"
    (tmp_path / "a.pt").write_bytes(zipped(parts))
    assert torch.equal(load_program(tmp_path / "a.pt")(IMAGES), Holder()(IMAGES))


def test_who_writes_to_a_file_while_it_is_read_changes_nothing_that_was_checked(tmp_path, monkeypatch):
    path, checked = tmp_path / "a.pt", reader.checked_sources
    path.write_bytes(zipped(parts_of(B())))
    data = path.read_bytes()

    def meanwhile(archive, *rest):
        found = checked(archive, *rest)
        path.write_bytes(data.replace(b"return x", b"return y"))
        return found

    monkeypatch.setattr(reader, "checked_sources", meanwhile)
    assert torch.equal(load_program(path)(IMAGES), IMAGES)
    assert b"return y" in path.read_bytes()


# -- defaults of a program's inputs ------------------------------------------------------------------------

DEFAULTS = [
    {"node": "eval"},
    {"node": "x"},
    {"tuple": [{"dict": [["a", {"node": "open"}]]}]},
    [{"slice": [{"node": "x"}, None, None]}],
    {"training": True},
]


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize("name", ["x", "eval", "open"])
def test_defaults_are_constants(default, name):
    data = {"class": "A", "home": "b", "inputs": [[name], ["y", default]], "example": None}
    data["lines"] = [["let", ["eval"], 1], ["let", ["open"], 1], ["return", {"tuple": [{"node": name}, {"node": "y"}]}]]
    with pytest.raises(LoadError, match="default"):
        program(json.dumps(data))


def test_sound_defaults():
    for default, value in ((1, 1), ({"tuple": [1, "a"]}, (1, "a")), ({"dtype": "float16"}, torch.float16)):
        data = {"class": "A", "home": "b", "inputs": [["x"], ["y", default]], "example": None}
        module = program(json.dumps({**data, "lines": [["return", {"node": "y"}]]}))
        assert type(module).forward(module, 0) == value


# -- weights -----------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()).eval()


def test_metadata_gives_no_orders(tmp_path):
    state = OrderedDict((k, v.double() if v.is_floating_point() else v) for k, v in small().state_dict().items())
    state._metadata = {k: {"version": 2, "assign_to_params_buffers": True} for k in ("", "0", "1", "2")}
    torch.save(state, tmp_path / "w.pt")
    model = small()
    kept = dict(model.named_parameters())
    load_weights_(model, tmp_path / "w.pt")
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    assert model[0].weight.dtype == torch.float32
    state["1.running_mean"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(LoadError):
        load_weights_(model, tmp_path / "w.pt")
    assert all(
        torch.equal(value, before[key]) and value.dtype == before[key].dtype
        for key, value in model.state_dict().items()
    )


def test_versions_of_layers_are_kept(tmp_path):
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    state._metadata["1"]["version"] = 1  # from before there were counters
    torch.save(state, tmp_path / "w.pt")
    load_weights_(small(), tmp_path / "w.pt")
    state._metadata["1"]["version"] = 2
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(LoadError, match="num_batches_tracked"):
        load_weights_(small(), tmp_path / "w.pt")


# -- what a network says of its inputs ---------------------------------------------------------------------


def with_child(module):
    network = torchvision.models.resnet18(num_classes=4)
    network._modules["pretrained_cfg"] = module
    return network


def with_attribute(**attributes):
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    )
    vars(network).update(attributes)
    return network


def odd():
    module = nn.Identity()
    module.input_size = "abc"
    return module


STATED = {
    "a layer": lambda: with_child(nn.LSTM(3, 4)),
    "text": lambda: with_child(odd()),
    "a trillion": lambda: with_attribute(image_size=10**12),
    "beyond 64 bits": lambda: with_attribute(config={"image_size": 2**70}),
    "gigabytes": lambda: with_attribute(image_size=40_000),
    "a pair": lambda: with_attribute(img_size=(40_000, 8)),
    "a list in a list": lambda: with_attribute(args={"imgsz": [[64]]}),
    "a flag": lambda: with_attribute(imgsz=True),
}


@pytest.mark.parametrize("kind", STATED)
def test_sizes_that_no_image_has_are_not_believed(kind, tmp_path):
    torch.save(STATED[kind](), tmp_path / "n.pt")
    try:
        plan = si.plan(si.load(tmp_path / "n.pt"))
    except InjectError:
        return
    assert max(plan.inputs[0][0]) <= 1000


def test_sizes_that_an_image_has_are_believed():
    for attributes in ({"image_size": 48}, {"config": {"image_size": 48}}, {"img_size": (48, 48)}):
        assert si.plan(with_attribute(**attributes)).inputs[0][0] == [2, 3, 48, 48]


@pytest.mark.parametrize("config", [{"mean": "abc"}, {"std": 5}, {"mean": [None] * 3}, {"mean": ["1", "2", "3"]}])
def test_odd_colours_are_not_believed(config):
    network = with_attribute(pretrained_cfg=config)
    assert preprocessing_for(network, (2, 3, 8, 8)) == preprocessing_for(with_attribute(), (2, 3, 8, 8))


def test_a_program_asks_for_no_gigabytes(tmp_path):
    data = {"class": "A", "home": "b", "inputs": [["x"]], "lines": [["return", {"node": "x"}]]}
    module = program(json.dumps({**data, "example": [[[2, 3, 40_000, 40_000], "float32"]]}))
    nn.Module.__init__(module)
    torch.save(module, tmp_path / "p.pt")
    with pytest.raises(LoadError, match="too large"):
        si.find_sites(si.load(tmp_path / "p.pt"))


def test_printing_a_plan_writes_no_control_characters():
    data = json.loads(si.plan(with_attribute(), IMAGES).to_json())
    bad = "\x1b]0;PWNED\x07\x1b[31m\u202e"
    data["model"] = data["steps"][0]["site"] = data["steps"][0]["owner"] = bad
    plan = si.Plan.from_json(json.dumps(data))
    assert not any(letter in str(plan) + repr(plan) for letter in "\x1b\x07\u202e")


SHARING = {
    "tuples": "t{} = (t{}, t{})",
    "lists": "t{} = [t{}, t{}]",
    "dicts": 't{} = {{"a": t{}, "b": t{}}}',
    "what is annotated": "t{} = annotate(List[int], [t{}, t{}])",
}


def with_lines(*lines):
    return zipped(replaced(parts_of(B()), SOURCE, (b"return x", "\n    ".join(lines).encode())))


@pytest.mark.parametrize("how", SHARING)
def test_what_values_unfold_to_is_bounded(how, tmp_path):
    lines = ["t0 = (1, 2)", *(SHARING[how].format(k, k - 1, k - 1) for k in range(1, 40)), "return x"]
    (tmp_path / "a.pt").write_bytes(with_lines(*lines))
    with pytest.raises(LoadError, match="values within values without end"):
        si.load(tmp_path / "a.pt")


def test_values_that_operators_make_count_as_one(tmp_path):
    tuples = ["t0 = (1, 2)", *(SHARING["tuples"].format(k, k - 1, k - 1) for k in range(1, 5))]
    sums = [
        "x0 = torch.cat([x, x], 1)",
        *(f"x{k} = torch.max(torch.cat([x{k - 1}, x{k - 1}], 1), x0)" for k in range(1, 20)),
    ]
    (tmp_path / "a.pt").write_bytes(with_lines(*tuples, *sums[:1], "return x0"))
    assert torch.equal(load_program(tmp_path / "a.pt")(IMAGES), torch.cat([IMAGES, IMAGES], 1))
    (tmp_path / "a.pt").write_bytes(with_lines(*sums, "return x0"))
    assert load_program(tmp_path / "a.pt") is not None
