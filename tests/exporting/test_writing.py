"""Files are there completely or not at all: killed writers, a full disk, and checks that come before `--force` acts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject import atomic_files as _files
from se_inject.errors import ExportError

ROOT = Path(_files.__file__).parent.parent

WRITERS = """
import os, resource, signal, sys
import torch
from torch import nn
import se_inject as si
from se_inject import atomic_files as _files

torch.set_num_threads(1)
kind, path = sys.argv[1], sys.argv[2]
torch.manual_seed(0)
network = si.inject(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU()), torch.empty(1, 3, 8, 8), init="paper", reduction=1)

def write():
    if kind == "plan":
        si.plan_of(network).save(path, force=True)
    elif kind == "adapter":
        si.save_adapter(network, path, force=True)
    else:
        si.export(network, path, torch.randn(2, 3, 8, 8), force=True)
"""
KINDS = {"plan": "x.json", "adapter": "x.safetensors", "pt": "x.pt", "onnx": "x.onnx"}


def run(script, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", WRITERS + script, *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


# -- killed ------------------------------------------------------------------------------------------------

SUSPENDED = """
# stop where the file has been written and is about to be moved into place
move = _files._move_into_place
def suspended(*arguments):
    print("written", flush=True)
    signal.pause()
    move(*arguments)
_files._move_into_place = suspended
write()
"""


@pytest.mark.parametrize(("kind", "old"), [("adapter", None), ("pt", b"old")])
def test_a_writer_killed_before_the_last_step_leaves_the_old_file_or_none(kind, old, tmp_path):
    path = tmp_path / KINDS[kind]
    if old is not None:
        path.write_bytes(old)
    process = run(SUSPENDED, kind, path)
    assert process.stdout.readline() == "written\n", process.stderr.read()
    assert any(file.stat().st_size > 1000 for file in tmp_path.glob(".*/*")), "it has been written, under another name"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert (path.read_bytes() if path.exists() else None) == old
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == [path.name] * (
        old is not None
    )


REPEATED = """
import time

def killed_after(delay):
    child = os.fork()
    if not child:
        while True:
            write()
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL

write()
whole = open(path, "rb").read()
for _ in range(40):
    killed_after(torch.rand(()).item() * 0.02)
    assert open(path, "rb").read() == whole
print("whole")
"""


def test_a_writer_killed_at_any_time_leaves_a_whole_file(tmp_path):
    assert run(REPEATED, "adapter", tmp_path / "x.safetensors").communicate() == ("whole\n", "")
    left = [file.name for file in tmp_path.iterdir()]
    assert "x.safetensors" in left
    assert len(left) > 1, "some were killed while they wrote"


# -- no room -----------------------------------------------------------------------------------------------

LIMITED = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
names, folder = eval(kind), path
for kind, name in names.items():
    path = os.path.join(folder, name)
    if LIMIT:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200 if kind == "plan" else 700, resource.RLIM_INFINITY))
    try:
        write()
    except si.InjectError as error:
        print(kind, "|", str(error).replace(chr(10), " "))
    else:
        print(kind, "| written")
print(os.listdir(folder))
"""


def test_a_write_that_the_system_cuts_short_is_an_error_without_debris(tmp_path):
    folder = tmp_path / "limited"
    folder.mkdir()
    for kind in ("plan", "pt"):
        (folder / KINDS[kind]).write_text("old")
    out, err = run(LIMITED.replace("LIMIT", "True", 1), KINDS, folder).communicate()
    told = dict(line.split(" | ", 1) for line in out.splitlines()[:-1])
    assert told.keys() == KINDS.keys(), err
    for kind, name in KINDS.items():
        assert told[kind].startswith(("could not write", "cannot export")), told
        assert name in told[kind]
    assert contents(folder) == {KINDS[kind]: "old" for kind in ("plan", "pt")}


def test_a_full_disk_is_an_error_without_debris(tmp_path):
    """On a file system of one page, where the kernel lets us mount one."""
    mount = "mkdir full && mount -t tmpfs -o size=4k tmpfs full && exec "
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    if subprocess.run([*command, mount + "true"], cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here; the limit above and simulated errors stand for it")
    (tmp_path / "full").rmdir()
    (tmp_path / "script.py").write_text(WRITERS + LIMITED.replace("LIMIT", "False", 1))
    kinds = {kind: name for kind, name in KINDS.items() if kind in ("adapter", "pt")}  # a plan fits
    done = subprocess.run(
        [*command, f'{mount}{sys.executable} script.py "{kinds}" full'],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    *told, left = done.stdout.splitlines()
    assert [line.partition(" | ")[2][:23] for line in told] == ["no space left to write "] * 2, done.stderr
    assert left == "[]"


# -- several files at once ---------------------------------------------------------------------------------


@pytest.fixture
def old_files(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths[:2]:
        path.write_text(f"old {path.name}")
    return paths


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("links", [True, False])
def test_when_a_later_move_fails_the_replaced_files_come_back(old_files, tmp_path, monkeypatch, links):
    before = contents(tmp_path)
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(1, "not this one")
        real(source, target)

    def no_links(*_):
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "replace", failing)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(ExportError, match="could not write"), _files.atomic_all(old_files, force=True) as temporary:
        for path in temporary:
            path.write_text("new")
    assert len(calls) == 5, "three moves, and two back"
    assert contents(tmp_path) == before


def test_all_are_replaced_when_nothing_fails(old_files, tmp_path):
    with _files.atomic_all(old_files, force=True) as temporary:
        for path in temporary:
            path.write_text("new")
    assert contents(tmp_path) == dict.fromkeys("abc", "new")


def test_force_replaces_only_what_has_passed_its_checks(tmp_path, monkeypatch):
    class Moody(nn.Module):
        """Its output changes from call to call, so no file can be right."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) + torch.rand(())

    for suffix in (".ts", ".pt2"):
        path = tmp_path / f"x{suffix}"
        path.write_text("old")
        with pytest.raises(ExportError):
            si.export(Moody(), path, torch.randn(2, 3, 8, 8), force=True)
        assert contents(tmp_path) == {path.name: "old"}
        path.unlink()


def test_an_adapter_that_does_not_give_back_what_was_written_does_not_appear(tmp_path, monkeypatch):
    from se_inject.adapters import files as adapters

    network = si.inject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.empty(1, 3, 8, 8), init="paper")
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    real = adapters.write_through

    def damaged(path, write):
        real(path, write)
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    monkeypatch.setattr(adapters, "write_through", damaged)
    with pytest.raises(ExportError, match="does not give back"):
        si.save_adapter(network, path, force=True)
    assert contents(tmp_path) == {"x.safetensors": "old"}


def test_files_of_every_kind_appear_together_or_not_at_all(tmp_path, monkeypatch):
    from se_inject.exporting import outputs

    network, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.rand(2, 3, 8, 8)
    plan = si.plan(network, images, at="*")
    paths = [tmp_path / name for name in ("x.pt", "x.json", "x.safetensors")]
    real = _files._move_into_place

    def somebody_is_first(*arguments):
        paths[1].write_text("somebody's")
        real(*arguments)

    monkeypatch.setattr(_files, "_move_into_place", somebody_is_first)
    with pytest.raises(ExportError, match="exists"):
        outputs.write_all(plan.apply(network), plan, paths, (images,))
    assert contents(tmp_path) == {"x.json": "somebody's"}
    monkeypatch.undo()
    paths[1].unlink()
    assert [item.path for item in outputs.write_all(plan.apply(network), plan, paths, (images,))] == paths
