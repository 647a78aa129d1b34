"""Open a regular file, or say in an error what is there instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TypeVar

from se_inject.errors import LoadError
from se_inject.loading.weights import listed
from se_inject.user_code import fact, regular_file

T = TypeVar("T")


def opened(path: Path) -> AbstractContextManager[IO[bytes]]:
    """Open a network's file for reading, as ``regular_file`` does; of a directory the error says which file is meant."""
    return regular_file(path, _in_directory)


def checked_read(path: Path, read: Callable[[], T]) -> T:
    """Run a reader of a file without warnings, and turn whatever it raises into an error about the file.

    Raises:
        LoadError: the reader failed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"`{path}` is damaged, or not what it seems to be", seen=fact(error), hint="copy or download it again"
        ) from error


def _in_directory(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if "saved_model.pb" in names:
        return "a SavedModel of TensorFlow: convert the network to PyTorch first"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return "a distributed checkpoint: torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one file"
    files = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))]
    return f"pass the file in it that is meant{': ' + listed(files) if files else ''}"
