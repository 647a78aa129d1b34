"""TorchScript archives out of a stranger's file.

A TorchScript archive is a program in a small language of its own: it knows tensors, files only through two
operators, and nothing of Python. ``torch.jit.load`` runs the ``__setstate__`` of its classes, and makes tensors of
whatever extent the file claims. So its source text and its tensors are looked at first; what remains is torch's own
reader, in C++.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import IO, Any

import torch

from se_inject._archives import Archive
from se_inject._unpickling import check_script_pickle
from se_inject.errors import LoadError

_FORBIDDEN = frozenset({"save", "load", "from_file", "classes", "__setstate__"})
_NAMESPACES = frozenset({"aten", "prim", "prims", "torchvision", "quantized"})
_FOLDERS = ("code/", "constants/", "data/", "traced_inputs/", "extra/", ".data/")
_FILES = frozenset(
    ["data.pkl", "constants.pkl", "traced_inputs.pkl", "version", "byteorder", ".format_version", ".storage_alignment"]
)


def script_module(file: IO[bytes]) -> tuple[torch.jit.ScriptModule, Callable[[str], Any]]:
    """The module in a TorchScript archive, on the CPU, and its function of a qualified name. None of its code has run.

    Args:
        file: the open file.

    Raises:
        LoadError: it holds what can't be read safely.
        Exception: of any class, from a damaged file.
    """
    archive = Archive(file)
    archive.check()
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)
    names = set(archive.records)
    if names != set(reader.get_all_records()) or len({name.lower() for name in names}) < len(names):
        raise LoadError("an archive that different readers read differently")
    for name in names:
        if not (name.startswith(_FOLDERS) or name in _FILES):
            raise LoadError(f"a TorchScript archive with a `{name[:80]}`")
        if name.endswith(".py"):
            _check_source(name, archive.read(name).decode())
        elif (name in _FILES and name.endswith(".pkl")) or name.endswith(".debug_pkl"):
            check_script_pickle(archive, name)
    file.seek(0)
    unit = torch._C.CompilationUnit()
    found = torch._C.import_ir_module_from_buffer(unit, file.read(), torch.device("cpu"), {}, False)  # type: ignore[call-arg,arg-type]
    return torch.jit._recursive.wrap_cpp_module(found), unit.find_function  # type: ignore[no-untyped-call]


def _check_source(name: str, text: str) -> None:
    """TorchScript's grammar is a part of Python's."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LoadError("a TorchScript archive with source text that is none", seen=name[:80]) from error
    for node in ast.walk(tree):
        word = _word(node)
        if word in _FORBIDDEN:
            raise LoadError(f"a TorchScript archive that uses `{word}`", seen=f"in its {name[:80]}")
        is_operator = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops"
        if is_operator and word not in _NAMESPACES:
            raise LoadError(f"a TorchScript archive that calls an operator of `{word}`", seen=name[:80])


def _word(node: Any) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    return node.id if isinstance(node, ast.Name) else None
