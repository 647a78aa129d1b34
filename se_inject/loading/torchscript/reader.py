"""Read a TorchScript archive after checking every part that torch's own reader would trust.

A TorchScript archive is a program in a small language of its own: it knows tensors, files only through two
operators, and nothing of Python. ``torch.jit.load`` runs the ``__setstate__`` of its classes, and makes tensors of
whatever extent the file claims. So its source text and its tensors are looked at first. What was looked at is copied
into an archive in memory, and that is what torch's own reader, in C++, gets to see. Then the compiled graphs are
looked at too: what a name in the source text means is for torch to say.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import torch

from se_inject.errors import LoadError
from se_inject.loading.operators import is_allowed_instruction, trust_hint
from se_inject.loading.pickles.module_checks import MOST_PATHS
from se_inject.loading.torchscript.pickles import check_script_pickles
from se_inject.loading.torchscript.source import FORBIDDEN, SOURCE, checked_sources
from se_inject.loading.zip_archive import Archive

_FOLDERS = ("code/", "constants/", "data/", "traced_inputs/", "extra/", ".data/")
_FILES = frozenset(
    ["data.pkl", "constants.pkl", "traced_inputs.pkl", "version", "byteorder", ".format_version", ".storage_alignment"]
)
_READ = re.compile(rf"({SOURCE.pattern}|(data|constants)(\.pkl|/.*)|(\.data/)?version|byteorder)", re.DOTALL)
"""The records that make the module; others are for people who look for errors in it."""

_CASTS = ("prim::unchecked_cast", "prim::unchecked_unwrap_optional")
_PRINTING = ("prim::Print", "aten::warn")
_PICKLES = ("data.pkl", "constants.pkl")


def script_module(file: IO[bytes], trust: Sequence[str] = ()) -> tuple[torch.jit.ScriptModule, Callable[[str], Any]]:
    """Read the module in a TorchScript archive, on the CPU, and its function of a qualified name. None of its code has run.

    Args:
        file: the open file.
        trust: namespaces of operators that it may call besides those on the list.

    Raises:
        LoadError: it holds what can't be read safely.
        Exception: of any class, from a damaged file.
    """
    unit = torch._C.CompilationUnit()
    with _in_memory() as (copy, load):
        _copy_checked(file, copy, trust)
        found = load(unit)
    _check_graphs(found, unit, trust)
    return torch.jit._recursive.wrap_cpp_module(found), unit.find_function  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _in_memory() -> Iterator[tuple[IO[bytes], Callable[[Any], Any]]]:
    """Make a file that nobody else can open, to write to, and a function that makes a module of it.

    Of bytes torch makes three copies; where memory can have a path, it makes none. In a confined process there is no such
    memory, and it is a file of the folder that only this process may use.
    """
    options: Any = (torch.device("cpu"), {}, False)
    if not os.path.isdir("/proc/self/fd"):
        stream = io.BytesIO()
        yield stream, lambda unit: torch._C.import_ir_module_from_buffer(unit, stream.getvalue(), *options)  # type: ignore[call-arg,arg-type]
        return
    try:
        opened: Any = open(os.memfd_create("se_inject"), "w+b", buffering=0)  # noqa: SIM115
    except (AttributeError, PermissionError):
        opened = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    with opened as file:
        path = f"/proc/self/fd/{file.fileno()}"
        yield file, lambda unit: torch._C.import_ir_module(unit, path, *options)  # type: ignore[call-arg]


def _copy_checked(file: IO[bytes], to: IO[bytes], trust: Sequence[str]) -> None:
    archive = Archive(file)
    archive.check()
    names = set(archive.records)
    unread = next(
        (name for name in names if name.startswith("code/") and name.endswith(".py") and not SOURCE.fullmatch(name)), ""
    )
    if unread:  # torch makes the record's name of a class's, never the other way round
        raise LoadError("a TorchScript archive with source text in a record of another name", seen=unread[:80])
    for name in names:
        if not (name.startswith(_FOLDERS) or name in _FILES):
            raise LoadError(f"a TorchScript archive with a `{name[:80]}`")
    archive.copy(filter(_READ.fullmatch, archive.records), to)
    copy = Archive(to)  # somebody may be writing to the file; nobody can write to this
    check_script_pickles(copy, _PICKLES, checked_sources(copy, trust))


def operators_of(module: Any) -> set[str]:
    """List every operator that a module's methods call themselves, as ``aten::relu``; it isn't run."""
    return {node.kind() for graph in _graphs(module._c) for node in _nodes(graph)}


def _graphs(module: Any, unit: Any = None) -> list[Any]:
    """Return the graphs of a module's methods, and of an archive's functions."""
    modules, paths = [module], 0
    kinds = {}
    while modules:
        part = modules.pop()
        paths += 1
        if paths > MOST_PATHS:
            raise LoadError("a TorchScript archive of modules within modules without end")
        kinds[part._type().qualified_name()] = part
        modules += [child for _, child in torch._C.ModuleDict(part).items()]
    found = [part._get_method(name).graph for part in kinds.values() for name in part._method_names()]
    return found + ([function.graph for function in unit.get_functions()] if unit is not None else [])


def _nodes(graph: Any) -> Iterator[Any]:
    """Iterate over all nodes of a graph, and of the blocks in it."""
    todo = [graph]
    while todo:
        for node in todo.pop().nodes():
            yield node
            todo += node.blocks()


def _check_graphs(module: Any, unit: Any, trust: Sequence[str]) -> None:
    """Look at every operator that the module may call; take out what writes to the terminal. Nothing has been run."""
    for graph in _graphs(module, unit):
        printing = []
        for node in _nodes(graph):
            kind = node.kind()
            space, _, name = kind.partition("::")
            if name in FORBIDDEN or not (is_allowed_instruction(kind) or space in trust):
                raise LoadError(
                    f"a TorchScript archive that calls `{kind}`",
                    seen="it is not on the list of operators",
                    hint=None if name in FORBIDDEN else trust_hint(space),
                )
            if kind in _CASTS:
                _check_cast(node)
            if kind in _PRINTING:
                printing.append(node)
        for node in printing:
            node.destroy()


def _check_cast(node: Any) -> None:
    """Check a cast to a narrower type, which the interpreter believes without a check.

    It looks at each value whether it is a number, text, a tensor, an object, a tuple, a list or a dict when that is used, and no
    further: an object of another class, or a tuple of other parts, it would read as if it were the one.
    """
    given, made = node.input().type(), node.output().type()
    if given.kind() == "OptionalType" and given.getElementType().annotation_str == made.annotation_str:
        return
    parts = given.containedTypes() if given.kind() == "UnionType" else []
    is_part = any(part.annotation_str == made.annotation_str for part in parts)
    is_only_one = [_as_looked_at(part) for part in parts].count(_as_looked_at(made)) == 1
    if given.annotation_str != made.annotation_str and not (is_part and (is_only_one or _is_plain(made))):
        raise LoadError(
            "a TorchScript archive with an unchecked cast",
            seen=f"from {given.annotation_str[:80]} to {made.annotation_str[:80]}",
        )


_PLAIN = frozenset(("TensorType", "IntType", "FloatType", "BoolType", "StringType", "NumberType", "ComplexType"))


def _as_looked_at(kind: Any) -> str:
    """Return what the interpreter tells this type from others by."""
    return "ClassType" if kind.kind() == "InterfaceType" else str(kind.kind())


def _is_plain(kind: Any) -> bool:
    """Return whether the interpreter looks at every value within one of this type before it reads it."""
    is_container = kind.kind() in ("ListType", "DictType", "OptionalType")
    return kind.kind() in _PLAIN or (is_container and all(map(_is_plain, kind.containedTypes())))
