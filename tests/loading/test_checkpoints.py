"""Loading: what comes back is what was saved, what is no model says so, and no file runs anything."""

import argparse
import bz2
import collections
import contextlib
import copy
import datetime
import functools
import gzip
import importlib
import inspect
import lzma
import os
import pickle
import random
import subprocess
import sys
import tarfile
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import torchvision
from safetensors.torch import save_file
from torch import nn

import se_inject as si
from se_inject.errors import LoadError, OptionError, UnsupportedModel, UntrustedGlobals
from se_inject.loading import load, load_weights_
from se_inject.tracing.inputs import check_supported
from se_inject.user_code import NoSuchFile
from tests.common import build, randomise
from tests.files.hostile import saved

NET = """
import torch
from torch import nn

from sibling import WIDTH


class Net(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.functional.relu

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def wide():
    return Net(16)


def late():
    from other import WIDTH

    return Net(WIDTH)


def needs(width):
    return Net(width)


def broken():
    return 1 / 0


def leaves():
    raise SystemExit("bye")


class Nested:
    make = Net


ready = Net(5)
number = lambda: 3
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A directory with the user's own code, as current directory; what it imports is forgotten afterwards."""
    (tmp_path / "mine.py").write_text(NET)
    (tmp_path / "sibling.py").write_text("WIDTH = 8\n")
    (tmp_path / "other.py").write_text("WIDTH = 6\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path / "mine.py"
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def small():
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


def assert_same(loaded, model):
    assert type(loaded) is type(model)
    assert [(name, type(module), module.training) for name, module in loaded.named_modules()] == [
        (name, type(module), module.training) for name, module in model.named_modules()
    ]
    states = loaded.state_dict(), model.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


# -- by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("torchvision:resnet18", "ResNet"),
        ("torchvision:fcn_resnet50", "FCN"),
        ("torchvision:ssdlite320_mobilenet_v3_large", "SSD"),
        ("torchvision:googlenet", "GoogLeNet"),
        ("torchvision:r3d_18", "VideoResNet"),
        ("timm:test_resnet", "ResNet"),
        ("timm:test_resnet.r160_in1k", "ResNet"),
    ],
)
def test_networks_by_name(name, kind, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    model = load(name)
    assert type(model).__name__ == kind
    assert model.training


@pytest.mark.parametrize(("name", "hint"), [("torchvision:resnet5", "resnet50"), ("timm:seresnet5O", "seresnet50")])
def test_unknown_network(name, hint):
    with pytest.raises(LoadError, match="has no network") as caught:
        load(name)
    assert f"`{hint}`" in caught.value.hint


def test_timm_name_that_would_download():
    with pytest.raises(LoadError, match="has no network"):
        load("timm:hf-hub:timm/resnet18")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_zoo_is_not_installed(name, monkeypatch):
    for module in ("torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoadError, match="needs") as caught:
        load(name)
    assert caught.value.hint == "pip install 'se-inject[zoo]'"


@pytest.mark.parametrize("place", ["mine.py", "./mine.py", "mine"])
@pytest.mark.parametrize(
    ("attribute", "width"), [("Net", 8), ("wide", 16), ("late", 6), ("ready", 5), ("Nested.make", 8)]
)
def test_models_from_code(net, place, attribute, width):
    path = list(sys.path)
    model = load(f"{place}:{attribute}")
    assert (type(model).__name__, model.conv.out_channels) == ("Net", width)
    assert "class Net" in inspect.getsource(type(model))
    assert_same(pickle.loads(pickle.dumps(model)), model)
    assert sys.path == path


def test_code_is_imported_once(net):
    assert type(load("mine.py:Net")) is type(load("mine.py:wide")) is type(load("mine:Net"))


@pytest.mark.parametrize("name", ["random.py", "torch.py", "not-a-name.py"])
def test_file_with_a_name_that_is_taken(net, name):
    net.with_name(name).write_text(NET)
    before = set(sys.modules), random, torch
    model = load(f"{name}:Net")
    assert sys.modules[type(model).__module__].__file__ == str(net.with_name(name))
    assert (sys.modules["random"], sys.modules["torch"]) == before[1:]
    assert_same(pickle.loads(pickle.dumps(model)), model)


@pytest.mark.parametrize(
    ("source", "message", "seen", "hint"),
    [
        ("mine.py:Nett", "has no `Nett`", None, "`Net`"),
        ("mine:Nested.mke", "has no `Nested.mke`", None, "`make`"),
        ("mine.py:broken", "raised ZeroDivisionError: division by zero", "mine.py:34", None),
        ("mine:broken", "raised ZeroDivisionError: division by zero", "mine.py:34", None),
        ("mine.py:leaves", "raised SystemExit: bye", "mine.py:38", None),
        ("mine.py:needs", "raised TypeError: needs.. missing 1 required", None, "without arguments"),
        ("mine.py:number", "gave no torch.nn.Module", "int", None),
        ("typo.py:Net", "raised SyntaxError", "typo.py:2", None),
        ("lost.py:Net", "raised ModuleNotFoundError: No module named 'nowhere'", "lost.py:1", None),
        ("nowhere:Net", "no module `nowhere`", None, "file.py:callable"),
        ("mine.sub:Net", "no module `mine.sub`", None, "file.py:callable"),
        (":Net", "raised ValueError", None, None),
    ],
)
def test_code_that_gives_no_model(net, source, message, seen, hint):
    net.with_name("typo.py").write_text("x = 1\ny = = 2\n")
    net.with_name("lost.py").write_text("import nowhere\n")
    with pytest.raises(LoadError, match=message) as caught:
        load(source)
    assert seen is None or caught.value.seen.endswith(seen)
    assert hint is None or hint in caught.value.hint
    assert "typo" not in sys.modules


# -- whole modules -----------------------------------------------------------------------------------------

WRITERS = {
    "zip": torch.save,
    "protocol 5": functools.partial(torch.save, pickle_protocol=5),
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "plain": lambda model, path: path.write_bytes(pickle.dumps(model)),
    "plain 2": lambda model, path: path.write_bytes(pickle.dumps(model, protocol=2)),
}
NETWORKS = [
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:regnet_y_400mf",
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision:ssdlite320_mobilenet_v3_large",
    "torchvision:quantized_mobilenet_v2",
    "torchvision:raft_small",
    "timm:efficientnet_b0",
    "timm:ghostnet_100",
    "timm:fasternet_t0",
    "timm:regnety_004",
    "timm:dla34",
    "timm:test_nfnet",
    "timm:test_vit",
    "timm:test_convnext",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_come_back(name, tmp_path):
    options = {"weights_backbone": None} if name.startswith(("torchvision:faster", "torchvision:ssd")) else {}
    if options:
        model = randomise(torchvision.models.get_model(name.partition(":")[2], weights=None, **options))
    else:
        model = randomise(build(name))
    next(iter(model.children())).eval()
    torch.save(model, tmp_path / "model.pt")
    assert_same(load(tmp_path / "model.pt"), model)


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format(writer, tmp_path):
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 16)  # holds a functools.partial
    for model in (small().eval(), randomise(build("torchvision:mobilenet_v3_small")), randomise(vit)):
        WRITERS[writer](model, tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert_same(loaded, model)
        image = torch.rand(2, 3, 16, 16)
        assert torch.equal(loaded.eval()(image), model.eval()(image))


def test_attributes_come_back(tmp_path):
    model = small()
    model.extra = {
        "tensor": torch.arange(3),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "raw": b"\0\xff",
    }
    model.more = [slice(1, 2), {1, 2}, torch.device("cpu"), range(3), (None, 1.5, "text")]
    model[0].weight.note = "an attribute of a parameter"
    model.register_buffer("hidden", torch.ones(2), persistent=False)
    torch.save(model, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert torch.equal(loaded.extra.pop("tensor"), model.extra.pop("tensor"))
    assert (loaded.extra, loaded.more) == (model.extra, model.more)
    assert loaded[0].weight.note == "an attribute of a parameter"
    assert torch.equal(loaded.hidden, torch.ones(2))


@pytest.mark.parametrize("value", [nn.functional.relu, nn.functional.gelu, torch.relu, nn.ReLU, partial(nn.ReLU)])
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [1, {"a": (value,)}]])
def test_functions_and_classes_are_no_data(value, wrap, tmp_path):
    """A class of the library that calls what it finds there would call it."""
    model = small()
    model[1].more = wrap(value)
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"holds .* as its `more`") as caught:
        load(tmp_path / "model.pt")
    assert "it is `1`" in caught.value.seen


# before torch 1.6 files held the source of classes; the address by which pickles name ours is not where its source lies
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code for container of type SqueezeExcitation")
@pytest.mark.parametrize("writer", WRITERS)
def test_injected_models_come_back(writer, tmp_path):
    model = randomise(build("torchvision:resnet18")).eval()
    injected = si.inject(model, torch.rand(1, 3, 64, 64), stages=[3, 4], init="paper")
    WRITERS[writer](injected, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert_same(loaded, injected)
    image = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(image), injected(image))
    assert_same(si.eject_(loaded), model)


def test_module_in_a_checkpoint(tmp_path):
    model = small()
    torch.save({"epoch": 3, "model": model, "optimizer": {}}, tmp_path / "last.pt")
    assert_same(load(tmp_path / "last.pt"), model)


def test_module_in_a_checkpoint_with_what_isnt_read(tmp_path):
    model = small()
    beside = {
        "args": argparse.Namespace(lr=1, data=Path("/data")),
        "best": np.float64(0.5),
        "random": np.random.RandomState(0).get_state(),
        "losses": collections.defaultdict(list, train=[1.0]),
        "when": datetime.datetime(2026, 1, 1),
        "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters()), 3).state_dict(),
    }
    torch.save({"model": model, **beside}, tmp_path / "last.pt")
    assert_same(load(tmp_path / "last.pt"), model)
    model.best = beside["best"]
    torch.save({"model": model, **beside}, tmp_path / "last.pt")
    with pytest.raises(UntrustedGlobals, match="numpy"):
        load(tmp_path / "last.pt")


def test_load_with_weights(tmp_path):
    trained = randomise(build("torchvision:resnet18"), seed=5)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    assert_same(load("torchvision:resnet18", weights=tmp_path / "weights.pt"), trained)


def test_a_file_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(small(), "timm:resnet50")
    assert isinstance(load("timm:resnet50"), nn.Sequential)


# -- files that are no model -------------------------------------------------------------------------------


def write_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def write_truncated(path):
    torch.save(small(), path)
    path.write_bytes(path.read_bytes()[:-400])


def write_flipped(path):
    model = small()
    weight = model[0].weight.detach().numpy().tobytes()
    path.write_bytes(saved(model).replace(weight[:4], weight[1:4] + weight[:1]))


def write_encrypted(path):
    head = b"PK\x01\x02"
    before, *entries = saved(small()).split(head)
    path.write_bytes(head.join([before, *(entry[:4] + b"\1" + entry[5:] for entry in entries)]))


def write_numpy(path, write):
    with open(path, "wb") as file:
        write(file, np.ones(3))


def write_tar(path):
    path.with_name("inside").write_bytes(b"something")
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_name("inside"))


ONNX = b"\x08\x0a\x12\x07pytorch\x1a\x052.14.0" + bytes(20)
COMPRESSED = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
NO_MODELS = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file", None),
    "text": (lambda path: path.write_text("Entry not found\n"), "a text file", "download"),
    "xml": (lambda path: path.write_text("<?xml version='1.0'?><Error/>"), "a web page or XML", "fetch it again"),
    "sharded": (
        lambda path: path.write_text('{"metadata": {}, "weight_map": {"a": "1.safetensors"}}'),
        "weights in several files", "one file"
    ),
    "html": (lambda path: path.write_text("<!DOCTYPE html><p>404"), "a web page", "fetch it again"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS", "git lfs pull"),
    "bytes": (lambda path: path.write_bytes(bytes(range(128, 256))), "no format", None),
    **{
        name: (lambda path, compress=compress: path.write_bytes(compress(saved(small()))), name, "decompress")
        for name, compress in COMPRESSED.items()
    },
    "numpy": (functools.partial(write_numpy, write=np.save), "NumPy", "torch.save"),
    "numpy archive": (functools.partial(write_numpy, write=np.savez), "NumPy", "torch.save"),
    "plan": (lambda path: path.write_text('{"se_inject_plan": 1, "steps": []}'), "a plan", "--plan"),
    "json": (lambda path: path.write_text('{"architectures": ["ResNet"]}'), "a JSON file", "weights"),
    "adapter": (
        lambda path: save_file(small().state_dict(), path, {"se_inject_adapter": "1"}), "an adapter", "as MODEL"
    ),
    "half a checksum": (write_flipped, "is not what was written", None),
    "encrypted": (write_encrypted, "mislead", None),
    "tar": (write_tar, "a tar archive", None),
    "other zip": (lambda path: write_zip(path, {"a.txt": "hello"}), "zip archive", None),
    "empty zip": (lambda path: write_zip(path, {}), "zip archive", None),
    "truncated": (write_truncated, "truncated, damaged", None),
    "cut pickle": (lambda path: path.write_bytes(pickle.dumps(small())[:200]), "is damaged", None),
    "onnx": (lambda path: path.write_bytes(ONNX), "an ONNX file", "eager module"),
    "safetensors": (lambda path: save_file(small().state_dict(), path), "weights", "arch='"),
    "state dict": (lambda path: torch.save(small().state_dict(), path), "weights", "arch='"),
    "old state dict": (lambda path: WRITERS["legacy"](small().state_dict(), path), "weights", "arch='"),
    "checkpoint": (lambda path: torch.save({"state_dict": small().state_dict()}, path), "weights", "arch='"),
    "a list": (lambda path: torch.save([1, 2], path), "neither a network nor weights", "one network"),
    "two networks": (lambda path: torch.save({"g": small(), "d": small()}, path), "neither a network nor", "one network"),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_MODELS)
def test_no_model(what, tmp_path):
    write, message, hint = NO_MODELS[what]
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(LoadError, match=message) as caught:
        load(path)
    assert caught.value.exit_code == 1
    assert str(path) in caught.value.message
    assert hint is None or hint in caught.value.hint


def test_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet.pt").touch()
    for source, hint in (
        ("resent.pt", "`resnet.pt`"),
        ("resnet50", "`torchvision:resnet50`"),
        ("a/b/c.pt", None),
    ):
        with pytest.raises(NoSuchFile, match=f"no file `{source}`") as caught:
            load(source)
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.exit_code == 2
        assert hint is None or hint in str(caught.value)
    for call in (lambda: load("net.py:Net"), lambda: load_weights_(small(), "gone.pt")):
        with pytest.raises(NoSuchFile):
            call()


def test_nothing_is_downloaded():
    with pytest.raises(LoadError, match="nothing is downloaded"):
        load("https://download.pytorch.org/models/resnet18-f37072fd.pth")


def test_directory(tmp_path):
    with pytest.raises(LoadError, match="is a directory"):
        load(tmp_path)
    torch.save(small(), tmp_path / "last.pt")
    with pytest.raises(LoadError) as caught:
        load(tmp_path)
    assert caught.value.hint == "pass the file in it that is meant: `last.pt`"
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(LoadError) as caught:
        load(tmp_path)
    assert "TensorFlow" in caught.value.hint


def test_a_distributed_checkpoint(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save(small().state_dict(), checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(LoadError, match="is a directory") as caught:
        load(tmp_path / "step")
    assert "dcp_to_torch_save" in caught.value.hint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LoadError, match="is not a file"):
        load(tmp_path / "pipe")


def test_every_truncation_is_an_error_about_the_file(tmp_path):
    path = tmp_path / "model.pt"
    for writer in ("zip", "legacy", "plain"):
        WRITERS[writer](small(), path)
        whole = path.read_bytes()
        for end in random.Random(0).sample(range(len(whole) - 1), 60):
            path.write_bytes(whole[:end])
            with pytest.raises(LoadError):
                load(path)


# -- trust -------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(net):
    """A file with a network of the user's own class, as somebody else finds it."""
    model = randomise(load("mine.py:Net"))
    torch.save(model, "model.pt")
    for name in ("mine", "sibling"):
        del sys.modules[name]
    return net.with_name("model.pt"), model


def test_own_class_needs_trust(foreign):
    path, model = foreign
    with pytest.raises(UntrustedGlobals, match=r"`mine\.Net`") as caught:
        load(path)
    assert "trust=['mine']" in caught.value.hint
    assert "mine" not in sys.modules
    loaded = load(path, trust=["mine"])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert type(loaded) is sys.modules["mine"].Net


def test_trust_as_a_string(foreign):
    assert type(load(foreign[0], trust="mine")).__name__ == "Net"


def test_trusted_package_is_missing(foreign):
    foreign[0].with_name("mine.py").unlink()
    with pytest.raises(LoadError, match="which can't be imported") as caught:
        load(foreign[0], trust=["mine"])
    assert caught.value.seen == "No module named 'mine'"


def test_own_class_gives_its_weights_without_trust(foreign):
    path, model = foreign
    fresh = load("mine.py:Net", weights=path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["os", "builtins", "subprocess", "torch", "timm.models", "posix", "", "a b"])
def test_what_can_not_be_trusted(name):
    with pytest.raises(OptionError, match="can't be trusted") as caught:
        load("model.pt", trust=["mine", name])
    assert caught.value.exit_code == 2


def test_class_of_a_script(tmp_path):
    script = "import torch\nclass Net(torch.nn.Conv2d): pass\ntorch.save(Net(1, 2, 3), 'model.pt')\n"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with pytest.raises(UntrustedGlobals, match=r"`__main__\.Net`") as caught:
        load(tmp_path / "model.pt")
    assert "si.load_weights_(model, " in caught.value.hint
    model = nn.Conv2d(1, 2, 3)
    load_weights_(model, tmp_path / "model.pt")


def test_compiled_and_traced_modules_are_explained(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.fx.symbolic_trace(small()), path)
    with pytest.raises(UntrustedGlobals, match="GraphModule"):
        load(path)
    torch.save(torch.compile(small()), path)
    with pytest.raises(UntrustedGlobals, match=r"save `model\._orig_mod`"):
        load(path)


# -- weights -----------------------------------------------------------------------------------------------


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


WEIGHTS = {
    "state dict": lambda state, model: state,
    "state_dict": lambda state, model: {
        "epoch": 3,
        "state_dict": state,
        "state_dict_ema": small().state_dict(),
    },
    "model": lambda state, model: {
        "optimizer": {"state": {}},
        "model": state,
        "args": argparse.Namespace(lr=1),
    },
    "model_state_dict": lambda state, model: {"model_state_dict": state},
    "ema only": lambda state, model: {"epoch": 1, "state_dict_ema": state},
    "a module": lambda state, model: model,
    "a module in a checkpoint": lambda state, model: {"model": None, "ema": model},
    "DataParallel": lambda state, model: nn.DataParallel(model).state_dict(),
    "compiled and parallel": lambda state, model: prefixed(state, "module._orig_mod."),
    "Lightning": lambda state, model: {"state_dict": prefixed(state, "model.")},
    "averaged": lambda state, model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "under a name of its own": lambda state, model: {"epoch": 3, "student": state, "optimizer": {"state": {}}},
    "a network under a name of its own": lambda state, model: {"classifier": model},
    "BasicSR": lambda state, model: {"params": state, "params_ema": small().state_dict()},
    "Composer": lambda state, model: {"state": {"model": state, "timestamp": {"batch": 3}}},
    "in a tuple": lambda state, model: (model, 3),
    "with numbers beside it": lambda state, model: {**state, "epoch": 3, "name": "net", "best": None},
    "without counters": lambda state, model: {k: v for k, v in state.items() if not k.endswith("batches_tracked")},
}


@pytest.mark.parametrize("writer", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("wrapper", WEIGHTS)
def test_weights(wrapper, writer, tmp_path):
    trained, model = small(), small()
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    WRITERS[writer](WEIGHTS[wrapper](trained.state_dict(), trained), tmp_path / "weights.bin")
    several = wrapper in ("BasicSR", "state_dict")  # weights and their average: which was taken is said
    with pytest.warns(si.WeightsWarning, match="is taken") if several else contextlib.nullcontext():
        load_weights_(model, tmp_path / "weights.bin")
    assert_same(model, trained)


def test_a_prefix_chooses_among_weights(tmp_path):
    student, teacher, model = small(), small(), small()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter)
    state = {
        f"{name}.{key}": value
        for name, each in (("student", student), ("teacher", teacher))
        for key, value in each.state_dict().items()
    }
    torch.save(state, tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt", entry="teacher")
    assert_same(model, teacher)
    with pytest.raises(OptionError, match="no entry `tutor`"):
        load_weights_(model, tmp_path / "weights.pt", entry="tutor")


def test_safetensors_under_any_name(tmp_path):
    trained, model = (
        small(),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    )
    save_file(trained.state_dict(), tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    assert_same(model, trained)


def test_what_an_error_quotes_does_not_reach_the_terminal(tmp_path):
    key = "\x1b[31mred\x1b]0;title\x07\nhint: run this"
    torch.save({**small().state_dict(), key: torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(LoadError) as caught:
        load_weights_(small(), tmp_path / "weights.pt")
    assert r"`\x1b[31mred\x1b]0;title\x07\nhint: run this`" in caught.value.seen
    assert LoadError(key, hint=key).message.isprintable()
    assert "\x1b" not in str(LoadError("", seen=key, hint=key))


@pytest.mark.parametrize("found", [{"student": 1, "teacher": 2}, [1, 2]])
def test_what_is_seen_instead_of_weights(found, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({key: small().state_dict() for key in found} if isinstance(found, dict) else found, path)
    with pytest.raises(LoadError, match=r"holds no state dict|holds several: `student`, `teacher`") as caught:
        load_weights_(small(), path)
    assert caught.value.seen in ("a dict with the keys `student`, `teacher`", "a list of `int`, `int`")


@pytest.mark.parametrize(
    ("network", "hint"),
    [
        (lambda: torch.optim.swa_utils.AveragedModel(small()), "save `model.module`"),
        (lambda: {"w": torch.eye(3).to_sparse()}, "save it dense"),
        (lambda: {"w": np.eye(3)}, "torch.from_numpy"),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), "once on real inputs"),
    ],
)
def test_what_is_said_of_common_things_that_are_refused(network, hint, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(network(), path)
    with pytest.raises(UntrustedGlobals) as caught:
        load(path)
    assert hint in caught.value.hint
    assert "trust=" not in caught.value.hint


@pytest.mark.parametrize("zoo", ["torchvision:mobilenet_v3_small", "timm:resnet18"])
def test_the_number_of_classes_is_that_of_the_weights(zoo, tmp_path):
    path = tmp_path / "weights.pt"
    name = zoo.partition(":")[2]
    make = torchvision.models.get_model if zoo.startswith("torchvision") else timm.create_model
    trained = make(name, num_classes=7)
    torch.save({"epoch": 3, "state_dict": prefixed(trained.state_dict(), "module.")}, path)
    assert_same(load(path, arch=zoo), trained)
    assert_same(load(zoo, weights=path), trained)
    state = trained.state_dict()
    state[next(key for key in state if key.endswith("conv1.weight") or key == "features.0.0.weight")] = torch.ones(1)
    torch.save(state, path)
    with pytest.raises(LoadError, match="are not those of"):
        load(path, arch=zoo)


def test_weights_without_numbers(tmp_path):
    torch.save(small().to("meta").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(LoadError, match="have no numbers"):
        load_weights_(small(), tmp_path / "weights.pt")


def test_a_network_in_a_wrapper_is_taken_out_of_it(tmp_path):
    torch.save(nn.DataParallel(small()), tmp_path / "model.pt")
    found = load(tmp_path / "model.pt")
    assert type(found) is nn.Sequential


def test_a_network_that_was_scripted_before_it_was_saved(tmp_path):
    network = torchvision.models.resnet18().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network)
    torch.save(network, tmp_path / "model.pt")
    assert_same(load(tmp_path / "model.pt"), network)


def test_a_network_that_ran_compiled(tmp_path):
    """torch.compile leaves attributes on parameters and buffers."""
    network = small().eval()
    images = torch.rand(2, 3, 8, 8)
    torch.compile(network, backend="eager")(images)
    assert hasattr(network[1].running_mean, "_dynamo_static_input_type")
    network[0].weight._no_weight_decay, network[1].running_mean.note = True, {"by": "me"}
    torch.save(network, tmp_path / "model.pt")
    found = load(tmp_path / "model.pt")
    assert found[0].weight._no_weight_decay is True
    assert found[1].running_mean.note == {"by": "me"}
    assert_same(found, network)
    model = small().eval()
    load_weights_(model, tmp_path / "model.pt")
    assert_same(model, network)


def test_text_where_yolo_writes_it(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2))
    for index, module in enumerate(network):
        module.i, module.f, module.type, module.np = index, -1, f"torch.nn.{type(module).__name__}", 3
    torch.save(network, tmp_path / "model.pt")
    found = load(tmp_path / "model.pt")
    assert [module.type for module in found] == ["torch.nn.Conv2d", "torch.nn.Upsample"]
    network[1].type = nn.functional.relu
    torch.save(network, tmp_path / "model.pt")
    with pytest.raises(LoadError, match="a `type` of its own"):
        load(tmp_path / "model.pt")


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "model.pt").symlink_to("nowhere.pt")
    with pytest.raises(NoSuchFile, match="is a link to a file that does not exist"):
        load(tmp_path / "model.pt")


def test_keys_that_begin_like_a_prefix(tmp_path):
    trained, model = (nn.ModuleDict({"model": small(), "module": small()}) for _ in range(2))
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    trained, model = (nn.ModuleDict({"model": small()}) for _ in range(2))
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    assert_same(model, trained)


def test_weights_keep_the_models_dtype(tmp_path):
    torch.save(small().half().state_dict(), tmp_path / "weights.pt")
    model = small()
    load_weights_(model, tmp_path / "weights.pt")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.weight"), "1 missing: `0.weight`"),
        (lambda state: state.update(extra=torch.ones(1)), "1 unexpected: `extra`"),
        (
            lambda state: state.update({"3.bias": torch.ones(7)}),
            r"1 of another shape: `3.bias \(7,\) for \(2,\)`",
        ),
        (lambda state: [state.pop(key) for key in list(state)[3:]], "6 missing: .* and 2 more"),
        (
            lambda state: state.update({"0.weight": torch.ones(4, 3, 1, 1), "z": torch.ones(1)}),
            "unexpected.*another",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message, tmp_path):
    trained, model = small(), small()
    before = copy.deepcopy(model)
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    state = trained.state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(LoadError, match=message):
        load_weights_(model, tmp_path / "weights.pt")
    assert_same(model, before)


@pytest.mark.parametrize("what", ["onnx", "text", "empty", "truncated", "a list"])
def test_no_weights(what, tmp_path):
    NO_MODELS[what][0](tmp_path / "weights.pt")
    with pytest.raises(LoadError):
        load_weights_(small(), tmp_path / "weights.pt")


# -- unsupported modules -----------------------------------------------------------------------------------


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(small().eval())


def exported():
    return torch.export.export(small().eval(), (torch.rand(2, 3, 8, 8),))


def inside(module):
    model = nn.Module()
    model.backbone = module
    return model


UNSUPPORTED = {
    "DataParallel": (lambda: nn.DataParallel(small()), "wrapped in DataParallel", "`model.module`"),
    "compiled": (lambda: torch.compile(small()), "compiled", "`model._orig_mod`"),
    "scripted": (scripted, "TorchScript", "torch.jit.save"),
    "quantised": (lambda: torch.ao.nn.quantized.ReLU6(), "quantised", "inject first"),
    "inside": (lambda: inside(torch.compile(small())), "its `backbone` is compiled", "`model._orig_mod`"),
    "a dict": (lambda: small().state_dict(), "not a torch.nn.Module but a OrderedDict", "network"),
    "a program": (exported, "not a torch.nn.Module but a ExportedProgram", "torch.export.save"),
    "a class": (lambda: nn.Linear, "not a torch.nn.Module but a type", None),
    "None": (lambda: None, "not a torch.nn.Module but a NoneType", None),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported(what):
    make, message, hint = UNSUPPORTED[what]
    with pytest.raises(UnsupportedModel, match=message) as caught:
        check_supported(make())
    assert hint is None or hint in caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    ],
)
def test_unsupported_wrappers_of_a_process_group(name):
    module, _, kind = name.rpartition(".")
    model = object.__new__(getattr(importlib.import_module(module), kind))
    nn.Module.__init__(model)
    with pytest.raises(UnsupportedModel, match="wrapped in"):
        check_supported(model)


def test_supported():
    check_supported(small())
    check_supported(torch.fx.symbolic_trace(small()))
    check_supported(build("torchvision:quantized_mobilenet_v2"))
    check_supported(torch.export.export(small().eval(), (torch.rand(1, 3, 8, 8),)).module())


def test_weights_that_are_interrupted_leave_the_model_as_it_was(tmp_path, monkeypatch):
    torch.save(randomise(small()).state_dict(), tmp_path / "w.pt")
    model = randomise(small())
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def interrupted(state):
        model[0].weight.data.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        si.load_weights_(model, tmp_path / "w.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
