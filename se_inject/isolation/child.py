"""Run the work in the confined process: its streams, its confinement, and how it asks the parent to move files."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from se_inject.atomic_files import delegate_to
from se_inject.errors import ExportError
from se_inject.isolation.confinement import Confinement, confine
from se_inject.progress import listening

ENDING = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
"""The signals that ask a process to end."""


def run_child(
    work: Callable[[], int],
    confinement: Confinement | None,
    staged: dict[Path, Path],
    pipes: dict[str, tuple[int, int]],
) -> NoReturn:
    """Do the work in the process that was forked for it, and end that process.

    Args:
        work: what is to be done; its number becomes the exit code.
        confinement: what it may still do; None: what its parent may.
        staged: where each output is written before the parent moves it.
        pipes: the ends to read and to write of each stream.
    """
    code = 1
    try:
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: it ends when the parent does
        for number in ENDING.values():
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):
            os.setsid()  # no terminal of its own: Ctrl-C goes to the parent
        control, answers = _plumb(pipes, keep_input=confinement is None)
        if confinement is not None:
            confine(confinement)
        delegate_to(_Asking(control, answers, staged))
        with listening(lambda text: _tell(control, "step", text)):
            code = work()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException as error:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"error: this should not have happened: {type(error).__name__}: {error}\n")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _plumb(pipes: dict[str, tuple[int, int]], keep_input: bool) -> tuple[int, int]:
    """Give the child its streams and close whatever else it inherited; where it asks and where answers come."""
    ends = [pipes["out"][1], pipes["err"][1], pipes["native"][1], pipes["control"][1], pipes["answers"][0]]
    ends = [os.dup(end) if end < 3 else end for end in ends]
    if not keep_input:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
    for number in (1, 2):
        os.dup2(ends[2], number)
    low = 3
    for end in sorted(ends):
        os.closerange(low, end)
        low = end + 1
    os.closerange(low, max(low, min(os.sysconf("SC_OPEN_MAX"), 65536)))
    for stream, end in (("stdout", ends[0]), ("stderr", ends[1])):
        setattr(sys, stream, open(end, "w", encoding="utf-8", errors="backslashreplace", buffering=1))  # noqa: SIM115
    return ends[3], ends[4]


def _tell(control: int, kind: str, value: Any) -> None:
    os.write(control, json.dumps({"kind": kind, "value": value}).encode() + b"\n")


class _Asking:
    """``atomic_all`` in the child: it writes into the folders it was given, and asks for the files to be moved."""

    def __init__(self, control: int, answers: int, staged: dict[Path, Path]) -> None:
        self.control, self.staged = control, staged
        self.answers = open(answers, "rb")  # noqa: SIM115 - as long as the process

    def holds(self, paths: Sequence[str | os.PathLike[str]]) -> bool:
        return all(Path(path).resolve() in self.staged for path in paths)

    @contextlib.contextmanager
    def writing(self, paths: Sequence[str | os.PathLike[str]], force: bool) -> Iterator[list[Path]]:
        targets = [Path(path).resolve() for path in paths]
        temporary = [self.staged[target] for target in targets]
        try:
            yield temporary
            _tell(self.control, "commit", [str(target) for target in targets])
            answer = json.loads(self.answers.readline())
            if answer:
                raise ExportError(answer["message"], seen=answer["seen"], hint=answer["hint"])
        except BaseException:
            for folder in {path.parent for path in temporary}:
                shutil.rmtree(folder, ignore_errors=True)  # the folder itself stays, where that is not allowed
                folder.mkdir(exist_ok=True)
            raise
