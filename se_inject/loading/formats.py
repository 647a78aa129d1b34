"""Find the format of a file from its bytes, never from its suffix."""

from __future__ import annotations

import codecs
import json
import pickle
import struct
from os import PathLike, fspath
from typing import IO

from se_inject.errors import LoadError, either
from se_inject.loading.zip_archive import Archive

PICKLES = ("zip", "legacy", "plain")
"""What ``torch.save`` writes, what it wrote before torch 1.6, and what ``pickle.dump`` writes."""

PROGRAMS = ("pt2", "torchscript")
"""What ``torch.export.save`` writes, and what ``torch.jit.save`` writes."""

_LEGACY_MAGIC = b"\xfc\x9cF\xf9 j\xa8P\x19"
_EXPORTED = ("archive_format", "serialized_exported_program.json", "models/model.json")
_AFTER_IR_VERSION = (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42")  # fields of ONNX's ModelProto
_LARGEST_HEADER = 8_000_000  # of safetensors, with 60,000 tensors; to Python it may be twenty times as much
_BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"\x89HDF\r\n": "hdf5",
    b"\x93NUMPY": "numpy",
    b"GGUF": "gguf",
    b"%PDF": "pdf",
}
_EAGER = "pass the eager module that it was made from"
_ARCHITECTURE = (
    "name the architecture they belong to: `se-inject {path} --arch torchvision:resnet50`; "
    "a class of your own: `--arch FILE.py:CLASS`",
    "name the architecture they belong to: si.load({path!r}, arch='torchvision:resnet50'); "
    "of a class of your own: si.load_weights_(model, {path!r})",
)
_DECOMPRESS = "decompress it first"
_OTHER = {
    "empty": ("an empty file", None),
    "torchscript": ("a TorchScript archive: a network, and no file of weights", "pass it as MODEL"),
    "pt2": ("an exported program: a network, and no file of weights", "pass it as MODEL"),
    "onnx": ("an ONNX file, which can't be edited: it holds a graph, but no module to train", _EAGER),
    "large header": ("a safetensors file whose header is larger than any network's", None),
    "safetensors": ("a file of weights, without a network", _ARCHITECTURE),
    "state dict": ("a file of weights, without a network", _ARCHITECTURE),
    "adapter": ("an adapter: the weights of injected blocks, without their network", "pass the network as MODEL"),
    "plan": ("a plan, without a network", "pass the network as MODEL, and the plan with --plan"),
    "json": ("a JSON file", "pass the weights or the network that it describes"),
    "numpy": ("a file of NumPy arrays", "load it in Python and save the arrays' network with torch.save"),
    "archive": ("a zip archive, but none of torch.save", "unpack it and pass the file in it that is meant"),
    "broken archive": ("a zip archive that is truncated, damaged or made to mislead", "copy or download it again"),
    "tar": ("a tar archive", "unpack it; if torch before 0.2 wrote it, save it again with a later one"),
    "hdf5": ("an HDF5 file, as Keras and MATLAB write it", "convert the network to PyTorch first"),
    "tflite": ("a TensorFlow Lite file", "convert the network to PyTorch first"),
    "gguf": ("a GGUF file, of weights for llama.cpp", None),
    "pdf": ("a PDF", None),
    "lfs": ("a pointer of Git LFS, not the file itself", "git lfs pull"),
    "sharded": (
        "an index of weights in several files",
        "make one file of them: safetensors.torch.load_file reads each, save_file writes their union",
    ),
    "html": ("a web page or XML, not a model", "the download went wrong: fetch it again"),
    "text": ("a text file", "of a Python file name what to call: `{path}:callable`"),
    "unknown": ("in no format that torch or safetensors writes", None),
    **{name: (f"compressed with {name}", _DECOMPRESS) for name in ("gzip", "bzip2", "xz", "zstd", "7z")},
}


def form_of(file: IO[bytes]) -> str:
    """Identify the form of an open file: one of ``PICKLES``, ``safetensors``, or one that ``unreadable`` explains.

    The file is at its beginning before and after.
    """
    head, size = file.read(4096), file.seek(0, 2)
    file.seek(0)
    if head[:2] == b"PK":
        form = _archive(file) if head[:4] == b"PK\x03\x04" else "broken archive"
        file.seek(0)
        return form
    if head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size:  # the length may begin like a pickle
        if int.from_bytes(head[:8], "little") > _LARGEST_HEADER:
            return "large header"
        return "adapter" if is_adapter(safetensors_metadata(file)) else "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        return "legacy" if _LEGACY_MAGIC in head[:32] else "plain"
    if head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in _AFTER_IR_VERSION:
        return "onnx"
    if head[257:262] == b"ustar":
        return "tar"
    if head[4:8] == b"TFL3":
        return "tflite"
    for beginning, form in _BEGINNINGS.items():
        if head.startswith(beginning):
            return form
    return _text(head) if head else "empty"


def described(form: str) -> str:
    """Describe a file of a form in a few words."""
    return _OTHER[form][0] if form in _OTHER else "a pickle of torch.save or pickle.dump"


def unreadable(path: str | PathLike[str], form: str, seen: str | None = None, hint: str | None = None) -> LoadError:
    """Make the error that explains why a file of this form gives no model.

    Args:
        path: of the file.
        form: what ``form_of`` gave, or ``state dict``.
        seen: what else is known of it.
        hint: a better one than the form's own.
    """
    what, known = _OTHER[form]
    general = either(*known) if isinstance(known, tuple) else known
    if form == "text" and not fspath(path).endswith(".py"):
        general = "a download may have gone wrong: look into it"
    return LoadError(f"`{path}` is {what}", seen=seen, hint=hint or (general and general.format(path=fspath(path))))


def safetensors_metadata(file: IO[bytes]) -> dict[str, str]:
    """Read the texts in a safetensors file's header, if it can be read; the file is at its beginning before and after."""
    (length,) = struct.unpack("<Q", file.read(8))
    try:
        header = json.loads(file.read(length) if length <= _LARGEST_HEADER else b"{}")
    except (ValueError, RecursionError):
        header = {}
    file.seek(0)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def is_adapter(metadata: dict[str, str]) -> bool:
    """Return whether a safetensors file with these texts is an adapter: it holds the plan of what was injected."""
    return any(key.startswith("se_inject") for key in metadata)


def _archive(file: IO[bytes]) -> str:
    try:
        archive = Archive(file)
    except Exception:  # zipfile raises errors of many classes
        return "broken archive"
    if "constants.pkl" in archive:
        return "torchscript"
    if any(name in archive for name in _EXPORTED):
        return "pt2"
    if any(name.endswith(".npy") for name in archive.records):
        return "numpy"
    return "zip" if "data.pkl" in archive else "archive"


def _text(head: bytes) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip().lower()
    except UnicodeDecodeError:
        return "unknown"
    if "\0" in text:
        return "unknown"
    if text.startswith("version https://git-lfs"):
        return "lfs"
    if text.startswith("{"):
        return "plan" if '"se_inject_plan"' in text else "sharded" if '"weight_map"' in text else "json"
    return "html" if text.startswith("<") else "text"
