"""The dynamic wall, alone: networks that are marked as a stranger's, with no look at what they hold."""

import ast
import contextlib
import ctypes
import dataclasses
import importlib.machinery
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections import OrderedDict
from functools import partial

import pytest
import timm.layers
import torch
from torch import nn
from torchvision.models.squeezenet import Fire

import se_inject as si
from se_inject import guarding
from se_inject.errors import LoadError
from se_inject.forbidden_acts import PATCHED
from tests.common import build, randomise
from tests.files.hostile import small

IMAGES = torch.rand(2, 3, 16, 16)
HIT = "hit"


def compiles():
    exec(f"open({HIT!r}, 'w').close()")


def opens():
    with open(HIT, "w"):
        pass


def opens_by_descriptor():
    os.close(os.open(HIT, os.O_CREAT | os.O_WRONLY))


def starts_a_process():
    subprocess.run(["touch", HIT])


def connects():
    socket.socket().connect(("127.0.0.1", 9))


def calls_c():
    ctypes.CDLL(None).puts(b"hit")


def makes_a_module():
    nn.Sequential(OrderedDict(a=nn.ReLU()))


def removes():
    os.remove("kept")


def imports():
    __import__("hit_when_imported")


ACTS = (
    compiles, opens, opens_by_descriptor, starts_a_process, connects, calls_c, makes_a_module, removes,
    imports, lambda: os.mkdir(HIT), lambda: os.system(f"touch {HIT}"), lambda: os.putenv("HIT", "1"),
    lambda: eval("1 + 1"),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept").touch()
    (tmp_path / "hit_when_imported.py").write_text(f"open({HIT!r}, 'w').close()\n")
    return tmp_path


def network(act):
    """A network of library classes alone, one of which calls what a file put there."""
    fire = Fire(4, 4, 4, 4)
    del fire._modules["squeeze"]

    def squeeze(x):
        act()
        return x

    vars(fire)["squeeze"] = squeeze
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), fire).eval()


USES = {
    "plan": lambda net: si.plan(net, IMAGES, at="*"),
    "sites": lambda net: si.find_sites(net, IMAGES),
    "verify": lambda net: si.verify(net, net, IMAGES),
    "onnx": lambda net: si.export(net, "x.onnx", (IMAGES,)),
    "pt2": lambda net: si.export(net, "x.pt2", (IMAGES,)),
    "torchscript": lambda net: si.export(net, "x.torchscript", (IMAGES,)),
}


@pytest.mark.parametrize("act", ACTS)
def test_what_a_network_must_not(act, folder):
    net = network(act)
    guarding.mark(net)
    with pytest.raises(LoadError, match=r"`3`, a Fire, of this network|a Fire of this network") as caught:
        si.plan(net, IMAGES, at="*")
    assert not (folder / HIT).exists() and (folder / "kept").exists()
    assert caught.value.hint and "don't trust" in caught.value.hint


@pytest.mark.parametrize("use", USES)
def test_wherever_a_network_is_run(use, folder):
    net = network(opens)
    guarding.mark(net)
    with pytest.raises(LoadError, match=r"a Fire,? of this network opens a file for writing"):
        USES[use](net)
    assert not (folder / HIT).exists()
    assert [path.name for path in folder.iterdir() if path.suffix != ".py"] == ["kept"]


def test_while_it_is_timed(folder):
    """A network that behaves while it is looked at."""
    calls = []
    net = network(lambda: opens() if len(calls) > 3 else calls.append(1))
    plan = si.plan(small(), torch.rand(2, 3, 8, 8))
    guarding.mark(net)
    calls.extend([1] * 4)
    with pytest.raises(LoadError, match="opens a file"), guarding.guarded(net):
        net(IMAGES)
    assert plan and not (folder / HIT).exists()


def test_a_refusal_that_is_caught_is_raised_all_the_same(folder):
    def act():
        with contextlib.suppress(Exception):
            opens()

    net = network(act)
    guarding.mark(net)
    with pytest.raises(LoadError, match="opens a file"):
        si.find_sites(net, IMAGES)
    assert not (folder / HIT).exists()


def test_code_of_a_file_with_the_static_wall_off(folder):
    """The attack that was found: a partial in place of a submodule makes a network that writes and runs source."""
    from timm.models._features_fx import GraphExtractNet

    code = f"open({HIT!r},'w').close()".encode()
    name = f'a(", 0) or exec(bytes({list(code)})) or getattr(self, "training)'
    fire = Fire(4, 4, 4, 4)
    for child in ("squeeze", "squeeze_activation", "expand1x1"):
        del fire._modules[child]
    evil = partial(nn.Sequential, OrderedDict([(name, nn.ReLU())]))
    vars(fire)["squeeze"] = partial(timm.layers.SEModule, 4, 1.0, 4, act_layer=evil)
    vars(fire)["squeeze_activation"] = partial(GraphExtractNet, return_nodes=["fc2"])
    vars(fire)["expand1x1"] = partial(GraphExtractNet, return_nodes=["graph_module.fc2"])
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), fire).eval()
    with contextlib.suppress(Exception):
        net(IMAGES)
    assert (folder / HIT).exists()
    (folder / HIT).unlink()
    guarding.mark(net)
    with pytest.raises(LoadError, match=r"a Fire,? of this network makes a module, a SEModule"):
        si.plan(net, IMAGES, at="*")
    assert not (folder / HIT).exists()


def test_nobody_else_notices(folder):
    """Other threads, other networks, and this thread before and after."""
    net, own = network(lambda: None), network(makes_a_module)
    guarding.mark(net)
    init, written, stop = nn.Module.__init__, [], threading.Event()

    def others():
        while not stop.is_set():
            nn.Linear(2, 2)
            exec("1 + 1")
            with open(folder / "other", "w") as file:
                file.write("1")
            own(IMAGES)
            written.append(1)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        while not written:
            pass
        with guarding.guarded(net):
            before = len(written)
            while len(written) < before + 3:
                net(IMAGES)
        assert len(si.find_sites(net, IMAGES)) > 0
    finally:
        stop.set()
        thread.join()
    assert nn.Module.__init__ is init
    own(IMAGES)
    opens()
    assert (folder / HIT).exists()


def test_what_is_allowed_around_a_network(folder):
    """In this thread, but not by the network: what a tool does between its calls."""
    net = network(lambda: None)
    guarding.mark(net)
    with guarding.guarded(net):
        net(IMAGES)
        opens()
        nn.Linear(2, 2)
        exec("1 + 1")
    assert (folder / HIT).exists()


def test_errors_are_written_out_within_a_network(folder):
    """As torch's exporters do: Python parses the lines of a traceback, to show where in them the error was."""

    def act():
        try:
            return (1 + 2) * (3 / 0) + 4
        except ZeroDivisionError:
            texts.append(traceback.format_exc())
            texts.append(ast.dump(ast.parse("1 + 1")))

    texts = []
    net = network(act)
    guarding.mark(net)
    with guarding.guarded(net):
        net(IMAGES)
    assert "ZeroDivisionError" in texts[0] and "BinOp" in texts[1]


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_efficientnet"])
def test_networks_out_of_files_are_used_as_ever(name, folder):
    torch.save(randomise(build(name)).eval(), "net.pt")
    net = si.load("net.pt")
    assert guarding.is_marked(net)
    plan = si.plan(net, torch.rand(2, 3, 64, 64))
    assert plan.cost()
    injected = plan.apply(net)
    assert guarding.is_marked(injected) and guarding.is_marked(
        injected[0] if isinstance(injected, nn.Sequential) else injected
    )
    si.verify(net, injected, torch.rand(2, 3, 64, 64))
    for path in ("x.onnx", "x.pt2", "x.torchscript", "x.pt"):
        si.export(injected, path, (torch.rand(2, 3, 64, 64),))
    assert guarding.is_marked(si.load("x.pt2")) and guarding.is_marked(si.load("x.torchscript"))


def test_what_is_not_a_strangers_is_not_marked(folder):
    assert not guarding.is_marked(build("torchvision:resnet18"))
    assert not guarding.is_marked(si.load("torchvision:resnet18"))


def through_the_import_machinery():
    importlib._bootstrap._call_with_frames_removed(os.mkdir, "hit")


def imports_a_file():
    spec = importlib.util.spec_from_file_location("evil", "evil.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def through_a_function_that_compiles():
    dataclasses._create_fn("f", [], ["pass"], globals={})


def compiles_as_a_loader_does():
    importlib.machinery.SourceFileLoader("a", "b").source_to_code(b"pass", "z")


def compiles_as_a_parser_does():
    """The parser's own code, with constants of the network's: the flag that makes it a parser is gone."""
    types.FunctionType(ast.parse.__code__, {**vars(ast), "PyCF_ONLY_AST": 0})(
        "pass", "x", "exec", type_comments=False, feature_version=None
    )


def saves():
    torch.save({}, "hit")


def maps():
    torch.from_file("hit", shared=True, size=10, dtype=torch.uint8)


def imports_through_a_finder_of_its_own():
    class Loader:
        def create_module(self, spec):
            return None

        def exec_module(self, module):
            place = os.path.join(os.path.dirname(torch.__file__), "evil.py")
            exec(compile("import os; os.system('mkdir hit')", place, "exec"), {})

    class Finder:
        def find_spec(self, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, Loader()) if name == "torch.evil" else None

    sys.meta_path.insert(0, Finder())
    try:
        importlib.import_module("torch.evil")
    finally:
        sys.modules.pop("torch.evil", None)
        del sys.meta_path[0]


@pytest.mark.parametrize(
    "act",
    [
        imports_through_a_finder_of_its_own,
        through_the_import_machinery,
        imports_a_file,
        through_a_function_that_compiles,
        compiles_as_a_loader_does,
        compiles_as_a_parser_does,
        saves,
        maps,
    ],
)
def test_what_is_let_through_for_others_is_not_for_a_network(act, folder):
    (folder / "evil.py").write_text("import os\nos.mkdir('hit')\n")
    net = network(act)
    guarding.mark(net)
    with pytest.raises(LoadError), guarding.guarded(net):
        net(torch.rand(1, 3, 8, 8))
    assert not (folder / "hit").exists()
    act()
    assert {path.name for path in folder.iterdir()} & {"hit", "evil.py"}


def starts_one_by_the_lowest_call():
    import _posixsubprocess

    start, process = _posixsubprocess.fork_exec, None
    ends = os.pipe()
    try:
        process = start(
            [b"/bin/mkdir", b"hit"],
            (b"/bin/mkdir",),
            True,
            (ends[1],),
            None,
            None,
            -1,
            -1,
            -1,
            -1,
            -1,
            -1,
            *ends,
            True,
            False,
            0,
            None,
            None,
            None,
            -1,
            None,
            True,
        )
    finally:
        os.close(ends[0])
        os.close(ends[1])
    os.waitpid(process, 0)


def forges_the_place_of_its_code():
    place = os.path.join(os.path.dirname(torch.__file__), "evil.py")  # need not exist
    call = importlib._bootstrap._call_with_frames_removed
    call(exec, call(compile, "import os; os.mkdir('hit')", place, "exec"), {})


def writes_history():
    import readline

    readline.write_history_file("hit")


UNREPORTED = [
    starts_one_by_the_lowest_call,
    forges_the_place_of_its_code,
    writes_history,
    lambda: os.mkfifo("hit"),
    lambda: os.mknod("hit"),
    lambda: torch.serialization.save({}, "hit"),
    lambda: torch._C.PyTorchFileWriter("hit").write_end_of_file(),
    lambda: torch.UntypedStorage.from_file("hit", True, 10),
]


@pytest.mark.parametrize("act", UNREPORTED)
def test_what_python_reports_nothing_of(act, folder):
    act()
    assert (folder / "hit").exists()  # so it is one
    remove = (folder / "hit").rmdir if (folder / "hit").is_dir() else (folder / "hit").unlink
    remove()
    net = network(act)
    guarding.mark(net)
    with pytest.raises(LoadError, match=r"a Fire,? of this network"):
        si.find_sites(net, IMAGES)
    assert not (folder / "hit").exists()


@pytest.mark.parametrize("name", ["umask", "nice", "setpriority", "sched_setaffinity", "_exit"])
def test_calls_that_change_the_process(name, folder, monkeypatch):
    calls = []
    monkeypatch.setattr(os, name, lambda *args: calls.append(args))
    net = network(lambda: getattr(os, name)(0))
    net(IMAGES)
    assert calls == [(0,)]
    guarding.mark(net)
    with pytest.raises(LoadError, match="changes the system"):
        si.find_sites(net, IMAGES)
    assert calls == [(0,)]


def test_a_module_that_reports_nothing_is_not_imported(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "termios", raising=False)
    net = network(lambda: __import__("termios"))
    guarding.mark(net)
    with pytest.raises(LoadError, match="imports `termios`"):
        si.find_sites(net, IMAGES)


def test_everything_is_put_back(folder):
    def now():
        found = {}
        for places in PATCHED.values():
            for module, names in places.items():
                for path in names:
                    owner = sys.modules.get(module)
                    for part in path.split("."):
                        owner = getattr(owner, part, None)
                    found[module, path] = owner
        return found

    before, net = now(), network(opens)
    guarding.mark(net)
    with contextlib.suppress(LoadError):
        si.find_sites(net, IMAGES)
    assert now() == before and "from_file" not in vars(torch.UntypedStorage)


def defines_what_python_makes_of_text():
    import fractions  # noqa: F401 - of Python

    import torch.utils.bundled_inputs  # noqa: F401 - makes a NamedTuple


def test_modules_of_torch_and_python_are_imported_as_ever(folder):
    for name in ("torch.utils.bundled_inputs", "fractions"):
        sys.modules.pop(name, None)
    net = network(defines_what_python_makes_of_text)
    guarding.mark(net)
    with guarding.guarded(net):
        net(torch.rand(1, 3, 8, 8))
