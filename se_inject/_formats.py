"""What a file is, told from its bytes and never from its suffix."""

from __future__ import annotations

import codecs
import pickle
import zipfile
from os import PathLike
from typing import IO

import torch

from se_inject.errors import LoadError

PICKLES = ("zip", "legacy", "plain")
"""What ``torch.save`` writes, what it wrote before torch 1.6, and what ``pickle.dump`` writes."""

_LEGACY_MAGIC = b"\xfc\x9cF\xf9 j\xa8P\x19"
_EXPORTED = ("archive_format", "serialized_exported_program.json", "models/model.json")
_AFTER_IR_VERSION = (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42")  # fields of ONNX's ModelProto
_EAGER = "pass the eager module that it was made from"
_ARCHITECTURE = "name the architecture they belong to: `se-inject torchvision:resnet50 --weights {path}`"
_OTHER = {
    "empty": ("an empty file", None),
    "torchscript": ("a TorchScript archive, which can't be edited yet", _EAGER),
    "pt2": ("an exported program, which can't be edited yet", _EAGER),
    "onnx": ("an ONNX file, which can't be edited", _EAGER),
    "safetensors": ("a file of weights, without a network", _ARCHITECTURE),
    "state dict": ("a file of weights, without a network", _ARCHITECTURE),
    "archive": ("a zip archive, but none of torch.save", "unpack it and pass the file in it that is meant"),
    "broken archive": ("a zip archive that is truncated or damaged", "copy or download it again"),
    "gzip": ("compressed with gzip", "decompress it first"),
    "tar": ("a tar archive", "unpack it; if torch before 0.2 wrote it, save it again with a later one"),
    "lfs": ("a pointer of Git LFS, not the file itself", "git lfs pull"),
    "html": ("a web page, not a model", "the download went wrong: fetch it again"),
    "text": ("a text file", "of a Python file name what to call: `{path}:callable`"),
    "unknown": ("in no format that torch or safetensors writes", None),
}


def form_of(file: IO[bytes]) -> str:
    """The form of an open file: one of ``PICKLES``, ``safetensors``, or one that ``unreadable`` explains.

    The file is at its beginning before and after.
    """
    head, size = file.read(4096), file.seek(0, 2)
    file.seek(0)
    if head[:2] == b"PK":
        form = _archive(file)
        file.seek(0)
        return form
    if head[:1] == b"\x80" and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        return "legacy" if _LEGACY_MAGIC in head[:32] else "plain"
    if head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size:
        return "safetensors"
    if head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in _AFTER_IR_VERSION:
        return "onnx"
    if head[257:262] == b"ustar":
        return "tar"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return _text(head) if head else "empty"


def unreadable(path: str | PathLike[str], form: str) -> LoadError:
    """The error that says why a file of this form gives no model."""
    what, hint = _OTHER[form]
    return LoadError(f"`{path}` is {what}", hint=hint and hint.format(path=path))


def _archive(file: IO[bytes]) -> str:
    try:
        # What torch.load will see; Python's zipfile could see something else in a crafted file.
        names = torch._C.PyTorchFileReader(file).get_all_records()
    except (RuntimeError, OSError):
        return "archive" if zipfile.is_zipfile(file) else "broken archive"
    if "constants.pkl" in names:
        return "torchscript"
    if any(name in names for name in _EXPORTED):
        return "pt2"
    return "zip" if "data.pkl" in names else "archive"


def _text(head: bytes) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip().lower()
    except UnicodeDecodeError:
        return "unknown"
    if "\0" in text:
        return "unknown"
    if text.startswith("version https://git-lfs"):
        return "lfs"
    return "html" if text.startswith(("<!doctype html", "<html")) else "text"
