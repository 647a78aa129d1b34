"""The worker: a payload that is simply run in it reaches nothing, and however it ends, nothing is left behind."""

import json
import os
import platform
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from se_inject.isolation import protections
from se_inject.isolation.landlock import landlock_version
from se_inject.isolation.seccomp import has_seccomp

ROOT = Path(__file__).parents[2]
WALLS = ("landlock", "seccomp")
needs_landlock = pytest.mark.skipif(not landlock_version(), reason="this kernel has no Landlock")
needs_seccomp = pytest.mark.skipif(not has_seccomp(), reason="no filter of system calls here")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def home(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("very private")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "model.pt").write_text("a model")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def command(home, name, walls=WALLS):
    return [sys.executable, "-m", "tests.isolation.payloads", name, str(home), *walls]


def environment(home):
    return {**os.environ, "TMPDIR": str(home / "tmp"), "AWS_SECRET_ACCESS_KEY": "s3cr3t", "HF_TOKEN": "hf_s3cr3t"}


def run(home, name, walls=WALLS, code=0, **options):
    """The document that a payload printed; nothing may be left of its process afterwards."""
    before = {path.name for path in home.iterdir()}
    done = subprocess.run(
        command(home, name, walls),
        cwd=ROOT,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert list((home / "tmp").iterdir()) == []
    assert {path.name for path in home.iterdir()} - before <= (
        {"out.txt"} if walls else {"out.txt", "link", "made", "written"}
    )
    return json.loads(done.stdout.splitlines()[-1])


@needs_landlock
@pytest.mark.parametrize("walls", [WALLS, ("landlock",)], ids="+".join)
def test_files_are_out_of_reach(home, walls):
    tried = run(home, "files", walls)
    assert not [what for what, result in tried.items() if result.startswith("DONE")], tried
    assert (home / "named" / "model.pt").read_text() == "a model"
    assert (home / "secret" / "id_rsa").read_text() == "very private"


@needs_seccomp
@pytest.mark.parametrize("walls", [WALLS, ("seccomp",)], ids="+".join)
def test_the_network_and_other_processes_are_out_of_reach(home, walls):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(home / "socket"))
        tried = run(home, "calls", walls)
    assert not [what for what, result in tried.items() if result.startswith("DONE")], tried


@needs_seccomp
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are those of x86-64")
def test_what_processes_share_is_out_of_reach(home):
    tried = run(home, "objects")
    assert set(tried.values()) == {"PermissionError"}, tried


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is looked at in /proc")
@pytest.mark.parametrize("letters", [20, 412, 612, 912, 3012])
def test_no_secret_stays_in_memory(home, monkeypatch, letters):
    monkeypatch.setenv("MY_TOKEN", "ZQ7kWq93xPvN" + "r" * letters)
    assert run(home, "secrets") == {"hits": 0}


@pytest.mark.parametrize("name", ["deep", "closed"])
def test_whatever_a_child_leaves_is_removed(home, name):
    assert run(home, name) == {}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["deep", "closed"])
def test_a_user_without_rights_removes_it_as_well(home, name):
    assert as_nobody(home, name).returncode == 0
    assert list((home / "tmp").iterdir()) == []
    assert {path.name for path in home.iterdir()} == {"secret", "named", "tmp"}


@pytest.mark.skipif(landlock_version() < 4, reason="Landlock knows TCP since ABI 4")
def test_landlock_alone_refuses_tcp(home):
    with socket.create_server(("127.0.0.1", 0)) as server:
        (home / "port").write_text(str(server.getsockname()[1]))
        assert run(home, "tcp", ("landlock",)) == {"connect": "PermissionError"}
        assert run(home, "tcp", ()) == {"connect": "DONE: None"}


def test_without_walls_the_payloads_do_what_they_try(home):
    """Or else the tests above would show nothing."""
    tried = run(home, "files", ())
    assert tried["read a secret"].startswith("DONE")
    assert tried["second name of a secret"].startswith("DONE")


@pytest.mark.parametrize("walls", [WALLS, ()], ids=["confined", "no walls"])
def test_what_work_needs_is_allowed(home, walls):
    assert run(home, "may", walls) == {
        "read what was named": "DONE: 'a model'",
        "its own folder": "DONE: 'mine'",
        "threads": 1,
        "random numbers": 4,
        "import": True,
        "processors": True,
    }


def test_the_environment_holds_no_secrets(home):
    seen = run(home, "environment", input="not for it")
    assert seen["names"] == []
    assert "s3cr3t" not in seen["block"]
    assert seen["core"] == 0
    assert seen["input"] == ""
    assert seen["descriptors"] == [0, 1, 2]
    assert seen["home"].startswith(str(home / "tmp"))


def test_an_output_is_moved_into_place(home):
    assert run(home, "output") == {"there": True}
    assert (home / "out.txt").read_text() == "complete"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linked", "not a regular file"),
        ("folder", "not a regular file"),
        ("more", "wrote another file: `.bashrc`"),
        ("absent", "did not write `out.txt`"),
        ("another_target", "could not move the files into place"),
        ("disk", "File too large"),
        ("with_data", "wrote another file: `out.txt.data`"),
    ],
)
def test_what_is_no_output_is_not_moved(home, name, message):
    assert message in run(home, name, code=1)["error"]
    assert not (home / "out.txt").exists()


def test_a_file_with_rights_of_its_own_loses_them(home):
    run(home, "privileged")
    mode = (home / "out.txt").stat().st_mode
    assert not mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IXUSR | stat.S_IWOTH)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("segfault", ("died while finding sites", "SIGSEGV", "about to fall")),
        ("crashes_in_the_middle", ("died while exporting out.txt", "SIGSEGV")),
        ("aborts", ("died while verifying", "SIGABRT: memory ran out (limit: 0.5 GiB)", "--max-memory")),
        ("spins", ("died while finding sites", "more than 1 s of processor time", "--max-time")),
        ("nonsense", ("can't be understood",)),
        ("nested", ("can't be understood",)),
    ],
)
def test_a_death_is_a_refusal_that_names_the_step(home, name, parts):
    said = run(home, name, code=1)["died"]
    assert all(part in said for part in parts), said
    assert "hint: nothing was written" in said or name in ("nonsense", "nested")
    assert not (home / "out.txt").exists()


def test_a_death_afterwards_says_what_was_written(home):
    done = subprocess.run(
        command(home, "crashes_afterwards"), cwd=ROOT, env=environment(home), capture_output=True, text=True
    )
    assert "hint: only out.txt was written" in done.stdout + done.stderr, done.stderr
    assert (home / "out.txt").read_text() == "complete"
    assert list((home / "tmp").iterdir()) == []


def test_memory_is_limited(home):
    assert "MemoryError" in run(home, "memory", code=1)["error"]
    assert run(home, "native_memory")["taken"] < 10


@needs_seccomp
@needs_landlock
def test_memory_that_is_not_private_is_refused(home):
    tried = run(home, "uncounted_memory")
    assert tried.pop("private").startswith("DONE")
    assert set(tried.values()) == {"PermissionError"}, tried
    assert all(said.startswith("DONE") for said in run(home, "uncounted_memory", ()).values())


def test_native_prints_are_kept_from_the_terminal(home):
    done = subprocess.run(command(home, "prints"), cwd=ROOT, env=environment(home), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("from Python\n{}\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing(home, number, code):
    process = subprocess.Popen(
        command(home, "sleeps"),
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup and background jobs of a shell ignore some
    )
    deadline = time.monotonic() + 30
    while not (home / "home").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=20) == code
    assert list((home / "tmp").iterdir()) == []
    assert {path.name for path in home.iterdir()} == {"secret", "named", "tmp", "home"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
@needs_landlock
def test_a_user_without_rights_is_confined_as_well(home):
    done = as_nobody(home, "files")
    assert done.returncode == 0, done.stderr
    tried = json.loads(done.stdout.splitlines()[-1])
    assert not [what for what, result in tried.items() if result.startswith("DONE")], tried
    assert list((home / "tmp").iterdir()) == []


def as_nobody(home, name):
    """Run a payload in a process that becomes another user before it starts the worker."""
    for path in (home, home / "secret", home / "named", home / "tmp"):
        path.chmod(0o777)
    for folder in [*home.parents][:3]:
        folder.chmod(folder.stat().st_mode | 0o055)
    (home / "secret" / "id_rsa").chmod(0o666)
    script = (
        f"import os, sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', {name!r}, {str(home)!r}, *{WALLS!r}]\n"
        "import tests.isolation.payloads as payloads\n"
        "os.setgid(65534); os.setuid(65534); payloads.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(home), capture_output=True, text=True
    )


def test_the_system_says_what_it_offers():
    lines = protections()
    assert len(lines) == 3
    assert ("Landlock, ABI" in lines[0]) == bool(landlock_version())
    assert ("seccomp" in lines[1]) == has_seccomp()
