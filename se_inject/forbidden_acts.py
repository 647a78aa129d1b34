"""Name what a stranger's network has no business with while it runs, for ``guarding``: Python's audit events, modules and functions."""

from __future__ import annotations

ACTS = {
    "compile": "compiles source text",
    "exec": "executes code",
    "code.__new__": "makes code",
    "marshal.loads": "makes code",
    "marshal.load": "makes code",
    "pickle.find_class": "reads a pickle",
    "import": "imports what is not loaded",
    "_thread.": "starts a thread",
    "subprocess.": "starts a process",
    "pty.": "starts a process",
    "os.": "changes the system",
    "shutil.": "changes files",
    "tempfile.": "makes files",
    "socket.": "opens a connection",
    "urllib.": "opens a connection",
    "http.": "opens a connection",
    "ftplib.": "opens a connection",
    "smtplib.": "opens a connection",
    "imaplib.": "opens a connection",
    "poplib.": "opens a connection",
    "webbrowser.": "opens a browser",
    "sqlite3.": "opens a database",
    "ctypes.": "calls C",
    "mmap.": "maps memory",
    "fcntl.": "changes files",
    "msvcrt.": "changes files",
    "winreg.": "changes the registry",
    "_winapi.": "changes the system",
    "signal.": "sends a signal",
    "resource.": "changes limits",
    "syslog.": "writes to the system's log",
    "gc.": "looks into memory",
    "sys.settrace": "watches the interpreter",
    "sys.setprofile": "watches the interpreter",
    "sys.addaudithook": "watches the interpreter",
    "sys._current_": "watches the interpreter",
    "builtins.": "asks at the terminal",
    "cpython.": "runs Python",
}  # fmt: skip
READING = frozenset(
    [
        "os.listdir",
        "os.scandir",
        "os.walk",
        "os.fwalk",
        "os.getxattr",
        "os.listxattr",
        "builtins.id",
        "socket.gethostname",
    ]
)
UNREPORTED = frozenset(
    [
        "_posixsubprocess", "_posixshmem", "_multiprocessing", "_xxsubinterpreters", "_testcapi", "_testinternalcapi",
        "_ctypes_test", "readline", "termios", "_curses", "_tkinter", "_dbm", "_gdbm", "faulthandler", "ossaudiodev", "spwd",
    ]
)  # fmt: skip
"""Modules of Python's that do what an audit hook isn't told of. Those that are loaded already have a line in ``PATCHED``."""
OF_THE_SYSTEM = (
    "umask", "nice", "setpriority", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "setpgid", "setsid", "setuid",
    "setgid", "setgroups", "initgroups", "chroot", "_exit", "abort",
)  # fmt: skip
PATCHED: dict[str, dict[str, tuple[str, ...]]] = {
    "makes a module": {"torch.nn": ("Module.__init__",)},
    "writes a file": {
        "torch": ("save",),
        "torch.serialization": ("save",),
        "torch._C": ("PyTorchFileWriter.__init__",),
        "readline": ("write_history_file", "append_history_file"),
    },
    "opens a file for writing": {"torch": ("from_file", "UntypedStorage.from_file")},
    "makes a pipe or a device": {"os": ("mkfifo", "mknod"), "posix": ("mkfifo", "mknod")},
    "starts a process": {"_posixsubprocess": ("fork_exec",)},
    "shares memory": {"_posixshmem": ("shm_open", "shm_unlink"), "_multiprocessing": ("sem_unlink",)},
    "changes the system": {"os": OF_THE_SYSTEM, "posix": OF_THE_SYSTEM},
}
"""What Python reports nothing of, by the module and the name that it is called by."""
