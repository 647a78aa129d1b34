"""Files that are there completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from se_inject.errors import ExportError, OptionError


def check_writable(path: str | os.PathLike[str], force: bool = False) -> None:
    """Ask whether a file may be written here.

    Writes nothing and creates no directory.

    Args:
        path: the file that is to appear.
        force: whether it may replace one that exists.

    Raises:
        ExportError: the directory is missing or not writable, or something is in the way.
    """
    path = Path(path)
    parent = path.resolve().parent
    if not parent.is_dir():
        what = "is not a directory" if parent.exists() else "does not exist"
        raise ExportError(f"cannot write `{path}`", seen=f"`{parent}` {what}", hint=f"mkdir -p {parent}")
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "not a regular file"
        raise ExportError(f"cannot write `{path}`", seen=f"it is {what}")
    if path.exists() and not force:
        raise ExportError(f"`{path}` exists", hint="--force (in Python force=True) replaces it")
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
    check_all_writable(paths, force)
    targets = [Path(path).resolve() for path in paths]  # a symbolic link stays one
    temporary: list[Path] = []
    try:
        for target in targets:
            folder = tempfile.mkdtemp(prefix=f".{target.name[:40]}-", dir=target.parent)
            temporary.append(Path(folder) / target.name)
        yield temporary
        _move_into_place(temporary, targets, force)
    except Exception as error:
        if no_space(error):
            raise ExportError(
                f"no space left to write {_listed(paths)}", hint="nothing was written; free some space"
            ) from error
        if isinstance(error, OSError):
            raise ExportError(f"could not write {_listed(paths)}", seen=str(error)) from error
        raise
    finally:
        for path in temporary:
            shutil.rmtree(path.parent, ignore_errors=True)


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
        """Nothing: the file is flushed when it is closed."""


def no_space(error: BaseException | None) -> bool:
    """Whether the exception, or one it came from, says that the disk or the quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        short = "requested and" in str(error)  # numpy's way to say it, without a number
        if isinstance(error, OSError) and (error.errno in full or short):
            return True
        error = error.__cause__ or error.__context__
    return False


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
    """A second name for a file that is about to be replaced, in the temporary directory."""
    old = Path(tempfile.mkdtemp(dir=folder)) / target.name
    try:
        os.link(target, old)
    except OSError:  # a file system without links
        shutil.copy2(target, old)
    return old


def _listed(paths: Sequence[str | os.PathLike[str]]) -> str:
    return ", ".join(f"`{os.fspath(path)}`" for path in paths)
