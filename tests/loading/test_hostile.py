"""No file runs anything, takes all memory, or takes forever: the corpus of ``tests/files/hostile.py``, through the one door."""

import contextlib
import copy
import gc
import json
import os
import pickle
import time
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

import se_inject as si
from se_inject.errors import LoadError, UntrustedGlobals
from se_inject.forwards import body_of, generated_class, is_edited, original_class
from se_inject.forwards import programs as _programs
from se_inject.forwards import vocabulary as _vocabulary
from se_inject.loading import formats as _formats
from se_inject.loading import load, load_program, load_weights_
from tests.files import hostile
from tests.files.hostile import (
    CALL,
    CONTAINERS,
    DAMAGED,
    HIT,
    PAYLOADS,
    PROTO,
    Reduced,
    Stated,
    archived,
    pickled,
    small,
)
from tests.fuzz.run import peak_bytes

TARGET = small()
SECONDS = 10
MEGABYTES = 256
"""What a bomb may take: what unpickling two million objects takes."""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model.pt"


def refused(path, data, kind=LoadError, match=None):
    path.write_bytes(data)
    with pytest.raises(kind, match=match) as caught:
        load(path)
    with contextlib.suppress(LoadError):
        load_weights_(copy.deepcopy(TARGET), path)
    assert not os.path.exists(HIT)
    assert all(letter.isprintable() or letter == "\n" for letter in str(caught.value))
    return caught.value


# -- pickles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_runs(name, container, path):
    with contextlib.suppress(Exception):
        pickle.loads(PAYLOADS[name])
    os.remove(HIT)
    error = refused(path, CONTAINERS[container](PAYLOADS[name]))
    assert isinstance(error, UntrustedGlobals) == ((name, container) not in DAMAGED)


def test_a_tar_archive_is_not_unpacked(path):
    path.write_bytes(hostile.legacy_tar())
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    os.remove(HIT)
    refused(path, hostile.legacy_tar(), match="a tar archive")


@pytest.mark.parametrize("name", hostile.polyglots())
def test_polyglots(name, path):
    refused(path, hostile.polyglots()[name])


@pytest.mark.parametrize("name", hostile.misleading())
def test_archives_that_say_two_things(name, path):
    refused(path, hostile.misleading()[name], match="damaged or made to mislead")


def test_a_safetensors_header_of_many_lists(path, monkeypatch):
    """Python and the library make far more of it than it is long."""
    monkeypatch.setattr(_formats, "_LARGEST_HEADER", 1000)
    header = b'{"a":[' + b"[]," * 1000 + b"[]]}"
    refused(path, len(header).to_bytes(8, "little") + header, match="header is larger")


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (nn.Conv2d, (3, 4, 1)),
        (torchvision.models.ResNet, (torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])),
        (torchvision.models.get_model, ("resnet18",)),
        (timm.create_model, ("resnet18",)),
        (torch.load, ("model.pt",)),
        (torch.hub.load, ("owner/repository", "model")),
        (nn.functional.relu, (1,)),
        (nn.Module.load_state_dict, (1, 2)),
    ],
)
def test_allowed_packages_are_not_called(function, args, path, monkeypatch):
    data = pickled(function, *args, protocol=4)
    called = []
    for kind in (nn.Conv2d, torchvision.models.ResNet):
        monkeypatch.setattr(kind, "__init__", lambda *args: called.append(args))
    refused(path, archived(data), UntrustedGlobals, function.__qualname__)
    assert not called


@pytest.mark.parametrize("code", [b"(K\x03K\x04K\x01itorch.nn\nConv2d\n.", b"(ctorch.nn\nConv2d\nK\x03K\x04K\x01o."])
def test_old_opcodes_call_no_class(code, path, monkeypatch):
    assert isinstance(pickle.loads(PROTO + code), nn.Conv2d)
    called = []
    monkeypatch.setattr(nn.Conv2d, "__init__", lambda *args: called.append(args))
    refused(path, PROTO + code)
    assert not called


@pytest.mark.parametrize(
    "function",
    [
        torch.from_file,
        torch.load,
        torch.nn.functional.handle_torch_function,
        torch.nn.init.normal_,
        timm.create_model,
        timm.models.load_checkpoint,
        torchvision.models.get_model,
        os.system,
        small().load_state_dict,
    ],
)
def test_functions_that_a_network_may_not_hold(function, path):
    model = small()
    model.function = function
    refused(path, hostile.saved(model), UntrustedGlobals, function.__name__)


def test_class_from_elsewhere_in_an_allowed_package(path, monkeypatch):
    class Foreign(nn.Module):
        pass

    monkeypatch.setattr(torchvision.models, "Foreign", Foreign, raising=False)
    code = PROTO + b"ctorchvision.models\nForeign\n)\x81."
    refused(path, code, UntrustedGlobals, r"`torchvision\.models\.Foreign`")


def test_function_from_elsewhere_in_an_allowed_module(path):
    code = PROTO + b"ctorch.nn.functional\nhandle_torch_function\n."
    refused(path, code, UntrustedGlobals, r"`torch\.nn\.functional\.handle_torch_function`")


@pytest.mark.parametrize("name", hostile.CLASSES)
def test_classes_of_allowed_packages_that_do_more(name, path):
    refused(path, PROTO + hostile.CLASSES[name], UntrustedGlobals)


def test_no_torchscript_in_place_of_a_storage(path, monkeypatch):
    payload = pickled(torch.storage._load_from_bytes, hostile.scripted(small().eval()))
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("an archive was loaded"))
    refused(path, payload, match="an archive in place of a storage")


def test_all_that_is_refused_is_named(path):
    data = hostile.saved([Reduced(os.system, "true"), Reduced(exec, ""), Stated(), small()])
    refused(path, data, UntrustedGlobals, r"`posix.system`, `builtins.exec`, `.*\.Stated`")


def test_names_are_shown_as_text_and_never_as_a_command(path):
    code = b"\x80\x04\x8c\x0dmine; rm -rf \x8c\x08\x1b[31mNet\x93."
    error = refused(path, code, UntrustedGlobals, r"\\x1b\[31mNet")
    assert "trust=" not in str(error)
    assert "--trust" not in str(error)


# -- networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ['a") or exec("', "a\nb", "a\\x", 3])
@pytest.mark.parametrize("place", ["__dict__", "_modules", "_parameters", "_buffers"])
def test_names_that_are_code(name, place, path):
    model = small()
    getattr(model[1], place)[name] = None
    refused(path, hostile.saved(model), match="an attribute that is not a name")


@pytest.mark.parametrize("name", hostile.RIDERS)
def test_what_no_network_brings_along(name, path):
    model = small()
    hostile.RIDERS[name](model)
    refused(path, hostile.saved(model))


class Called:
    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return torch._tensor._rebuild_from_type_v2, self.args


@pytest.mark.parametrize(
    "args",
    [
        (torch.Size, torch.Tensor, ((1,),), {}),
        (torch._utils._rebuild_parameter, torch.Tensor, (torch.ones(1), True, None), {}),
        (torch._utils._rebuild_tensor_v2, nn.ReLU, (), {}),
        (torch._utils._rebuild_tensor_v2, torch.Tensor, 3, {}),
    ],
)
def test_only_plain_tensors_have_attributes(args, path):
    refused(path, hostile.saved({"model": small(), "more": Called(*args)}))


@pytest.mark.parametrize("name", hostile.STATES)
def test_what_torch_does_not_even_write(name, path):
    refused(path, hostile.STATES[name])


def test_nothing_is_hidden_from_the_checks(path):
    model = small()
    model[1].__dict__["__deepcopy__"] = nn.functional.relu
    outer = nn.ReLU()
    outer.extra = [{"model": model}]
    refused(path, hostile.saved(outer), match="a `__deepcopy__` of its own")


@pytest.mark.parametrize("name", hostile.BODIES)
def test_no_edited_forward_runs_code(name, path):
    refused(path, hostile.saved(hostile.Injected(hostile.BODIES[name])))


def test_an_edited_forward_that_is_none_of_these(path):
    path.write_bytes(hostile.saved(hostile.Injected(hostile._body())))
    image = torch.rand(2)
    assert torch.equal(load(path)(image), image)


def test_every_operator_that_an_edited_forward_may_call():
    """Of those that torch knows, none that takes a text opens a file of that name."""
    for name in ("save", "from_file", "read_file", "write_file", "load_tensor"):
        for space in ("aten", "prims", "torchvision", "image", "debugprims"):
            with pytest.raises(LoadError):
                _vocabulary.function_named(f"ops:{space}.{name}")


class Gives(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = [value]

    def forward(self, x):
        return self.value[0]


@pytest.mark.parametrize("value", [nn.ReLU(), nn.ReLU, nn.functional.relu, {"a": [nn.ReLU()]}, torch.UntypedStorage(1)])
def test_forwards_handle_nothing_but_values(value):
    """Modules, their tables, functions and classes could be changed or called."""
    x, y = {"node": "x"}, {"node": "y"}
    module = _programs.program_module("N", "n", [["x"]], [["call", ["y"], "part", [x], {}], ["return", y]])
    module.part = Gives(value)
    with pytest.raises(LoadError, match="handles a"):
        module(torch.ones(1))
    with pytest.raises(LoadError, match="handles a"):
        _vocabulary.set_item({}, "a", value)
    module.part = Gives([{"a": (1, torch.ones(2))}, None, "text"])
    assert module(torch.ones(1)) == module.part.value[0]


def test_weights_that_ask_for_a_large_network(path):
    for kind in ("meta", "stretched"):
        state = torchvision.models.resnet18().state_dict()
        for name, shape in (("fc.weight", (1_000_000, 512)), ("fc.bias", (1_000_000,))):
            state[name] = torch.empty(shape, device="meta") if kind == "meta" else torch.zeros(1).expand(shape)
        torch.save(state, path)
        del state
        gc.collect()
        peak_bytes()
        before = peak_bytes()
        with pytest.raises(LoadError):
            load("torchvision:resnet18", weights=path)
        assert not before or peak_bytes() - before < 3 * path.stat().st_size + MEGABYTES * 2**20


def test_names_and_tables_without_end(path):
    table = {}
    for index in range(400):
        table[str(index)] = table
    start = time.process_time()
    for found in (table, {"module." * 150_000 + "weight": torch.zeros(1)}, {"a": [[[]]] * 5}):
        path.write_bytes(hostile.saved(found))
        for read in (load, lambda path: load_weights_(small(), path)):
            with pytest.raises(LoadError) as caught:
                read(path)
            assert len(str(caught.value)) < 2000
    assert time.process_time() - start < SECONDS


# -- bombs -------------------------------------------------------------------------------------------------


@pytest.mark.no_cover  # time is measured
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured on Linux alone")
@pytest.mark.parametrize("name", hostile.bombs())
def test_bombs(name, path):
    data = hostile.bombs()[name]
    path.write_bytes(data)
    peak_bytes()
    before, start = peak_bytes(), time.process_time()
    with pytest.raises(LoadError) as caught:
        load(path)
    told = str(caught.value)
    del caught  # the error's frames hold what had been read
    gc.collect()
    with contextlib.suppress(LoadError):
        load_weights_(small(), path)
    assert time.process_time() - start < SECONDS
    assert peak_bytes() - before < 2 * len(data) + MEGABYTES * 2**20
    assert "MemoryError" not in told


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured on Linux alone")
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        lambda model, path: torch.save(model, path, _use_new_zipfile_serialization=False),
        lambda model, path: path.write_bytes(pickle.dumps(model)),
        lambda model, path: path.write_bytes(pickle.dumps(model, protocol=2)),
    ],
)
def test_memory_of_a_large_file(write, mmap, path):
    """A mapped file's own pages count, which are the system's to take back."""
    write(nn.Linear(4000, 4000), path)
    peak_bytes()
    before = peak_bytes()
    model = load(path, mmap=mmap)
    assert peak_bytes() - before < 2 * path.stat().st_size + 2**25
    assert model.weight.shape == (4000, 4000)


# -- programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile.EXECUTED)
def test_torch_executes_this_and_the_door_does_not(name, path):
    path = path.with_suffix(".pt2")
    path.write_bytes(hostile.EXECUTED[name]())
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.9 warns of its own buffers before it gets there
        torch.export.load(path)
    if name not in hostile.NOT_YET_EXECUTED:
        os.remove(HIT)
    with contextlib.nullcontext() if name in hostile.ACCEPTED else pytest.raises(LoadError):
        load_program(path)
    with contextlib.nullcontext() if name in hostile.ACCEPTED else pytest.raises(LoadError):
        load(path)
    assert not os.path.exists(HIT)


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_programs(name, path):
    path.write_bytes(hostile.PROGRAMS[name]())
    if name in hostile.ACCEPTED:
        program = load_program(path)
        program.module()(torch.rand(2, 3, 8, 8))
    else:
        for door in (load_program, load):
            with pytest.raises(LoadError):
                door(path)
    assert not os.path.exists(HIT)


@pytest.mark.parametrize("name", ["__setstate__", "two directories", "two directories of zip64"])
def test_torch_runs_a_torchscript_archive_when_it_is_loaded(name, path):
    path.write_bytes(hostile.SCRIPTED[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(path)
    assert os.path.exists(HIT)


@pytest.mark.parametrize("name", hostile.SCRIPTED)
def test_torchscript(name, path):
    path.write_bytes(hostile.SCRIPTED[name]())
    with contextlib.suppress(FileNotFoundError):
        os.remove(HIT)
    reasons = {
        "a class of C++": "holds `__torch__.torch.classes",
        "tuples in tuples": "values within values",
        "lists in lists": "values within values",
        "a place far out": "out of order",
        "an unknown part of a tensor": "made of something unknown",
    }
    for door in (load_program, load):
        with pytest.raises(LoadError, match=reasons.get(name)):
            door(path)
    assert not os.path.exists(HIT)


def test_torch_reads_only_what_was_checked(path):
    data = hostile.records(hostile.scripted(small().eval()))
    root = next(iter(data)).partition("/")[0]
    path.write_bytes(hostile.zipped({**data, f"{root}/code/more.debug_pkl": b"x", f"{root}/extra/x": b"x"}))
    image = torch.rand(1, 3, 8, 8)
    assert load_program(path)(image).shape == load(path)(image).shape


def test_the_graphs_are_looked_at_too(path, monkeypatch):
    """Should the source text hide an operator, what torch made of it doesn't."""
    monkeypatch.setattr("se_inject.loading.torchscript.source.FORBIDDEN", frozenset())
    path.write_bytes(hostile.SCRIPTED["a file"]())
    with pytest.raises(LoadError, match="calls `aten::save`"):
        load_program(path)


def test_torch_logs_no_text_of_a_file(path, capfd):
    size = f"Max({','.join(f's{n}*s{n + 1}' for n in range(30))})"
    path.write_bytes(hostile._program(lambda program: hostile._everywhere(program, "expr_str", size))())
    capfd.readouterr()
    with pytest.raises(LoadError):
        load_program(path)
    assert not capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="torch copies what is no file")
def test_memory_of_a_large_script(path):
    """Beside this, the copy that torch reads is in memory."""
    path.write_bytes(hostile.scripted(nn.Linear(4000, 4000)))
    gc.collect()
    peak_bytes()
    before = peak_bytes()
    assert load_program(path).weight.shape == (4000, 4000)
    assert peak_bytes() - before < 1.5 * path.stat().st_size + 2**25


@pytest.mark.parametrize("name", hostile.UNFOLDING)
def test_a_script_that_unfolds(name, path):
    """Little source text that is much when it is written out, or a number that grows without end."""
    hostile.UNFOLDING[name](path)
    start = time.process_time()
    with pytest.raises(LoadError):
        load(path)
    assert time.process_time() - start < SECONDS


def test_a_long_chain_of_values_that_nobody_needs(path):
    source = "def forward(self, x: Tensor) -> Tensor:\n    a = x.size(0)\n"
    hostile._written(source + "    a = x.size(a)\n" * 3000 + "    print(a)\n    return x + 1\n")(path)
    start = time.process_time()
    assert json.loads(type(load(path)).program)["lines"][-1][0] == "return"
    assert time.process_time() - start < SECONDS


def test_a_plan_read_from_a_model_imports_nobody(path, tmp_path):
    """The name of a block in an injected network is a text of the file's choosing."""
    (tmp_path / "gates.py").write_text(f"open({HIT!r}, 'w').close()\n\n\ndef Gate(channels): ...\n")
    torch.save(si.inject(small(), torch.rand(2, 3, 8, 8), at="*"), path)
    model = load(path)
    owner = next(module for module in model.modules() if is_edited(module))
    plain = json.dumps(body_of(owner))
    for block in ("gates.py:Gate", "gates:Gate"):
        body = plain.replace('"block": "se"', f'"block": "{block}"')
        owner.__class__ = generated_class(original_class(owner), body)
        with pytest.raises(UntrustedGlobals, match="is code that a file may not name"):
            si.plan_of(model)
        assert len(si.eject_(copy.deepcopy(model)).state_dict()) < len(model.state_dict())
    assert not os.path.exists(HIT)
    with pytest.raises(si.InjectError):
        si.plan_of(model, trust=["gates"]).apply(small())
    assert os.path.exists(HIT)


def test_paths_in_an_archive_are_only_names(path, tmp_path):
    data = hostile.records(hostile.saved(small()))
    path.write_bytes(hostile.zipped({**data, "archive/../../outside": b"x", "archive//etc/outside": b"x"}))
    assert isinstance(load(path), nn.Sequential)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.pt"]


def test_trust_does_not_reach_further(path, monkeypatch):
    path.with_name("helper.py").write_text("from os import system\n")
    path.write_bytes(archived(PROTO + b"chelper\nsystem\n" + CALL))
    with pytest.raises(UntrustedGlobals, match=r"`helper\.system`"):
        load(path, trust=["helper"])
    assert not os.path.exists(HIT)


# -- TorchScript, below any operator -----------------------------------------------------------------------


def _chain(data, count, kind):
    """An archive with classes, functions or methods more that need one another in turn."""
    parts = hostile.records(data)
    name = next(name for name in parts if name.endswith(".py") and b"class Sequential" in parts[name])
    module, text = name.split("code/")[1][:-3].replace("/", "."), parts[name].decode()
    if kind == "classes":
        more = [f"class C{i}(Module):\n  a : {module}.C{i + 1}\n" for i in range(count)]
        text += "".join(more) + f"class C{count}(Module):\n  training : bool\n"
    elif kind == "functions":
        more = [f"def f{i}(x: Tensor) -> Tensor:\n  return {module}.f{i + 1}(x)\n" for i in range(count)]
        text += "".join(more) + f"def f{count}(x: Tensor) -> Tensor:\n  return x\n"
    else:
        last = f"  def m{count}(self: {module}.Sequential, x: Tensor) -> Tensor:\n    return x\n"
        head = "  def m{0}(self: {1}.Sequential, x: Tensor) -> Tensor:\n    return (self).m{2}(x, )\n"
        text += "".join(head.format(i, module, i + 1) for i in range(count)) + last
    parts[name] = text.encode()
    return hostile.zipped(parts)


@pytest.mark.parametrize("kind", ["classes", "functions", "methods"])
@pytest.mark.parametrize("count", [300, 6000])
def test_definitions_that_need_one_another_without_end(kind, count, path):
    """Of 6,000, torch's reader overflows its stack; it never sees them."""
    data = hostile.scripted(small().eval())
    path.write_bytes(_chain(data, 5, kind))
    load(path)
    refused(path, _chain(data, count, kind), match=r"in turn|too much source")


def test_types_within_types_without_end(path):
    parts = hostile.records(hostile.scripted(small().eval()))
    name = next(name for name in parts if name.endswith(".py") and b"class Sequential" in parts[name])
    parts[name] += f"class Deep(Module):\n  a : {'List[' * 90}int{']' * 90}\n".encode()
    refused(path, hostile.zipped(parts), match="goes too deep")


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


def test_an_object_of_another_class_than_declared(path):
    """The interpreter would read what lies behind the object in memory."""
    parts = hostile.records(hostile.scripted(_Two().eval()))
    name = next(name for name in parts if name.endswith(".py") and b"class _Two" in parts[name])
    text = parts[name].decode()
    conv, norm = (text.split(f"  {key} : ")[1].split("\n")[0] for key in ("conv", "norm"))
    assert conv != norm
    parts[name] = text.replace(f"  conv : {conv}", f"  conv : {norm}").encode()
    refused(path, hostile.zipped(parts), match="`conv` holds an object of another class")


def test_a_cast_that_nobody_checks(path):
    parts = hostile.records(hostile.scripted(_Two().eval()))
    name = next(name for name in parts if name.endswith(".py") and b"class _Two" in parts[name])
    text = parts[name].decode()
    norm = text.split("  norm : ")[1].split("\n")[0]
    assert "norm = self.norm" in text
    parts[name] = text.replace("norm = self.norm", f"norm = unchecked_cast({norm}, self.conv)").encode()
    refused(path, hostile.zipped(parts), match=r"unchecked cast|damaged")


def test_what_a_script_prints_stays_in_it(path, capfd):
    class Printing(_Two):
        def forward(self, x):
            print("\x1b[31mhint: run this")
            warnings.warn("\x1b[31mand this", stacklevel=2)
            return torch.relu(self.norm(self.conv(x)))

    path.write_bytes(hostile.scripted(Printing().eval()))
    network, program = load(path), load_program(path)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(program(images), network(images))
    assert capfd.readouterr() == ("", "")
