"""What a hostile file could run, as functions that are simply run in the worker; each says what came of it.

Run as ``python -m tests.isolation.payloads NAME FOLDER [WALL]…`` in a process without torch. Prints one JSON document.
"""

import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from se_inject import atomic_files, progress
from se_inject.errors import InjectError
from se_inject.isolation import Confinement, Interrupted, run_in_worker

NAME, FOLDER, *WALLS = sys.argv[1:]
FOLDER = Path(FOLDER)
LIBC = ctypes.CDLL(None, use_errno=True)


def tried(function, *arguments):
    try:
        return f"DONE: {function(*arguments)!r}"[:200]
    except BaseException as error:
        return type(error).__name__


def syscall(number, *arguments):
    result = LIBC.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def files():
    secret, readable = FOLDER / "secret" / "id_rsa", FOLDER / "named" / "model.pt"
    (FOLDER / "link").unlink(missing_ok=True)
    return {
        "read a secret": tried(secret.read_text),
        "read it through /proc": tried(Path(f"/proc/self/root{secret}").read_text),
        "list its folder": tried(os.listdir, secret.parent),
        "read the passwords": tried(Path("/etc/shadow").read_text),
        "write outside": tried((FOLDER / "written").write_text, "x"),
        "write where it reads": tried((FOLDER / "named" / "written").write_text, "x"),
        "change what it reads": tried(readable.write_text, "x"),
        "truncate what it reads": tried(os.truncate, readable, 0),
        "remove what it reads": tried(readable.unlink),
        "rename it": tried(readable.rename, FOLDER / "named" / "other"),
        "make a link": tried(os.symlink, "/etc", FOLDER / "link"),
        "make a folder": tried((FOLDER / "made").mkdir),
        "second name of a secret": tried(os.link, secret, Path(os.environ["HOME"]) / "stolen"),
        "write a module": tried(os.open, atomic_files.__file__, os.O_WRONLY),
        "memory of the parent": tried(Path(f"/proc/{os.getppid()}/mem").open, "rb"),
        "environment of the parent": tried(Path(f"/proc/{os.getppid()}/environ").read_bytes),
    }


def may():
    home = Path(os.environ["HOME"])
    (home / "scratch").write_text("mine")
    thread_ran = []
    thread = threading.Thread(target=thread_ran.append, args=(1,))
    thread.start()
    thread.join()
    return {
        "read what was named": tried((FOLDER / "named" / "model.pt").read_text),
        "its own folder": tried((home / "scratch").read_text),
        "threads": len(thread_ran),
        "random numbers": len(os.urandom(4)),
        "import": tried(__import__, "decimal").startswith("DONE"),
        "processors": os.cpu_count() > 0,
    }


def calls():
    parent = os.getppid()
    return {
        "tcp": tried(socket.socket, socket.AF_INET, socket.SOCK_STREAM),
        "udp": tried(socket.socket, socket.AF_INET, socket.SOCK_DGRAM),
        "ipv6": tried(socket.socket, socket.AF_INET6, socket.SOCK_STREAM),
        "unix": tried(socket.socket, socket.AF_UNIX, socket.SOCK_STREAM),
        "a program": tried(subprocess.run, ["/bin/sh", "-c", "true"]),
        "exec": tried(os.execv, "/bin/sh", ["sh", "-c", "echo DONE"]),
        "fork": tried(os.fork),
        "kill the parent": tried(os.kill, parent, signal.SIGKILL),
        "kill the group": tried(os.kill, -1, signal.SIGTERM),
        "limits of the parent": tried(syscall, 302, parent, 7, 0, 0) if os.uname().machine == "x86_64" else "OSError",
        "look into the parent": tried(syscall, 101, 16, parent, 0, 0) if os.uname().machine == "x86_64" else "OSError",
        "change a mode": tried(os.chmod, FOLDER / "named" / "model.pt", 0o777),
        "change a time": tried(os.utime, FOLDER / "named" / "model.pt"),
        "type into the terminal": tried(fcntl.ioctl, 0, 0x5412, b"x"),
        "a datagram to a socket with a name": tried(datagram),
        "a signal through a pipe": tried(signal_through_a_pipe, parent),
    }


def datagram():
    """One of a pair of sockets sends to any other that has a name in the file system."""
    one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return one.sendto(b"hello", str(FOLDER / "socket"))


def signal_through_a_pipe(process):
    """A file's owner gets the signal of the file's choice when there is something to read."""
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETOWN, process)
    fcntl.fcntl(reading, 10, signal.SIGCONT)  # F_SETSIG
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
    return os.write(writing, b"x")


def objects():
    """Reach what processes share: queues, semaphores and memory by number, and how the parent runs."""
    parent, buffer = os.getppid(), ctypes.create_string_buffer(100)
    on_intel = {
        "a message": (70, 0, buffer, 50, 0, 0o4000), "a queue removed": (71, 2**30, 0, 0), "semaphores": (66, 2**30, 0, 0, 0),
        "shared memory": (31, 2**30, 0, 0), "a queue by name": (241, b"no-such-queue"), "a message sent": (69, 2**30, buffer, 1, 0),
        "priority": (141, 0, parent, 15), "processors": (203, parent, 8, buffer), "schedule": (144, parent, 5, buffer),
        "input and output": (251, 1, parent, 3 << 13), "what happens in folders": (294, 0),
    }  # fmt: skip
    return {what: tried(syscall, *call) for what, call in on_intel.items()}


def secrets():
    """Look for the value of a variable in all memory; it is here in two pieces, so that this code is not what is found."""
    first, second, hits = b"\x5aQ7k", b"Wq93xPvN", 0
    for line in open("/proc/self/maps"):  # noqa: SIM115
        parts = line.split()
        if "r" in parts[1] and not (len(parts) > 5 and parts[5].startswith(("/", "[v"))):
            low, high = (int(number, 16) for number in parts[0].split("-"))
            data = ctypes.string_at(low, high - low)
            at = data.find(first)
            while at >= 0:
                hits += data[at + 4 : at + 12] == second
                at = data.find(first, at + 1)
    return {"hits": hits}


def deep():
    os.chdir(os.environ["HOME"])
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")
    return {}


def closed():
    """Leave folders behind that nobody may list."""
    (Path(os.environ["HOME"]) / "x").mkdir()
    os.mkdir(Path(os.environ["HOME"]) / "x" / "y", 0)
    for path in atomic_files.delegate.staged.values():
        os.mkdir(path.parent / "y", 0)
    return {}


def nested():
    os.write(atomic_files.delegate.control, b"[" * 200_000 + b"\n")
    time.sleep(20)
    return {}


def tcp():
    server = FOLDER / "port"
    with socket.socket() as one:
        return {"connect": tried(one.connect, ("127.0.0.1", int(server.read_text() or 1)))}


def environment():
    block = Path("/proc/self/environ").read_bytes()
    return {
        "names": sorted(name for name in os.environ if "SECRET" in name or "AWS" in name or name == "HF_TOKEN"),
        "block": block.strip(b"\0").decode(errors="replace"),
        "core": __import__("resource").getrlimit(__import__("resource").RLIMIT_CORE)[0],
        "input": os.read(0, 10).decode(),
        "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:3],
        "home": os.environ["HOME"],
    }


def output():
    with atomic_files.atomic(FOLDER / "out.txt", force=True) as path:
        path.write_text("complete")
    return {"there": (FOLDER / "out.txt").exists()}


def crashes_in_the_middle():
    with atomic_files.atomic(FOLDER / "out.txt") as path:
        path.write_text("half")
        progress.step("exporting out.txt")
        ctypes.string_at(0)


def crashes_afterwards():
    with atomic_files.atomic(FOLDER / "out.txt", force=True) as path:
        path.write_text("complete")
    ctypes.string_at(0)


def strange_output(spoil):
    def work():
        with atomic_files.atomic(FOLDER / "out.txt") as path:
            spoil(path)
        return {}

    return work


def linked(path):
    path.symlink_to("/etc/passwd")


def more(path):
    path.write_text("x")
    (path.parent / ".bashrc").write_text("x")


def absent(path):
    pass


def folder(path):
    path.mkdir()


def privileged(path):
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o6777))


def with_data(path):
    path.write_text("x")
    path.with_name(f"{path.name}.data").write_text("x")


def another_target():
    """Ask for a file to be moved where the command line named none."""
    atomic_files.delegate.staged[FOLDER / "other.txt"] = atomic_files.delegate.staged[FOLDER / "out.txt"]
    with atomic_files.atomic(FOLDER / "other.txt") as path:
        path.write_text("x")
    return {}


def nonsense():
    os.write(atomic_files.delegate.control, b"\xff\xfe not JSON\n")
    time.sleep(20)
    return {}


def memory():
    progress.step("reading x.pt")
    kept = [bytearray(64 << 20) for _ in range(200)]
    return {"took": len(kept)}


def native_memory():
    progress.step("reading x.pt")
    LIBC.malloc.restype = ctypes.c_void_p
    LIBC.malloc.argtypes = [ctypes.c_size_t]
    taken = 0
    while LIBC.malloc(64 << 20) and taken < 400:
        taken += 1
    return {"taken": taken}


def uncounted_memory():
    """Take memory that the limit of private memory doesn't count, 256 MiB of each kind."""
    size = 256 << 20

    def mapped(flags, file=-1):
        with mmap.mmap(file, size, flags=flags) as area:
            area[:: mmap.PAGESIZE] = bytes(len(area) // mmap.PAGESIZE)

    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return {
        "shared": tried(mapped, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS),
        "growing down": tried(mapped, private | 0x0100),
        "a file in memory": tried(os.memfd_create, "x"),
        "zeros": tried(lambda: mapped(mmap.MAP_SHARED, os.open("/dev/zero", os.O_RDWR))),
        "private": tried(mapped, private),
    }


def disk():
    data = b"x" * (1 << 20)
    with (Path(os.environ["HOME"]) / "big").open("wb") as file:
        for _ in range(100):
            file.write(data)
    return {}


def spins():
    progress.step("finding sites")
    while True:
        pass


def segfault():
    progress.step("finding sites")
    LIBC.puts(b"about to fall")
    LIBC.fflush(None)
    ctypes.string_at(0)


def aborts():
    progress.step("verifying")
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


def prints():
    print("from Python", flush=True)
    os.write(1, b"from native code\n")
    os.write(2, b"from native code\n")
    return {}


def sleeps():
    with atomic_files.atomic(FOLDER / "out.txt") as path:
        path.write_text("half")
        (FOLDER / "home").write_text(os.environ["HOME"])
        time.sleep(30)
    return {}


PAYLOADS = {
    **{f.__name__: f for f in (files, may, calls, tcp, environment, output, crashes_in_the_middle, another_target)},
    **{f.__name__: f for f in (objects, secrets, deep, closed, nested)},
    **{f.__name__: f for f in (nonsense, memory, native_memory, disk, spins, segfault, aborts, prints, sleeps)},
    "uncounted_memory": uncounted_memory,
    "crashes_afterwards": crashes_afterwards,
    **{f.__name__: strange_output(f) for f in (linked, more, absent, folder, privileged, with_data)},
}


def main():
    def work():
        try:
            result = PAYLOADS[NAME]()
        except (InjectError, MemoryError, OSError) as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
            return 1
        print(json.dumps(result))
        return 0

    confinement = Confinement(
        readable=(FOLDER / "named",),
        memory=512 << 20,
        seconds=1 if NAME == "spins" else 20,
        file_size=16 << 20,
        walls=frozenset(WALLS),
    )
    if NAME == "sleeps":
        confinement = Confinement(writable=(FOLDER,))
    if NAME == "tcp":
        confinement = Confinement(readable=(FOLDER,), walls=frozenset(WALLS))
    try:
        code = run_in_worker(work, confinement, outputs=[FOLDER / "out.txt"])
    except InjectError as error:
        print(json.dumps({"died": str(error)}))
        code = 1
    except Interrupted as ending:
        code = ending.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
