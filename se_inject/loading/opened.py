"""Open a file that somebody named: regular files alone, with an error that says what is there instead.

A pipe would block, a device may never end.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from se_inject.errors import LoadError
from se_inject.loading.weights import listed
from se_inject.user_code import NoSuchFile, did_you_mean


@contextlib.contextmanager
def opened(path: Path, in_directory: Callable[[Path], str] | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file for reading, and close it afterwards.

    Args:
        path: of the file; a link to one is followed.
        in_directory: what to do about a directory; None: what a network's file has.

    Raises:
        NoSuchFile: nothing is there.
        LoadError: a directory, a device, a pipe or a socket is there, or it can't be opened.
    """
    if path.is_dir():
        raise LoadError(f"`{path}` is a directory", hint=(in_directory or _in_directory)(path))
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the errors are about opening alone
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        if path.exists() and not path.is_file():  # a socket can't even be opened
            raise _no_file(path) from error
        raise LoadError(f"`{path}` can't be opened", seen=str(error)) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _no_file(path)
        yield file


def read_text(path: Path, most: int, what: str) -> str:
    """The text of a small regular file, such as a plan.

    Args:
        path: of the file.
        most: bytes it may have.
        what: it should be, for the error.

    Raises:
        NoSuchFile: nothing is there.
        LoadError: no regular file, a larger one, or no text.
    """
    with opened(path, lambda _: f"pass the {what} in it that is meant") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise LoadError(f"`{path}` is larger than any {what}", seen=f"more than {most:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoadError(f"`{path}` is not a {what}", seen="it is not text") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe without waiting for somebody who writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _no_file(path: Path) -> LoadError:
    return LoadError(f"`{path}` is not a file, but a device, a pipe or a socket")


def _missing(path: Path) -> NoSuchFile:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings)
    if path.is_symlink():
        return NoSuchFile(f"`{path}` is a link to a file that does not exist", seen=os.readlink(path))
    if not path.suffix and path.name == str(path):
        hint = f"a network has its package in front: `torchvision:{path}`, `timm:{path}`"
    return NoSuchFile(f"no file `{path}`", hint=hint)


def _in_directory(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if "saved_model.pb" in names:
        return "a SavedModel of TensorFlow: convert the network to PyTorch first"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return "a distributed checkpoint: torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one file"
    files = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))]
    return f"pass the file in it that is meant{': ' + listed(files) if files else ''}"
