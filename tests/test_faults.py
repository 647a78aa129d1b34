"""Files that can't be written, and files that are not what they should be."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

import se_inject as si
from se_inject import atomic_files
from se_inject.errors import ExportError, LoadError, out_of_memory
from se_inject.exporting.onnx_files import depends_on_data
from se_inject.verification.comparison import reason

ROOT = Path(__file__).parents[1]


def write(path, text="new", force=False):
    with atomic_files.atomic(path, force) as temporary:
        temporary.write_text(text)


class GuardOnDataDependentSymNode(Exception):
    """Called as torch's."""


def in_a_circle(*errors):
    """Exceptions of which each came from the next, the last from the first: torch's exporters raise such."""
    for error, cause in zip(errors, (*errors[1:], errors[0]), strict=True):
        error.__cause__ = error.__context__ = cause
    return errors[0]


def test_what_came_of_itself_is_looked_through_once():
    last = OSError(errno.ENOSPC, "full")
    for ask, found, none in (
        (out_of_memory, MemoryError(), False),
        (depends_on_data, GuardOnDataDependentSymNode(), False),
        (atomic_files.no_space, last, None),
    ):
        assert ask(in_a_circle(ValueError("a"), KeyError("b"))) is none
        assert ask(in_a_circle(ValueError("a"), KeyError("b"), found))
    assert reason(in_a_circle(ValueError("a"), KeyError("b"))) == "KeyError: 'b'"
    behind = ValueError("a")
    behind.__cause__, behind.__context__ = KeyError("b"), MemoryError()
    assert out_of_memory(behind)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota"), (errno.EFBIG, "ulimit -f")],
)
def test_which_limit_was_met_is_said(tmp_path, monkeypatch, number, said):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_files.os, "replace", full)
    with pytest.raises(ExportError, match=r"x\.txt") as caught:
        write(tmp_path / "x.txt")
    assert said in caught.value.seen
    assert "nothing was written" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_stays_one_and_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "there" / "real.txt")
    write(tmp_path / "link.txt")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "there" / "real.txt").read_text() == "new"
    with pytest.raises(ExportError, match="exists"):
        write(tmp_path / "link.txt")
    write(tmp_path / "link.txt", "newer", force=True)
    assert (tmp_path / "there" / "real.txt").read_text() == "newer"
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"real.txt"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_written_in_is_refused_before_any_work(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o755)
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(folder.stat().st_mode | 0o055)
    script = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from se_inject.isolation import run_in_worker, Confinement\n"
        "from se_inject.errors import ExportError\nfrom pathlib import Path\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"target = Path({str(tmp_path / 'theirs' / 'x.pt')!r})\n"
        "try: run_in_worker(lambda: print('work has begun') or 0, Confinement(), outputs=[target])\n"
        "except ExportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert "no permission to write in" in done.stdout, done.stderr
    assert "work has begun" not in done.stdout


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_plans_and_adapters_are_read_from_regular_files_alone(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(LoadError):
        si.Plan.load(path)
    with pytest.raises(LoadError):
        si.load_adapter(resnet18(), path)


def test_a_large_plan_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LoadError):
        si.Plan.load(tmp_path / "x.json")


def test_an_output_on_another_file_system(tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system")
    target = other / f"se-inject-test-{os.getpid()}.pt"
    before = set(other.iterdir())
    try:
        si.export(resnet18(), target, torch.rand(2, 3, 32, 32))
        assert set(other.iterdir()) - before == {target}
    finally:
        target.unlink(missing_ok=True)
