"""Open a network's file: a regular one, with an error that says what is there instead."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from se_inject.loading.weights import listed
from se_inject.user_code import regular_file


def opened(path: Path) -> AbstractContextManager[IO[bytes]]:
    """Open a network's file for reading, as ``regular_file`` does; of a directory the error says which file is meant."""
    return regular_file(path, _in_directory)


def _in_directory(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if "saved_model.pb" in names:
        return "a SavedModel of TensorFlow: convert the network to PyTorch first"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return "a distributed checkpoint: torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one file"
    files = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))]
    return f"pass the file in it that is meant{': ' + listed(files) if files else ''}"
