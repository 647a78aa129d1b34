"""Call a function in a new, confined Python process, from a process that can't fork: torch and its threads are there.

The new process imports no torch either before it forks its worker; see ``run_in_worker``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import se_inject.errors as errors
from se_inject.atomic_files import atomic
from se_inject.errors import InjectError, WorkerError, out_of_memory
from se_inject.isolation.confinement import Confinement
from se_inject.isolation.worker import Interrupted, can_fork, run_in_worker

_LAST_BYTES = 1 << 16
_MOST_BYTES = 64 << 20
"""Of what a process may print, and how much of its end is kept."""
_START = "import sys; sys.path[:] = sys.argv[1:]; from se_inject.isolation.spawn import main; main()"
"""`sys` is built in; Python would look for everything else in the current folder first, where the stranger's file may be."""


def call_isolated(
    function: str,
    arguments: Mapping[str, Any],
    output: Path,
    *,
    readable: Sequence[Path],
    memory: int | None = None,
    seconds: int | None = None,
    file_size: int | None = None,
) -> str:
    """Have a function write a file, in a new process that is confined before it imports anything of the function's.

    Args:
        function: ``package.module:name``; it is called with ``output`` as its first argument.
        arguments: its keyword arguments, as JSON can hold them.
        output: the file that it writes; in a folder that exists.
        readable: what it may read.
        memory: most bytes of memory.
        seconds: most seconds of processor time.
        file_size: most bytes of a file that it writes.

    Returns:
        the end of what it printed.

    Raises:
        InjectError: what the function raised, or WorkerError if its process died.
    """
    if os.name != "posix":
        raise WorkerError("reading in a process of its own needs a system with `fork`", hint="leave isolated=True out")
    request = {
        "function": function,
        "arguments": dict(arguments),
        "output": str(output),
        "readable": [str(path) for path in readable],
        "memory": memory,
        "seconds": seconds,
        "file_size": file_size,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *_import_paths()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            out, err = _talk(process, json.dumps(request).encode())
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise _error(out, err)
    return out


def _import_paths() -> list[str]:
    """List where this process imports from, the current folder only if this package is there, and then last."""
    own = str(Path(errors.__file__).resolve().parents[1])
    paths = [os.path.abspath(entry) for entry in sys.path if entry]
    return paths if own in map(os.path.realpath, paths) else [*paths, own]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, which removes its folder then; kill it if it doesn't."""
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()  # nothing that it still prints holds it up
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def _talk(process: subprocess.Popen[bytes], request: bytes) -> tuple[str, str]:
    """Hand a process its request, and return the end of what it prints: no more than a bit of it is kept here."""
    assert process.stdin and process.stdout and process.stderr
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(request)
    said: dict[Any, bytes] = {process.stdout: b"", process.stderr: b""}
    amount = 0
    with selectors.DefaultSelector() as selector:
        for pipe in said:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                data = os.read(key.fd, 1 << 16)
                said[key.fileobj] = (said[key.fileobj] + data)[-_LAST_BYTES:]
                amount += len(data)
                if not data:
                    selector.unregister(key.fileobj)
            if amount > _MOST_BYTES:
                raise WorkerError(
                    "the process that was to do the work prints without end", seen=f"more than {_MOST_BYTES >> 20} MiB"
                )
    out, err = (each.decode(errors="replace") for each in said.values())
    return out, err


def _error(out: str, err: str) -> InjectError:
    """Rebuild the exception that a process printed as its last line."""
    try:
        said = json.loads(out.splitlines()[-1])
        kind = getattr(errors, said["kind"], InjectError)
        message, *others = (said[name] for name in ("message", "seen", "hint"))
        if (
            issubclass(kind, InjectError)
            and isinstance(message, str)
            and all(isinstance(o, str | None) for o in others)
        ):
            return kind(message, seen=others[0], hint=others[1])
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return WorkerError("the process that was to do the work failed", seen=(err or out)[-300:].strip() or None)


def main() -> None:
    """Do what the request on stdin says; print an exception as a line of JSON."""
    request = json.load(sys.stdin)
    output = Path(request["output"])
    limits = {name: request[name] for name in ("memory", "seconds", "file_size")}
    confinement = Confinement(readable=tuple(map(Path, request["readable"])), **limits)

    def work() -> int:
        place, _, name = request["function"].partition(":")
        try:
            with atomic(output) as path:
                getattr(importlib.import_module(place), name)(path, **request["arguments"])
        except Exception as error:
            return _answer(error)
        return 0

    try:
        if not can_fork():
            raise WorkerError("this process can't fork", seen="another thread, or torch, is there already")
        sys.exit(run_in_worker(work, confinement, outputs=[output]))
    except InjectError as error:
        sys.exit(_answer(error))
    except Interrupted as ending:
        sys.exit(ending.exit_code)


def _answer(error: Exception) -> int:
    if out_of_memory(error):
        error = WorkerError("memory ran out", hint="use a machine with more memory")
    if not isinstance(error, InjectError):
        error = WorkerError(f"this should not have happened: {type(error).__name__}: {error}")
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
    said = {"kind": kinds[0], "message": error.message, "seen": error.seen, "hint": error.hint}
    sys.stdout.write(json.dumps(said) + "\n")
    return 1
