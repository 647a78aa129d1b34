"""Files that try to run something, or to take all memory or time.

A payload, read by the reader it is made for, makes the file ``HIT`` in the current directory; the tests make sure
that it does. Opcodes: `c` GLOBAL, `X` text, `\\x85` to `\\x87` and `t` tuples, `R` REDUCE, `i` INST, `o` OBJ,
`\\x81` NEWOBJ, `\\x92` NEWOBJ_EX, `b` BUILD, `q` and `h` to store and fetch, `\\x93` STACK_GLOBAL, `\\x82` EXT1.
"""

import copyreg
import functools
import io
import json
import os
import pickle
import re
import struct
import subprocess
import warnings
import zipfile
import zlib

import torch
import torchvision
from torch import nn
from torch.export.pt2_archive import constants

from se_inject.forwards import edited
from tests.common import randomise

HIT = "hit"
TOUCH = f"open('{HIT}', 'w').close()"


def small():
    """A network with all kinds of state, of a few hundred bytes."""
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


# -- containers --------------------------------------------------------------------------------------------


def zipped(entries, **options):
    """A zip archive of these records."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def records(data):
    """The records of a zip archive, in order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(payload):
    """A file of torch.save with this pickle."""
    return zipped({"archive/data.pkl": payload, "archive/byteorder": "little", "archive/version": "3\n"})


def legacy(payload):
    """A file of torch before 1.6 with this pickle."""
    stream = io.BytesIO()
    torch.save([], stream, _use_new_zipfile_serialization=False)
    return stream.getvalue().replace(pickle.dumps([], 2), payload, 1)


def saved(thing, **options):
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(thing, stream, **options)
    return stream.getvalue()


CONTAINERS = {"zip": archived, "legacy": legacy, "plain": lambda payload: payload}

# -- pickles that run something ----------------------------------------------------------------------------


class Reduced:
    """Is pickled as the call of a function with these arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Stated:
    """Runs code when it is given its state."""

    def __init__(self):
        self.code = TOUCH

    def __setstate__(self, state):
        exec(state["code"])


class Made:
    """Runs code when it is made, by NEWOBJ or NEWOBJ_EX."""

    def __new__(cls, code="pass", *, more="pass"):
        exec(code)
        exec(more)
        return object.__new__(cls)

    def __getnewargs__(self):
        return (TOUCH,)


class MadeWithKeywords(Made):
    """As Made, with keywords."""

    def __getnewargs_ex__(self):
        return (), {"more": TOUCH}


def text(value):
    """The opcode that puts a text on the stack."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def pickled(function, *args, protocol=2):
    """The pickle of a call."""
    return pickle.dumps(Reduced(function, *args), protocol)


EXTENSION = 240
copyreg.add_extension("os", "system", EXTENSION)

PROTO = b"\x80\x02"
GETATTR = b"cbuiltins\ngetattr\n"
CALL = text(f"touch {HIT}") + b"\x85R."
PAYLOADS = {
    "os.system": pickled(os.system, f"touch {HIT}"),
    "subprocess": pickled(subprocess.call, ["touch", HIT]),
    "exec": pickled(exec, TOUCH),
    "eval, protocol 4": pickled(eval, TOUCH, protocol=4),
    "partial": pickled(functools.partial(exec, TOUCH)),
    "partial by BUILD": (
        PROTO + b"cfunctools\npartial\ncbuiltins\nprint\n\x85Rq\x00(cbuiltins\nexec\n" + text(TOUCH)
        + b"\x85}Ntbq\x010h\x01)R."
    ),
    "map": pickled(list, Reduced(map, exec, [TOUCH])),
    "state": pickle.dumps(Stated(), 2),
    "new": pickle.dumps(Made.__new__(Made), 2),
    "new with keywords": pickle.dumps(MadeWithKeywords.__new__(MadeWithKeywords), 4),
    "torch.save": pickled(torch.save, 1, HIT),
    "getattr": (
        PROTO + GETATTR + GETATTR + b"cos\npath\n" + text("os") + b"\x86R" + text("system") + b"\x86R" + CALL
    ),
    "a module in torch": (
        PROTO + GETATTR + b"ctorch.nn.init\nwarnings\n" + text("sys") + b"\x86R0" + pickled(exec, TOUCH)
    ),
    "a name with dots": b"\x80\x04\x8c\x08builtins\x8c\x0dexec.__call__\x93" + text(TOUCH) + b"\x85R.",
    "a module of an allowed module": (
        b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93" + text(f"touch {HIT}") + b"\x85R."
    ),
    "INST": PROTO + b"(" + text(f"touch {HIT}") + b"ios\nsystem\n.",
    "OBJ": PROTO + b"(cos\nsystem\n" + text(f"touch {HIT}") + b"o.",
    "EXT1": PROTO + b"\x82" + bytes([EXTENSION]) + text(f"touch {HIT}") + b"\x85R.",
    "from_file": (
        PROTO + GETATTR + b"ctorch._C\n_VariableFunctionsClass\n" + text("from_file") + b"\x86R"
        + text(HIT) + b"\x88K\x04\x87R."
    ),
    "rebuilt type": (
        PROTO + b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nexec\nctorch\nTensor\n"
        + text(TOUCH) + b"\x85NtR."
    ),
    "nested": pickled(torch.storage._load_from_bytes, legacy(pickled(exec, TOUCH))),
    "nested archive": pickled(torch.storage._load_from_bytes, archived(pickled(exec, TOUCH))),
    "before a network": PROTO + pickled(exec, TOUCH)[2:-1] + b"0" + pickle.dumps(small(), 2)[2:],
    "within a checkpoint": pickle.dumps({"epoch": 3, "state_dict": {"weight": Reduced(exec, TOUCH)}}, 2),
}  # fmt: skip
DAMAGED = {("INST", "zip"), ("INST", "legacy"), ("INST", "plain"), ("nested archive", "plain")} | {
    ("EXT1", container) for container in CONTAINERS
}
"""What is refused as a damaged file before anything is named that could be refused."""

# -- networks that bring something along -------------------------------------------------------------------


def _relu_with(name):
    """The pickle of a ReLU with an attribute that torch would not write."""
    state = pickle.dumps({**vars(nn.ReLU()), name: nn.functional.relu}, 2)[2:-1]
    return PROTO + b"ctorch.nn.modules.activation\nReLU\n)\x81" + state + b"b."


def _own(name, value):
    def ride(model):
        vars(model[0])[name] = value

    return ride


def _partial_of_itself(model):
    model[0].extra = functools.partial(torch.nn.functional.relu)
    model[0].extra.__setstate__((model[0].extra, (), {}, None))


def _own_hook(model):
    model[0].register_forward_hook(torch.nn.functional.relu)


def _hook_of_a_parameter(model):
    model[0].weight.register_hook(torch.nn.functional.relu)


def _later(model):
    """The dict of children is changed after its module was built."""
    model.later = [model._modules]
    model._modules["x') or exec('"] = None


def _emptied_wrapper(model):
    model.append(nn.DataParallel(nn.Identity()))
    del model[-1]._modules["module"]
    vars(model[-1])["module"] = nn.functional.relu


RIDERS = {
    "forward": _own("forward", nn.functional.relu),
    "forward of another": lambda model: vars(model[0]).update(forward=model[1].forward),
    "__call__": _own("__call__", nn.functional.relu),
    "__deepcopy__": _own("__deepcopy__", nn.functional.relu),
    "state_dict": _own("state_dict", nn.Identity),
    "_call_impl": _own("_call_impl", nn.functional.relu),
    "hook": _own_hook,
    "a module that is none": lambda model: model._modules.update(x=3),
    "a parameter that is none": lambda model: model[0]._parameters.update(weight=[1]),
    "no modules": lambda model: vars(model[0]).update(_modules=[model[1]]),
    "a name that ends": _later,
    "a module within itself": lambda model: model._modules.update(again=model),
    "an attribute that is called": lambda model: vars(model).update(gives=functools.partial(nn.Identity(), [])),
    "a function that hands on what it is given": lambda model: vars(model).update(
        gives=functools.partial(torchvision.models.optical_flow.raft._pass_through_h, [])
    ),
    "a wrapper of nothing": _emptied_wrapper,
    "a part named like a method": lambda model: model._modules.update(register_buffer=nn.Identity()),
    "a parameter named like a method": lambda model: model[0]._parameters.update(half=model[0].bias),
    "a part with a hidden name": lambda model: model._modules.update(__init__=nn.Identity()),
    "attribute of a parameter": lambda model: setattr(model[0].weight, "__deepcopy__", nn.Identity),
    "an interface of a parameter": lambda model: setattr(model[0].weight, "__array_interface__", {}),
}

STATES = {name: _relu_with(name) for name in ("__reduce_ex__", "__class__", "_compiled_call_impl", "train")}

CLASSES = {
    "GraphModule": b"ctorchvision.models.feature_extraction\nDualGraphModule\n)\x81}b.",
    "DistributedDataParallel": b"ctorch.nn.parallel\nDistributedDataParallelCPU\n)\x81}b.",
    "our own main": b"cse_inject.__main__\nmain\n)R.",
}

# -- edited forwards ---------------------------------------------------------------------------------------

RUN = f'getattr(__import__("os"), "mkdir")("{HIT}")'
IN, OUT = {"node": "input"}, ["return", {"node": "y"}]


def _call(target, *args, **kwargs):
    return ["set", ["y"], target, list(args), kwargs]


def _method(target, *args, **kwargs):
    return ["method", ["y"], target, list(args), kwargs]


def _body(*lines, **parts):
    return {"steps": [], "was_none": {}, "lines": [["let", ["y"], IN], *lines, OUT], **parts}


def _gated(name):
    lines = [["original", ["y"]], ["call", ["y"], name, [{"node": "y"}], {}], OUT]
    return {"steps": [{"block_name": name}], "was_none": {}, "lines": lines}


BODIES = {
    "a parameter": _body(["let", ["y"], {"node": RUN}]),
    "a name": _body(["let", [f"y = {RUN}\n"], IN]),
    "an operation": _body([f"let\n{RUN}", ["y"], IN]),
    "a path": _body(["read", ["y"], f'training"), {RUN}, (self, "x']),
    "a method's path": _body(["call", ["y"], "load_state_dict", [IN], {}]),
    "a path to a method": _body(["read", ["y"], "forward"]),
    "a path to a class": _body(["read", ["y"], "__class__"]),
    "a path to a function": _body(["read", ["y"], "forward.__globals__"]),
    "a keyword": _body(_call("torch:relu", IN, **{f"a={RUN}, b": 0})),
    "a file": _body(_call("ops:aten.from_file", HIT, True, 4)),
    "a file to write": _body(_call("ops:aten.save", IN, HIT)),
    "a method of an operator": _body(_call("ops:aten.relu.default.redispatch", IN)),
    "a namespace": _body(_call("ops:image.write_file", HIT, IN)),
    "an operator that this process registered": _body(_call("ops:se_inject.tail", IN, IN, IN, "relu")),
    "an operator that nobody registered": _body(_call("ops:nobodys.operator", IN)),
    "what is no namespace": _body(_call("ops:load_library.x", HIT)),
    "eval": _body(_call("builtins:eval", RUN)),
    "a call": _body(_call("operator:call", IN, RUN)),
    "an attribute": _body(["attribute", ["y"], IN, "__class__"]),
    "getattr": _body(_call("getattr", IN, "__class__")),
    "an attribute by a value": _body(
        ["set", ["shape"], "operator:add", ["__cla", "ss__"], {}], ["attribute", ["y"], IN, {"node": "shape"}]
    ),
    "getattr by a value": _body(
        ["set", ["shape"], "operator:add", ["__cla", "ss__"], {}], _call("getattr", IN, {"node": "shape"})
    ),
    "a method": _body(_method("__reduce_ex__", IN, 2)),
    "a method with dots": _body(_method(f"relu(); {RUN}; x", IN)),
    "a private function": _body(_call("torch.nn.functional:_add_docstr", IN, "")),
    "a function of functions": _body(_call("torch.nn.functional:boolean_dispatch", IN)),
    "a block's name": _gated(f"se({RUN})"),
    "a block's name with lines": _gated(f"se\n    {RUN}"),
    "a block that is none": _gated("requires_grad_"),
    "a block's name alone": {**_body(), "steps": [{"block_name": f"se({RUN})"}]},
    "a constant's name": _body(["expect", "argument", f"x, {RUN}", 1]),
    "a setting's name": _body(["expect", "setting", f"inplace, {RUN}", 1]),
    "a hidden setting": _body(["expect", "setting", "__class__", 1]),
    "another expectation": _body(["expect", RUN, "input", 1]),
    "a constant": _body(["expect", "argument", "input", {"dtype": "os"}]),
    "a form": _body(["expect", "argument", "input", {"form": {"dtype": "serialization"}}]),
    "a device": _body(["expect", "argument", "input", {"device": RUN}]),
    "a parameter that is a builtin": _body(["let", ["y"], {"node": "exec"}]),
    "a function to sort by": _body(_method("sort", [1], key=IN)),
    "an address": _body(_method("new", IN, cdata=65)),
    "letters that Python reads as underscores": _body(["read", ["y"], "_\uff3fclass\uff3f\uff3f"]),
    "a block's name in other letters": _gated("\ufb01lter"),
    "a table of modules": _body(["read", ["y"], "_modules"]),
    "itself": _body(["let", ["y"], {"node": "self"}]),
    "itself under its own name": _body(["let", ["self"], IN]),
    "a parameter that is set": _body(["let", ["input"], 1]),
    "a method as attribute": _body(["attribute", ["y"], IN, "share_memory_"]),
    "a dict that is changed": _body(_method("update", IN)),
    "a function that calls": _body(_call("torch.nn.functional:triplet_margin_with_distance_loss", IN, IN, IN)),
    "keys of one hash": _body(_call("torch:relu", {"dict": [[i * (2**61 - 1), 0] for i in range(3)]})),
    "absurd length": _body(["expect", "argument", "input", "long" * 2_000_000]),
    "no lines": {**_body(), "lines": 3},
    "a line that is none": _body(3),
    "a line of nothing": _body([]),
    "lines within lines": _body(
        functools.reduce(lambda line, _: ["if", True, [line], []], range(150), ["let", ["y"], IN])
    ),
    "unknown parts": {**_body(), "more": RUN},
}


class Injected:
    """Is pickled as an injected ReLU whose edited forward is this."""

    def __init__(self, body):
        self.body = body

    def __reduce__(self):
        return edited, (nn.ReLU, json.dumps(self.body)), vars(nn.ReLU())


# -- files that grow ---------------------------------------------------------------------------------------


def _tensor_of(size, stride, numel=1, record=None):
    """A file whose one tensor has this shape, in a storage of one number."""
    data = records(saved(torch.ones(1)))
    root = next(iter(data)).partition("/")[0]
    opcodes = pickle.dumps(size, 2)[2:-1], pickle.dumps(stride, 2)[2:-1], pickle.dumps(numel, 2)[2:-1]
    program = (
        PROTO + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0")
        + text("cpu") + opcodes[2] + b"tQK\x00" + opcodes[0] + opcodes[1] + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip
    entries = {**data, f"{root}/data.pkl": program}
    return zipped(entries if record is None else {**entries, f"{root}/data/0": record})


def _legacy_of(numel):
    program = (
        PROTO + b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
        + pickle.dumps(numel, 2)[2:-1] + b"NtQ."
    )  # fmt: skip
    return legacy(program)


def _doubling(levels, start=b")", pair=b"\x86"):
    """A tuple of twice a tuple of twice …"""
    return start + b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + pair for level in range(levels))


def _tree(levels):
    """A network whose submodules are each in it twice, and so on."""
    module = nn.ReLU()
    for _ in range(levels):
        outer = nn.Sequential()
        outer._modules.update(a=module, b=module)
        module = outer
    return module


def _wrappers(levels):
    keys = ("state_dict", "model_state_dict", "model", "module", "net", "network", "ema")
    found = {}
    for _ in range(levels):
        found = dict.fromkeys(keys, found)
    return found


def _deep(levels):
    module = nn.ReLU()
    for _ in range(levels):
        module = nn.Sequential(module)
    return module


def _repeated(function, data, times):
    """The same call of a function with the same large argument, again and again."""
    module, _, short = function.rpartition(".")
    head = b"\x80\x04]c" + f"{module}\n{short}\n".encode() + b"q\x000B" + struct.pack("<I", len(data)) + data
    return head + b"q\x010" + b"h\x00h\x01\x85Ra" * times + b"."


def _overlapping():
    """A zip whose records are all one and the same megabyte."""
    name, body = b"archive/data.pkl", bytes(1 << 20)
    head = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, len(body), len(body), len(name), 0) + name
    entries = b"".join(
        struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, len(body), len(body), len(other), 0, 0, 0, 0, 0, 0
        ) + other
        for other in (b"archive/data.pkl", *(f"archive/data/{n:04}".encode() for n in range(1000)))
    )  # fmt: skip
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1001, 1001, len(entries), len(head) + len(body), 0)
    return head + body + entries + end


def _legacy_names(names):
    """A file of torch before 1.6 whose list of storages is this."""
    head, _, tail = legacy(pickle.dumps([], 2)).rpartition(pickle.dumps([], 2))
    return head + names + tail


def _shared_tables(count):
    """Modules that share one table of as many submodules, all of them None."""
    table = b"}(" + b"".join(text(f"m{number}") + b"N" for number in range(count)) + b"u"
    parts = text("_modules") + table + text("_parameters") + b"}" + text("_buffers") + b"}" + text("training") + b"\x88"
    head = PROTO + b"ctorch.nn.modules.activation\nReLU\nq\x000}(" + parts + b"uq\x010"
    return head + b"h\x00)\x81h\x01b0" * count + b"N."


def _parameters(count, levels):
    """A network of few modules, and of one parameter in many places."""
    module, weight = nn.Module(), nn.Parameter(torch.ones(1))
    module._parameters.update({f"p{number}": weight for number in range(count)})
    for _ in range(levels):
        outer = nn.Sequential()
        outer._modules.update(a=module, b=module)
        module = outer
    return module


def _storage_key(numel, view=b""):
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + numel + view + b"tQ."


def _compressed(entries):
    return zipped(entries, compression=zipfile.ZIP_DEFLATED)


def _large_graph():
    data = exported()
    name = _record(data, "models/model.json")
    return _compressed({**data, name: data[name][:-1] + b',"more":[' + b"[]," * 6_000_000 + b"[]]}"})


@functools.cache
def bombs():
    """Small files that would take all memory, or forever."""
    numbers = b"](" + b"".join(b"J" + struct.pack("<i", n) for n in range(100_000)) + b"e"
    return {
        "a large tensor": _tensor_of((10**10,), (1,)),
        "a large stride": _tensor_of((2, 2), (10**10, 1)),
        "an expanded tensor": _tensor_of((10**6, 10**6), (0, 0)),
        "a negative size": _tensor_of((-1,), (1,)),
        "a huge number as size": _tensor_of((10**5000,), (1,)),
        "a storage beyond its record": _tensor_of((10**6,), (1,), numel=10**6),
        "a storage without its record": _tensor_of((1,), (1,), record=b""),
        "a large storage": _legacy_of(10**10),
        "a storage that is not there": _legacy_of(100),
        "a compressed archive": zipped(
            {"archive/data.pkl": bytes(2**28)}, compression=zipfile.ZIP_DEFLATED, compresslevel=9
        ),
        "an archive of one record": _overlapping(),
        "a key to hash": PROTO + b"}" + _doubling(60) + b"Ns.",
        "a member to hash": b"\x80\x04\x8f(" + _doubling(60) + b"\x90.",
        "a frozen set to hash": b"\x80\x04(" + _doubling(60) + b"\x91.",
        "colliding keys": b"\x80\x04}(" + b"".join(
            b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(1, 50_000)
        ) + b"u.",
        "a set of a range": PROTO + b"cbuiltins\nset\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
        "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 10**11) + b"x.",
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10**11) + b"x.",
        "a frame": b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b"N.",
        "copies": _repeated("builtins.bytearray", bytes(10**6), 10_000),
        "sets": PROTO + b"]cbuiltins\nset\nq\x000" + numbers + b"q\x010" + b"h\x00h\x01\x85Ra" * 3000 + b".",
        "storages": _repeated("torch.storage._load_from_bytes", saved(
            torch.zeros(10**6).untyped_storage(), _use_new_zipfile_serialization=False), 2000),
        "opcodes": PROTO + b"]" * 3_000_000 + b".",
        "modules, twice each": saved(_tree(40)),
        "modules of weights": saved({"model": _tree(40)}).replace(b"torch.nn.modules.container", b"torch.nn.modules.cantainer"),
        "modules deep down": saved(_deep(150)),
        "dicts within dicts": saved(_wrappers(40)),
        "a list within lists": PROTO + b"]" * 100_000 + b"a" * 99_999 + b".",
        "a layout": b"\x80\x04ctorch.serialization\n_get_layout\n" + _doubling(60) + b"\x85R.",
        "a number of elements": zipped({
            "archive/data.pkl": PROTO + _storage_key(_doubling(60)), "archive/data/0": b"1234",
            "archive/byteorder": "little", "archive/version": "3\n",
        }),
        "a number of elements, legacy": legacy(PROTO + _storage_key(_doubling(60), b"N")),
        "a view": legacy(PROTO + _storage_key(b"K\x00", b"(" + _doubling(60) + b"K\x00K\x00t")),
        "a list of storages": _legacy_names(PROTO + b"]" + _doubling(60) + b"a."),
        "a range of storages": _legacy_names(PROTO + b"cbuiltins\nrange\nJ\x00\x00\x00\x01\x85R."),
        "colliding complex keys": b"\x80\x04}cbuiltins\ncomplex\nq\x000(" + b"".join(
            b"h\x00G" + struct.pack(">d", -1000003.0 * n) + b"G" + struct.pack(">d", float(n)) + b"\x86RN"
            for n in range(60_000)) + b"u.",
        "names": b"\x80\x04" + b"ca\nb\n" * 300_000 + b".",
        "names of what is not there": PROTO[:1] + b"\x04" + text("torch.nn.a") + b"q\x000" + text("b") + b"q\x010"
        + b"h\x00h\x01\x930" * 240_000 + b"N.",
        "modules that share a table": _shared_tables(20_000),
        "modules that share a state": _shared_tables(20_000).replace(text("_modules"), text("_modules") + b"}", 1)
        .replace(b"}}(", b"}", 1).replace(b"Nu" + text("_parameters"), b"N" + text("_parameters"), 1),
        "a parameter in many places": saved(_parameters(1000, 13)),
        "a wide letter": _compressed({
            "archive/data.pkl": b"\x80\x04X" + struct.pack("<I", 60_000_004) + b"x" * 60_000_000 + "\U0001f600".encode() + b".",
            "archive/byteorder": "little", "archive/version": "3\n",
        }),
        "a large graph": _large_graph(),
        "much source text": _with_source(scripted(small().eval()), "0;" * 600_000),
        "scripted modules, twice each": _scripted_tree(40),
        "recurrent layers": PROTO + b"ctorch.nn.modules.rnn\nLSTM\n)\x81}(" + text("num_layers") + b"J\xff\xff\xff\x7f"
        + text("_all_weights") + b"]]K\x01aa" + text("bidirectional") + b"\x89" + text("bias") + b"\x88" + text("mode")
        + text("LSTM") + b"ub.",
    }  # fmt: skip


# -- archives of programs ----------------------------------------------------------------------------------


def exported():
    """What torch.export.save writes of a small network, by record."""
    stream = io.BytesIO()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.export.save(torch.export.export(small().eval(), (torch.rand(2, 3, 8, 8),), dynamic_shapes=(batch,)), stream)
    return records(stream.getvalue())


def _record(data, end):
    return next(name for name in data if name.endswith(end))


def _program(change):
    def write():
        data = exported()
        name = _record(data, "models/model.json")
        program = json.loads(data[name])
        change(program)
        data[name] = json.dumps(program)
        return zipped(data)

    return write


def _everywhere(program, key, value):
    todo = [program]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            if key in part:
                part[key] = value
            todo += part.values()
        elif isinstance(part, list):
            todo += part


def _node(program):
    return program["graph_module"]["graph"]["nodes"][0]


def _renamed(program, name):
    old = json.dumps(_node(program)["outputs"][0]["as_tensor"]["name"])
    changed = json.loads(json.dumps(program).replace(old, json.dumps(name)))
    program.clear()
    program.update(changed)


def _pickled_weight():
    data = exported()
    config = _record(data, "weights_config.json")
    entries = json.loads(data[config])
    next(iter(entries["config"].values()))["use_pickle"] = True
    data[config] = json.dumps(entries)
    data[_record(data, "weights/weight_0")] = archived(pickled(exec, TOUCH))
    return zipped(data)


def _constant(record):
    def write():
        data = exported()
        config = _record(data, "constants_config.json")
        entry = {"path_name": record, "is_param": False, "use_pickle": True, "tensor_meta": None}
        data[config] = json.dumps({"config": {"c": entry}})
        payload = pickled(exec, TOUCH)
        data[config.replace("model_constants_config.json", record)] = (
            payload if "opaque" in record else archived(payload)
        )
        return zipped(data)

    return write


def _samples():
    data = exported()
    data[_record(data, "sample_inputs/model.pt")] = archived(pickled(exec, TOUCH))
    return zipped(data)


def _compiled():
    data = exported()
    root = next(iter(data)).partition("/")[0]
    return zipped({**data, f"{root}/data/aotinductor/model/model.so": b"\x7fELF"})


def _pickled_tree(program, kind, context):
    tree = json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = tree


def _weight_beyond(program_data=None):
    data = exported()
    config = _record(data, "weights_config.json")
    entries = json.loads(data[config])
    next(iter(entries["config"].values()))["tensor_meta"]["sizes"] = [{"as_int": 10**9}] * 4
    data[config] = json.dumps(entries)
    return zipped(data)


EXECUTED = {
    "a size": _program(lambda program: _everywhere(program, "expr_str", f"__import__('os').system('touch {HIT}')")),
    "a pickled weight": _pickled_weight,
    "a pickled constant": _constant("tensor_0"),
    "an opaque constant": _constant("opaque_obj_0"),
    "sample inputs": _samples,
}
"""Archives that ``torch.export.load`` executes."""

NOT_YET_EXECUTED = () if hasattr(constants, "OPAQUE_OBJ_FILENAME_PREFIX") else ("an opaque constant",)
"""Those among them that this torch does not read: 2.9 knows no opaque constants."""

PROGRAMS = {
    "a guard": _program(lambda program: program.update(guards_code=[f"__import__('os').system('touch {HIT}')"])),
    "an operator": _program(lambda program: _node(program).update(target="torch.serialization.os.system")),
    "an operator of operators": _program(lambda program: _node(program).update(target="_operator.call")),
    "a file": _program(lambda program: _node(program).update(target="torch.ops.aten.from_file.default")),
    "an extension": _program(lambda program: _node(program).update(target="#evil:system")),
    "a name": _program(lambda program: _renamed(program, f"x = {RUN}\n    y")),
    "an enum": _program(
        lambda program: _pickled_tree(
            program, "builtins.dict", [{"__enum__": True, "fqn": "antigravity:x", "name": "x"}]
        )
    ),
    "a default factory": _program(
        lambda program: _pickled_tree(
            program, "collections.defaultdict", {"default_factory_module": "os", "default_factory_name": "abort"}
        )
    ),
    "a symbol": _program(
        lambda program: program.update(range_constraints={"u9999999999": {"min_val": 0, "max_val": 9}})
    ),
    "a path": _program(lambda program: _everywhere(program, "parameter_name", 'weight"); x = ("')),
    "a module in a function": _program(
        lambda program: _node(program)["metadata"].update(
            nn_module_stack="forward,forward.__func__.planted,torch.nn.modules.activation.ReLU"
        )
    ),
    "many digits": _program(lambda program: _everywhere(program, "expr_str", "Max(2, Float('0.1', 300000000))")),
    "powers in powers": _program(
        lambda program: _everywhere(program, "expr_str", "PowByNatural(PowByNatural(Mul(2, Symbol('s0')), 8), 8)")
    ),
    "a large power": _program(lambda program: _everywhere(program, "expr_str", "9**9**9**9")),
    "compiled code": _compiled,
    "a weight beyond its record": _weight_beyond,
}
"""Archives with more that can't be trusted."""

ACCEPTED = {"a guard", "sample inputs"}
"""Parts that are left out; the program is read without them."""


class WritesWhenLoaded(nn.Module):
    """Scripted, it writes a file when it is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.weight = state[0]
        self.training = state[1]
        torch.ops.aten.save(state[0], "hit")

    def forward(self, x):
        return x * self.weight


class WritesWhenCalled(nn.Module):
    """Scripted, it writes a file when it is called."""

    def forward(self, x):
        torch.ops.aten.save(x, "hit")
        return x


def scripted(model):
    """What torch.jit.save writes of a module."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), stream)
    return stream.getvalue()


def _scripted_beyond():
    """An archive whose weight claims to be larger than its record."""
    data = records(scripted(small().eval()))
    name = next(name for name in data if name.endswith("/data.pkl"))
    data[name] = data[name].replace(b"K\x04tQ", b"M\xff\xfftQ")
    return zipped(data)


def _scripted_more():
    data = records(scripted(small().eval()))
    return zipped({**data, f"{next(iter(data)).partition('/')[0]}/DATA.pkl": b"x"})


def _local(name, data):
    numbers = 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), 0
    return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *numbers) + name + data


def _central(name, data, at):
    numbers = 20, 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), 0, 0, 0, 0, 0, at
    return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *numbers) + name


def _end_64(count, size, at):
    return struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 30, 45, 0, 0, count, count, size, at)


def _two_directories(long=False):
    """An archive that does no harm to Python's reader, and another one to torch's.

    The end record gives an offset. Python takes the directory that lies before the end record instead, and the end
    record of zip64 that lies before its locator.
    """
    harmless, harmful = records(scripted(small().eval())), records(scripted(WritesWhenLoaded()))
    root = next(iter(harmless)).partition("/")[0]
    both = [
        {b"a/" + name.partition("/")[2].encode(): data for name, data in archive.items() if "debug" not in name}
        for archive in (harmless, harmful)
    ]
    assert root
    names = sorted({*both[0], *both[1]})
    body, places = b"", []
    for archive in both:
        places.append({})
        for name in names:
            places[-1][name] = len(body)
            body += _local(name, archive.get(name, b""))
    size = sum(len(_central(name, b"", 0)) for name in names)
    shift = 0 if long else size + 22
    first, second = (
        b"".join(_central(name, archive.get(name, b""), at[name] + moved) for name in names)
        for archive, at, moved in zip(both, places, (shift, 0), strict=True)
    )
    if not long:
        end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(names), len(names), size, len(body) + shift, size)
        return body + first + end + second
    hidden = body + second + _end_64(len(names), size, len(body))
    whole = hidden + first + _end_64(len(names), size, len(hidden))
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + size, 1)
    return whole + locator + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)


def _with_source(data, more, behind=None):
    """A TorchScript archive with more source text: a record of its own, or where the first method that takes an input begins."""
    found = records(data)
    if behind is None:
        return _compressed({**found, f"{next(iter(found)).partition('/')[0]}/code/more.py": more})
    name = next(name for name in found if name.endswith(behind))
    found[name] = re.sub(rb"(-> Tensor:\n)", rb"\1    " + more.encode() + b"\n", found[name], count=1)
    return zipped(found)


def _with_value(opcodes):
    """A TorchScript archive whose module has one more value."""
    data = records(scripted(nn.Linear(2, 2, bias=False).eval()))
    name = next(name for name in data if name.endswith("/data.pkl"))
    at = data[name].rindex(b"ub")
    return _compressed({**data, name: data[name][:at] + text("more") + opcodes + data[name][at:]})


def _scripted_inert():
    """A tensor far larger than its storage, with a list of numbers in place of its hooks."""
    data = records(scripted(nn.Linear(2, 2, bias=False).eval()))
    name = next(name for name in data if name.endswith("/data.pkl"))
    program = re.sub(rb"ccollections\nOrderedDict\nq.\)R", b"ctorch.jit._pickle\nbuild_intlist\n(]tR", data[name])
    changed = program.replace(b"(K\x02K\x02t", b"(M\xff\x7fK\x02t")
    assert len(changed) > len(program) > len(data[name])
    return zipped({**data, name: changed})


def _scripted_tree(levels):
    """As _tree, in TorchScript."""
    source, value = "", b""
    for level in range(levels):
        inner = f"  a : __torch__.L{level - 1}\n  b : __torch__.L{level - 1}\n" if level else ""
        source += f"class L{level}(Module):\n  __parameters__ = []\n  __buffers__ = []\n  training : bool\n{inner}"
        source += f"  def forward(self: __torch__.L{level},\n    x: Tensor) -> Tensor:\n    return x\n"
        parts = text("a") + value + b"q" + bytes([level]) + text("b") + b"h" + bytes([level]) if level else b""
        value = f"c__torch__\nL{level}\n".encode() + b")\x81}(" + text("training") + b"\x89" + parts + b"ub"
    return zipped({
        "a/data.pkl": PROTO + value + b".", "a/code/__torch__.py": source, "a/constants.pkl": PROTO + b").",
        "a/version": "3\n", "a/byteorder": "little",
    })  # fmt: skip


SCRIPTED = {
    "__setstate__": lambda: scripted(WritesWhenLoaded()),
    "two directories": _two_directories,
    "two directories of zip64": lambda: _two_directories(long=True),
    "an operator by its name": lambda: _with_source(
        scripted(small().eval()), f'getattr(ops.aten, "save")(input, "{HIT}")', "activation.py"
    ),
    "an operator by another name": lambda: _with_source(
        scripted(small().eval()), f'a = ops.aten\n    getattr(a, "save")(input, "{HIT}")', "activation.py"
    ),
    "a class of C++": lambda: _with_value(
        b"c__torch__.torch.classes.quantized\nLinearPackedParamsBase\n)\x81(K\x07K\x08tb"
    ),
    "tuples in tuples": lambda: _with_value(b")" + b"\x85" * 300_000),
    "lists in lists": lambda: _with_value(b"]q\x00" + b"h\x00]q\x01a0h\x01q\x000" * 30_000),
    "a place far out": lambda: _with_value(b"Nr\xff\xff\xff\x7f"),
    "an unknown part of a tensor": _scripted_inert,
    "a file": lambda: scripted(WritesWhenCalled()),
    "a weight beyond its record": _scripted_beyond,
    "a record twice": _scripted_more,
}


def _written(*sources):
    def write(path):
        class Defined(torch.jit.ScriptModule):
            def __init__(self):
                super().__init__()
                for source in sources:
                    self.define(source)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(Defined(), path)

    return write


UNFOLDING = {
    "functions that call functions": _written(
        "def f0(self, x: Tensor) -> Tensor:\n    return x + 1\n",
        *(f"def f{n}(self, x: Tensor) -> Tensor:\n    return self.f{n - 1}(self.f{n - 1}(x))\n" for n in range(1, 31)),
        "def forward(self, x: Tensor) -> Tensor:\n    return self.f30(x)\n",
    ),
    "loops in loops": _written(
        "def forward(self, x: Tensor) -> Tensor:\n    for a in range(1000):\n        for b in range(1000):\n"
        "            for c in range(1000):\n                x = x + 1\n    return x\n"
    ),
    "a list without end": _written(
        "def forward(self, x: Tensor) -> Tensor:\n    n = 1000000000000 * 1000\n    return x.view([1] * n)\n"
    ),
    "a list that doubles": _written(
        "def forward(self, x: Tensor) -> Tensor:\n    a = [1]\n" + "    a = a + a\n" * 33 + "    return x.view(a)\n"
    ),
    "loops after loops": _written(
        "def forward(self, x: Tensor) -> Tensor:\n    a = x.size(0)\n    b = x.size(1)\n"
        + "    for i in range(1000):\n        a, b = b, a\n" * 300
        + "    print(a)\n    return x + 1\n"
    ),
}


def _moved(data):
    """An archive one of whose records lies within another, under its own header."""
    inner = _local(b"archive/inner", b"x")
    body = _local(b"archive/outer", inner)
    entries = _central(b"archive/outer", inner, 0) + _central(b"archive/inner", b"x", body.index(inner))
    found = records(data)
    for name, value in found.items():
        entries += _central(name.encode(), value, len(body))
        body += _local(name.encode(), value)
    count = len(found) + 2
    return body + entries + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(entries), len(body), 0)


@functools.cache
def misleading():
    """Archives of a network that Python's reader takes, and that say two things at once."""
    parts = records(saved(small()))
    model, other = zipped(parts), {"archive/DATA.pkl": pickled(os.system, f"touch {HIT}")}
    local = model.index(b"PK\x03\x04")
    return {
        "two names but for capitals": zipped({**parts, **other}),
        "a record and a folder of one name": zipped({**parts, "archive/data.pkl/": b""}),
        "a name that ends early": zipped({**parts, "archive/data.pklxy": b"x"}).replace(b"data.pklxy", b"data.pkl\0x"),
        "another checksum": model[: local + 14] + b"abcd" + model[local + 18 :],
        "another size": model[: local + 18] + b"\5\0\0\0" + model[local + 22 :],
        "encrypted at one place": model[: local + 6] + b"\1" + model[local + 7 :],
        "something between two records": _with_a_gap(model),
        "a comment": model[:-2] + struct.pack("<H", 3) + b"abc",
        "a record with another name": model.replace(b"archive/data.pkl", b"archive/DATA.pkl", 1),
        "a record compressed in another way": model[:8] + b"\x08\x00" + model[10:],
        "a record within a record": _moved(model),
        "another number of records": model[:-12] + struct.pack("<H", 3) + model[-10:],
    }


def _with_a_gap(data):
    """The same archive with a few bytes more behind its first record."""
    at, more = data.index(b"PK\x03\x04", 4), b"PK\x03\x04 a record that only some readers see"
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries, start = archive.infolist(), archive.start_dir
    stream.write(data[:at] + more + data[at:start])
    for entry in entries:
        where = entry.header_offset + (len(more) if entry.header_offset else 0)
        name = entry.orig_filename.encode()
        stream.write(struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, entry.CRC, entry.compress_size, entry.file_size,
            len(name), 0, 0, 0, 0, 0, where,
        ) + name)  # fmt: skip
    size = stream.tell() - start - len(more)
    stream.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, len(entries), len(entries), size, start + len(more), 0))
    return stream.getvalue()


# -- polyglots ---------------------------------------------------------------------------------------------


@functools.cache
def polyglots():
    """Files that are of two forms at once: a payload for one reader, something innocent for another."""
    payload = pickled(os.system, f"touch {HIT}")
    model = saved(small())
    return {
        "a pickle before an archive": payload + model,
        "an archive behind a pickle of nothing": pickle.dumps(None, 2) + archived(payload),
        "an archive before an archive": model + archived(payload),
        "an archive with a comment": archived(payload)[:-2] + struct.pack("<H", len(model)) + model,
        "a script and an archive": b"#!/bin/sh\ntouch hit\n" + archived(payload),
    }


def legacy_tar():
    """The format before torch 0.2: a tar archive of pickles, which torch.load unpacks to disk."""
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in {
            "storages": pickle.dumps(0, 2) + pickle.dumps([], 2),
            "tensors": pickle.dumps(0, 2),
            "pickle": pickled(os.system, f"touch {HIT}"),
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()
