"""Give up rights for good before a stranger's file is opened, and report which of them this system lets go of."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from se_inject.isolation.landlock import DEVICE, READ, WRITE, landlock_version, restrict
from se_inject.isolation.seccomp import has_seccomp, refuse_calls

GIB = 1 << 30

_SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/opt/cuda", "/nix/store", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone", "/etc/locale.alias", "/etc/os-release",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems", "/proc/sys/vm",
    "/proc/sys/kernel/osrelease", "/proc/self", "/sys/devices/system", "/sys/fs/cgroup",
)  # fmt: skip
"""What programs need to start: libraries, the clock, the number of processors. Nothing of a user's."""
_DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")
"""Not `/dev/zero`: mapped, it is memory that no limit counts."""
_GPU = ("/dev/nvidia*", "/dev/nvidia-caps", "/dev/dri", "/dev/kfd")
_GPU_FACTS = ("/proc/driver/nvidia", "/proc/devices", "/proc/modules", "/sys/module", "/sys/bus/pci", "/sys/class")

_KEPT = frozenset((
    "PATH", "LANG", "LANGUAGE", "TZ", "TERM", "COLUMNS", "LINES", "NO_COLOR", "USER", "LOGNAME", "VIRTUAL_ENV",
    "CONDA_PREFIX", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SE_INJECT_TRACEBACK", "SYSTEMROOT",
))  # fmt: skip
_KEPT_BEGINNINGS = (
    "LC_",
    "PYTHON",
    "OMP_",
    "KMP_",
    "GOMP_",
    "MKL_",
    "OPENBLAS_",
    "TORCH_",
    "CUDA_",
    "NVIDIA_",
    "ATEN_",
)
_SECRET = ("TOKEN", "SECRET", "PASS", "CREDENTIAL", "KEY", "AUTH", "COOKIE")
_KEPT_CAPABILITIES = 0b110
"""Reading and writing files of other users, as root does; Landlock says which."""


@dataclass(frozen=True)
class Confinement:
    """What a process may still do.

    Args:
        readable: files, and folders with all beneath them, that may be read besides Python and its packages.
        writable: folders beneath which files may be made, changed and removed; the first becomes its home.
        memory: most bytes of memory it may take; None: no limit of ours.
        seconds: most seconds of processor time, of all its threads together; None: no limit of ours.
        file_size: most bytes of one file that it writes; None: no limit of ours.
        gpu: whether it may use the graphics processors.
    """

    readable: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    memory: int | None = None
    seconds: int | None = None
    file_size: int | None = None
    gpu: bool = False
    walls: frozenset[str] = field(default_factory=lambda: frozenset(("landlock", "seccomp")))
    """For tests: which of the two to put up."""


def confine(confinement: Confinement) -> None:
    """Confine this process, which must have one thread. Cannot be undone.

    What the system doesn't offer is left out: see ``protections``.

    Args:
        confinement: what it may still do.
    """
    _set_limits(confinement)
    _clean_environment(confinement)
    if not sys.platform.startswith("linux"):
        return
    no_new_privileges()
    if landlock_version() and "landlock" in confinement.walls:
        restrict(_rules(confinement))
    if has_seccomp() and "seccomp" in confinement.walls:
        refuse_calls(gpu=confinement.gpu)


def protections() -> list[str]:
    """Describe, a line each, the protections of a confined process on this system, and those that are missing."""
    version, calls = landlock_version(), has_seccomp()
    lines = []
    if version:
        lines.append(
            f"files: reads Python, its packages and the files named; writes the outputs (Landlock, ABI {version})"
        )
    else:
        lines.append("files: NOT confined, this system has no Landlock: it reads and writes what you may")
    if calls:
        lines.append("network, other programs and processes: refused (seccomp)")
    elif version >= 4:
        lines.append("network: TCP alone is refused (Landlock); other programs and processes: NOT confined")
    else:
        lines.append("network, other programs and processes: NOT confined on this system")
    if os.name == "posix":
        lines.append("memory, processor time, size of files: limited; no core dumps; environment without secrets")
    else:
        lines.append("memory, processor time, size of files: NOT limited on this system")
    return lines


def no_new_privileges() -> None:
    """Keep this process and what it starts from ever gaining rights: no set-user-ID programs, no capabilities."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "this process can't give up new privileges")
    library.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: other processes can't look into this one either
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)(_KEPT_CAPABILITIES, _KEPT_CAPABILITIES, 0, 0, 0, 0)
    library.capset(header, sets)  # fails without harm for a user who has none


def default_memory(sizes: Iterable[int]) -> int:
    """Choose the memory limit for files of these sizes: room for torch and for copies, and less than the machine has."""
    wanted = 8 * GIB + 24 * sum(sizes)
    return min(wanted, int(0.9 * _machine_memory()))


def python_files() -> list[Path]:
    """List the folders and files of Python, its packages and this one: all that importing them reads."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix), Path(sys.executable)}
    for entry in sys.path:
        path = Path(entry or ".")
        if not _is_private(path):
            found.add(path)
    for name in ("se_inject", "se_inject_plugins", "torch", "torchvision", "timm", "onnx", "onnxruntime"):
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            found.update(map(Path, (spec and spec.submodule_search_locations) or ()))
    for name, module in list(sys.modules.items()):  # packages that were installed in place
        if name.startswith("__editable__"):
            found.update(map(Path, getattr(module, "MAPPING", {}).values()))
    there = {path for path in found if os.path.exists(path)}
    return sorted(there | {path.resolve() for path in there})


def _is_private(path: Path) -> bool:
    """Return whether a folder on Python's path holds more than packages: the current folder, a home, a root."""
    path = path.resolve()
    home = Path("~").expanduser().resolve()
    return path == Path.cwd() or path == home or path in home.parents


def _rules(confinement: Confinement) -> list[tuple[str, int]]:
    rules = [(path, READ) for path in _SYSTEM]
    rules += [(path, DEVICE) for path in _DEVICES]
    rules += [(str(path), READ) for path in (*python_files(), *confinement.readable)]
    rules += [(str(path), READ | WRITE) for path in confinement.writable]
    if confinement.gpu:
        rules += [(path, READ) for path in _GPU_FACTS]
        rules += [(path, DEVICE) for pattern in _GPU for path in glob.glob(pattern)]
    rules += [(folder, READ) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return rules


def _set_limits(confinement: Confinement) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_DATA: confinement.memory,
        resource.RLIMIT_CPU: confinement.seconds,
        resource.RLIMIT_FSIZE: confinement.file_size,
    }
    for limit, most in wanted.items():
        if most is not None:
            soft, hard = resource.getrlimit(limit)
            lowest = min([most, *(old for old in (soft, hard) if old != resource.RLIM_INFINITY)])
            with contextlib.suppress(ValueError, OSError):  # macOS knows some of them only by name
                resource.setrlimit(limit, (lowest, lowest if limit != resource.RLIMIT_CPU else lowest + 5))


def _clean_environment(confinement: Confinement) -> None:
    """Keep what Python and torch are set up with, and overwrite the rest where the process got it."""
    kept = {name: os.environ[name] for name in os.environ if _may_stay(name)}  # others' values aren't even decoded
    if confinement.writable:
        home = str(confinement.writable[0])
        kept |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), home)
        tempfile.tempdir = None  # what it had found before
    if not confinement.gpu:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    _wipe_environment()
    os.environ.clear()
    os.environ.update(kept)
    sys.dont_write_bytecode = True
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
            start, end = int(fields[47]), int(fields[48])  # env_start, env_end
            if 0 < start < end:
                ctypes.memset(start, 0, end - start)


def _wipe_environment() -> None:
    """Overwrite every variable where Python and the C library keep it: what is only freed can still be found."""
    if not sys.platform.startswith("linux"):
        return
    for value in getattr(os.environ, "_data", {}).values():
        if type(value) is bytes and len(value) > 1:  # shorter ones are shared by the whole process
            ctypes.memset(id(value) + bytes.__basicsize__ - 1, 0, len(value))
    library = ctypes.CDLL(None)
    entries = ctypes.POINTER(ctypes.c_void_p).in_dll(library, "environ")
    place = 0
    while entries and entries[place]:
        ctypes.memset(entries[place], 0, len(ctypes.string_at(entries[place])))
        place += 1
    library.clearenv()


def _may_stay(name: str) -> bool:
    secret = any(word in name.upper() for word in _SECRET)
    return not secret and (name in _KEPT or name.startswith(_KEPT_BEGINNINGS))


def _machine_memory() -> int:
    """Return the memory of the machine, or of the container, in bytes."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(place).read_text()))
    return min(found, default=64 * GIB)


def code_beside(path: Path) -> Sequence[Path]:
    """List the modules that a Python file may import from its own folder: files and packages beside it, not the folder."""
    folder = path.resolve().parent
    packages = (entry.parent for entry in folder.glob("*/__init__.py"))
    return [path.resolve(), *folder.glob("*.py"), *packages]
