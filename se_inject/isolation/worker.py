"""The work in a process of its own, before torch is imported: the parent watches, passes on what is printed, and
moves finished files into place.

The child is confined, if that is asked for, before it opens anything. What it prints comes through pipes; what native
code prints beside Python goes into a third one and is shown only when the process dies. When the child dies of a
signal the parent says at which step; when the parent is interrupted it ends the child and leaves nothing behind.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import selectors
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from se_inject.atomic_files import commit, discard, remove_tree, stage
from se_inject.errors import ExportError, InjectError, WorkerError, printable
from se_inject.isolation.child import ENDING, run_child
from se_inject.isolation.confinement import Confinement

_LAST_WORDS = 2000
_TICK = 0.1


class Interrupted(BaseException):
    """The command was asked to end, by Ctrl-C or by another process.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Display(Protocol):
    """What shows the steps of the work while it runs."""

    def show(self, step: str) -> None:
        """Report that a step begins."""

    def tick(self) -> None:
        """Report that some time has passed."""

    def clear(self) -> None:
        """Do nothing: no line was drawn that must be cleared."""


def can_fork() -> bool:
    """Return whether this process can hand work to a fork of itself: POSIX, one thread, and torch not imported yet."""
    return hasattr(os, "fork") and "torch" not in sys.modules and threading.active_count() == 1


def run_in_worker(
    work: Callable[[], int],
    confinement: Confinement | None = None,
    *,
    outputs: Sequence[Path] = (),
    force: bool = False,
    display: Display | None = None,
) -> int:
    """Run a function in a fork of this process, and watch it.

    Args:
        work: what is to be done; its number becomes the exit code.
        confinement: what the child may still do; None: what this process may. A private folder, and one for each
            output, are added to what it may write.
        outputs: the files that the child may ask to be moved into place; it writes them with ``atomic_all``.
        force: whether these may replace files that exist.
        display: what shows the steps; None: nothing.

    Returns:
        the exit code of the child.

    Raises:
        ExportError: an output can't be written here.
        WorkerError: the child was ended by a signal; nothing was written after that.
        Interrupted: this process was asked to end; the child has ended, and nothing is left of it.
    """
    with clean_end():
        staged = stage(outputs, force)
        try:
            private = Path(tempfile.mkdtemp(prefix="se-inject-"))
            try:
                if confinement is not None:
                    folders = (private, *(path.parent for path in staged.values()))
                    confinement = replace(confinement, writable=(*folders, *confinement.writable))
                return _Parent(work, confinement, staged, force, display).run()
            finally:
                remove_tree(private)
        finally:
            discard(staged)


@contextlib.contextmanager
def clean_end() -> Iterator[None]:
    """Raise ``Interrupted`` at a signal that asks this process to end."""

    def interrupted(number: int, _frame: FrameType | None) -> None:
        for other in ENDING.values():
            signal.signal(other, signal.SIG_IGN)  # what cleans up isn't interrupted
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING.values()}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, interrupted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Parent:
    """The watching process."""

    def __init__(
        self,
        work: Callable[[], int],
        confinement: Confinement | None,
        staged: dict[Path, Path],
        force: bool,
        display: Display | None,
    ) -> None:
        self.work, self.confinement, self.staged, self.force, self.display = work, confinement, staged, force, display
        self.step = "starting"
        self.last_words = b""
        self.control = b""
        self.child = 0
        self.ended: int | None = None
        self.written: list[str] = []
        """The names of the files that are in place."""

    def run(self) -> int:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pipes = {name: os.pipe() for name in ("out", "err", "native", "control", "answers")}
        self.child = os.fork()
        if not self.child:
            run_child(self.work, self.confinement, self.staged, pipes)
        for name, (reading, writing) in pipes.items():
            os.close(reading if name == "answers" else writing)
        self.answers = pipes["answers"][1]
        try:
            with selectors.DefaultSelector() as selector:
                for name in ("out", "err", "native", "control"):
                    selector.register(pipes[name][0], selectors.EVENT_READ, self._reader(name))
                self._watch(selector)
        finally:
            if self.ended is None:
                os.kill(self.child, signal.SIGKILL)
                _, self.ended = os.waitpid(self.child, 0)
            self._clear()
            for name, (reading, writing) in pipes.items():
                os.close(writing if name == "answers" else reading)
        if os.WIFSIGNALED(self.ended):
            raise self._death()
        return os.WEXITSTATUS(self.ended)

    def _watch(self, selector: selectors.BaseSelector) -> None:
        """Pass on what the child says until it ends."""
        while True:
            self._pass_on(selector, _TICK)
            if self.display is not None:
                self.display.tick()
            child, status = os.waitpid(self.child, 0 if not selector.get_map() else os.WNOHANG)
            if child:
                self.ended = status
                while selector.get_map() and self._pass_on(selector, 0):
                    pass
                return

    def _pass_on(self, selector: selectors.BaseSelector, seconds: float) -> bool:
        events = selector.select(seconds)
        for key, _ in events:
            data = os.read(key.fd, 1 << 16)
            if data:
                key.data(data)
            else:
                selector.unregister(key.fd)
                key.data(b"")
        return bool(events)

    # -- what the child prints -----------------------------------------------------------------------------

    def _reader(self, name: str) -> Callable[[bytes], None]:
        if name == "control":
            return self._controlled
        if name == "native" and self.confinement is not None:
            return self._remember
        stream = sys.stdout if name == "out" else sys.stderr
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        plain = self.confinement is not None and stream.isatty()

        def relay(data: bytes) -> None:
            text = decoder.decode(data, final=not data)
            self._clear()
            stream.write(printable(text, None, keep="\n\t") if plain else text)
            stream.flush()
            if name == "native":
                self._remember(data)

        return relay

    def _remember(self, data: bytes) -> None:
        self.last_words = (self.last_words + data)[-_LAST_WORDS:]

    def _clear(self) -> None:
        if self.display is not None:
            self.display.clear()

    # -- what the child asks for ---------------------------------------------------------------------------

    def _controlled(self, data: bytes) -> None:
        *lines, self.control = (self.control + data).split(b"\n")
        if len(self.control) > 1 << 20:
            raise WorkerError("the process that did the work said something that can't be understood")
        for line in lines:
            try:
                message = json.loads(line)
                kind, value = message["kind"], message["value"]
                if not isinstance(kind, str):
                    raise TypeError(kind)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise WorkerError("the process that did the work said something that can't be understood") from error
            if kind == "step":
                self.step = printable(str(value))
                if self.display is not None:
                    self.display.show(self.step)
            elif kind == "commit":
                self._answer(self._commit(value))

    def _commit(self, value: Any) -> dict[str, str | None]:
        """Move files into place, and say what was wrong; nothing but outputs that the command line names."""
        with self._stopped():
            try:
                wanted = [Path(path) for path in value]
                staged = {target: self.staged[target] for target in wanted}
                for path in staged.values():
                    _inspect(path)
                commit(staged, self.force)
                self.written += [path.name for path in staged]
            except InjectError as error:
                return {"message": error.message, "seen": error.seen, "hint": error.hint}
            except (OSError, KeyError, TypeError) as error:
                return {"message": "could not move the files into place", "seen": str(error), "hint": None}
        return {}

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[None]:
        """Stop the child for a while, so that the files moved are the files that were checked."""
        os.kill(self.child, signal.SIGSTOP)
        _, status = os.waitpid(self.child, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.ended = status
            raise self._death()
        try:
            yield
        finally:
            os.kill(self.child, signal.SIGCONT)

    def _answer(self, answer: dict[str, str | None]) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.answers, json.dumps(answer).encode() + b"\n")

    def _death(self) -> WorkerError:
        """Make the error for a child that was ended by a signal."""
        assert self.ended is not None
        number = os.WTERMSIG(self.ended)
        limits = self.confinement or Confinement()
        last_words = self.last_words.decode(errors="replace")
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        seen = f"{name}: {_CAUSES.get(name, 'it was ended from outside')}"
        hint = "a damaged or hostile file can do this, and so can a fault in torch"
        if name == "SIGXCPU":
            seen = f"{name}: more than {limits.seconds} s of processor time"
            hint = "`--max-time SECONDS` allows more"
        elif name == "SIGKILL":
            hint = "use a machine with more memory, or a smaller `--input`"
        elif "bad_alloc" in last_words:
            seen = f"{name}: memory ran out{_memory_limit(limits)}"
            hint = "`--max-memory SIZE` allows more, if the machine has it"
        if lines := [line for line in last_words.splitlines() if line.strip()]:
            seen += f"\nlast said: {printable(lines[-1])}"
        written = (
            f"only {', '.join(map(printable, self.written))} was written" if self.written else "nothing was written"
        )
        return WorkerError(
            f"the process that did the work died while {self.step}", seen=seen, hint=f"{written}; {hint}"
        )


def _memory_limit(confinement: Confinement) -> str:
    return "" if confinement.memory is None else f" (limit: {confinement.memory / (1 << 30):.1f} GiB)"


_CAUSES = {
    "SIGSEGV": "native code read or wrote where nothing is",
    "SIGBUS": "native code read or wrote where nothing is, or a file became shorter meanwhile",
    "SIGFPE": "native code divided by zero",
    "SIGILL": "native code that this processor does not know",
    "SIGABRT": "native code gave up",
    "SIGSYS": "a system call that is not allowed",
    "SIGKILL": "it was killed, as the system does when memory runs out",
}


def _inspect(path: Path) -> None:
    """Refuse what isn't an output: other names, links, devices, files with a second name; take odd modes away."""
    mask = os.umask(0)
    os.umask(mask)
    found = sorted(path.parent.iterdir())
    if path not in found:
        raise ExportError(f"the process that did the work did not write `{path.name}`")
    for entry in found:
        status = entry.lstat()
        if entry.name not in (path.name, f"{path.name}.data" if path.suffix.lower() == ".onnx" else ""):
            raise ExportError(f"the process that did the work wrote another file: `{printable(entry.name)}`")
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise ExportError(f"what the process wrote as `{entry.name}` is not a regular file of its own")
        entry.chmod(0o666 & ~mask)
