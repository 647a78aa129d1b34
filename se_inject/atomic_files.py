"""Write files so that each is there completely or not at all, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol, cast

from se_inject.errors import ExportError, OptionError, either, with_causes


def check_writable(path: str | os.PathLike[str], force: bool = False) -> None:
    """Ask whether a file may be written here.

    Writes nothing and creates no directory.

    Args:
        path: the file that is to appear.
        force: whether it may replace one that exists.

    Raises:
        ExportError: the directory is missing or not writable, or something else has its name.
    """
    path = Path(path)
    parent = path.resolve().parent
    try:
        is_there = parent.is_dir()
    except PermissionError as error:  # a folder above it may not be entered
        raise ExportError(f"cannot write `{path}`", seen=f"no permission to write in `{parent}`") from error
    if not is_there:
        what = "is not a directory" if parent.exists() else "does not exist"
        raise ExportError(f"cannot write `{path}`", seen=f"`{parent}` {what}", hint=f"mkdir -p {parent}")
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "not a regular file"
        raise ExportError(f"cannot write `{path}`", seen=f"it is {what}")
    if path.exists() and not force:
        raise ExportError(f"`{path}` exists", hint=f"{either('--force', 'force=True')} replaces it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write `{path}`", seen=f"no permission to write in `{parent}`")


def check_all_writable(paths: Sequence[str | os.PathLike[str]], force: bool = False) -> None:
    """Ask whether all these files may be written here, and are different ones.

    Raises:
        ExportError: one of them can't.
        OptionError: two are the same.
    """
    for path in paths:
        check_writable(path, force)
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise OptionError(
            "two of the files to write are the same",
            seen=", ".join(map(str, paths)),
            hint="name every file once",
        )


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to, and move what was written into place when the block succeeds.

    See `atomic_all`, of which this is the case of one file.
    """
    with atomic_all([path], force) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_all(paths: Sequence[str | os.PathLike[str]], force: bool = False) -> Iterator[list[Path]]:
    """Give temporary paths to write to, and move all files into place when the block succeeds.

    When it fails, whatever the exception, nothing has appeared and nothing is left behind. Each path is in a
    temporary directory of its own beside the target and has the target's name, so that a file written beside
    it (an ONNX file's external data, which the file refers to by name) goes along.

    Args:
        paths: the files that are to appear.
        force: whether they may replace files that exist.

    Raises:
        ExportError: a path cannot be written (before the block is entered), the disk is full, or the
            operating system refused.
    """
    with _as_export_errors(paths):
        if delegate is not None and delegate.holds(paths):
            check_all_writable(paths, force)
            with delegate.writing(paths, force) as temporary:
                yield temporary
            return
        staged = stage(paths, force)
        try:
            yield list(staged.values())
            commit(staged, force)
        finally:
            discard(staged)


class Delegate(Protocol):
    """Another process that moves files into place, because this one may not write where they go."""

    def holds(self, paths: Sequence[str | os.PathLike[str]]) -> bool:
        """Return whether it has made temporary directories for these files."""

    def writing(self, paths: Sequence[str | os.PathLike[str]], force: bool) -> AbstractContextManager[list[Path]]:
        """Give temporary paths, and have what was written into them moved when the block succeeds."""


delegate: Delegate | None = None
"""Set in a process that may not write beside the files that are to appear; it then does what ``atomic_all`` does."""


def delegate_to(other: Delegate) -> None:
    """Have another process move this one's files into place from now on."""
    global delegate
    delegate = other


def stage(paths: Sequence[str | os.PathLike[str]], force: bool = False) -> dict[Path, Path]:
    """Make a temporary directory beside each file that is to appear.

    Args:
        paths: the files that are to appear.
        force: whether they may replace files that exist.

    Returns:
        the absolute path of each file → the path to write to meanwhile.

    Raises:
        ExportError: a file can't be written here.
        OptionError: two are the same.
    """
    check_all_writable(paths, force)
    staged: dict[Path, Path] = {}
    try:
        with _as_export_errors(paths):
            for target in (Path(path).resolve() for path in paths):  # a symbolic link stays one
                folder = tempfile.mkdtemp(prefix=f".{target.name[:40]}-", dir=target.parent)
                staged[target] = Path(folder) / target.name
    except BaseException:
        discard(staged)
        raise
    return staged


def commit(staged: Mapping[Path, Path], force: bool = False) -> None:
    """Move what was written into temporary directories into place: all files, or none if one can't be moved.

    Args:
        staged: as ``stage`` gave it, or a part of it.
        force: whether files that exist may be replaced.

    Raises:
        ExportError: a file has appeared in its place meanwhile.
        OSError: the operating system refused.
    """
    _move_into_place(list(staged.values()), list(staged), force)


def discard(staged: Mapping[Path, Path]) -> None:
    """Remove the temporary directories, and what is left in them."""
    for path in staged.values():
        remove_tree(path.parent)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, however deep it is and whatever modes it has, as far as the system lets us.

    A process that did harm may have filled it. Folders within are moved to its top, so that no path grows too long.
    Links are not followed.
    """
    todo, number = [folder], 0
    for current in todo:
        with contextlib.suppress(OSError):
            current.chmod(0o700)
            for entry in list(os.scandir(current)):
                with contextlib.suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                        continue
                    os.chmod(entry.path, 0o700)
                    if current is folder:
                        todo.append(folder / entry.name)
                        continue
                    while os.path.lexists(moved := folder / f".{number}"):
                        number += 1
                    os.rename(entry.path, moved)
                    todo.append(moved)
    for current in reversed(todo):
        with contextlib.suppress(OSError):
            current.rmdir()


@contextlib.contextmanager
def _as_export_errors(paths: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Turn what the operating system refuses into an ExportError that names the files."""
    try:
        yield
    except Exception as error:
        if (why := no_space(error)) is not None:
            full = "could not write" if why == _FULL[errno.EFBIG] else "no space left to write"
            hint = f"nothing was written; make room there, or choose another place{either(' with `-o`', '')}"
            raise ExportError(f"{full} {_listed(paths)}", seen=why, hint=hint) from error
        if isinstance(error, OSError):
            raise ExportError(f"could not write {_listed(paths)}", seen=str(error)) from error
        raise


def write_through(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let torch write a file, and tell it nothing of a full disk before it is done.

    Its own file writer can end the process then: its destructor throws (torch 2.14: `std::terminate`), and
    nothing could be cleaned up.

    Raises:
        OSError: the first write that failed.
    """
    with open(path, "wb") as file:
        stream = _Uncomplaining(file)
        write(cast("IO[bytes]", stream))
        if stream.error is not None:
            raise stream.error


class _Uncomplaining:
    """A file to write to that keeps its first error to itself, and takes no more from there on."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is closed."""


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EFBIG: "the file would be larger than the limit on the size of files allows (`ulimit -f` shows it)",
}


def no_space(error: BaseException | None) -> str | None:
    """Say which limit of the disk an exception, or one it came from, has met; None: no such limit."""
    for each in with_causes(error):
        if isinstance(each, OSError):
            if each.errno in _FULL:
                return _FULL[each.errno]
            if "requested and" in str(each):  # numpy's words for it, without a number
                return _FULL[errno.ENOSPC]
    return None


def _move_into_place(temporary: list[Path], targets: list[Path], force: bool) -> None:
    moves = [
        (file, target.parent / file.name)
        for path, target in zip(temporary, targets, strict=True)
        for file in sorted(path.parent.iterdir(), key=lambda file: file == path)  # what others refer to first
    ]
    for file, target in moves:
        check_writable(target, force)  # also the files beside; and time has passed
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    moved: list[tuple[Path, Path | None]] = []
    try:
        for file, target in moves:
            old = _kept(target, file.parent) if target.exists() else None
            os.replace(file, target)
            moved.append((target, old))
    except BaseException:
        for target, old in moved:
            if old is None:
                target.unlink(missing_ok=True)
            else:
                os.replace(old, target)
        raise
    for folder in {target.parent for target in targets}:
        with contextlib.suppress(OSError):  # not every system can sync a directory
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _kept(target: Path, folder: Path) -> Path:
    """Keep a second name, in the temporary directory, for a file that is about to be replaced."""
    old = Path(tempfile.mkdtemp(dir=folder)) / target.name
    try:
        os.link(target, old)
    except OSError:  # a file system without links
        shutil.copy2(target, old)
    return old


def _listed(paths: Sequence[str | os.PathLike[str]]) -> str:
    return ", ".join(f"`{os.fspath(path)}`" for path in paths)
