"""Say what a file is and list everything that it names, before anybody trusts it: no object of it is made."""

from __future__ import annotations

import ast
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from se_inject.errors import InjectError, LoadError, either, printable
from se_inject.forwards import is_code, is_trusted
from se_inject.loading.formats import PICKLES, PROGRAMS, described, form_of, safetensors_metadata
from se_inject.loading.opened import opened
from se_inject.loading.operators import (
    blocks_in_text,
    is_allowed_attribute,
    is_allowed_function,
    is_allowed_instruction,
    is_allowed_method,
    named_in_text,
)
from se_inject.loading.pickles.allowlist import may_be_called, who_allows, within
from se_inject.loading.pickles.names import every_name, names_in
from se_inject.loading.torchscript.source import parsed_source
from se_inject.loading.zip_archive import Archive
from se_inject.user_code import fact

_LONGEST = 100
_MOST_NAMES = 5_000
_MOST_OF_A_PLAN = 4 << 20
_DOORS = {
    "safetensors": "weights alone: tensors by name, read by the safetensors library; it can name no code",
    "adapter": "the weights of injected blocks, and a plan: text that names blocks and options",
    "plan": "text that names blocks and options; no code",
    "onnx": "a graph that se-inject does not read",
}


@dataclass(frozen=True)
class Named:
    """One thing that a file names.

    Attributes:
        name: as the file has it.
        kind: ``class``, ``function``, ``operator``, ``method``, ``attribute``, ``block`` or ``record``.
        use: what the file would do with it: ``made``, ``called``, ``referred``.
        verdict: ``allowed``, ``trusted`` or ``refused``.
        by: which rule says so.
        count: how often.
    """

    name: str
    kind: str
    use: str
    verdict: str
    by: str
    count: int = 1


@dataclass(frozen=True)
class Inspection:
    """What a file is, and everything that it names. Nothing of it was made, called or imported to find out.

    Attributes:
        path: of the file.
        form: a word for its form: ``zip``, ``legacy``, ``plain``, ``torchscript``, ``pt2``, ``safetensors``, …
        what: its form in a few words.
        size: in bytes.
        names: everything that it names, refused first.
        notes: what else there is to know; sentences.
        damaged: why it could not be looked through; None if it could.
    """

    path: str
    form: str
    what: str
    size: int
    names: tuple[Named, ...]
    notes: tuple[str, ...]
    damaged: str | None = None

    @property
    def refused(self) -> tuple[Named, ...]:
        """The reason why ``load`` can't read the file."""
        return tuple(named for named in self.names if named.verdict == "refused")

    def data(self) -> dict[str, Any]:
        """Return the same as plain data, for JSON."""
        return {
            "path": self.path,
            "form": self.form,
            "what": self.what,
            "bytes": self.size,
            "damaged": self.damaged,
            "notes": list(self.notes),
            "names": [dict(vars(named)) for named in self.names],
        }

    def __str__(self) -> str:
        """Format a heading, the notes, and a line for each name."""
        lines = [f"{printable(self.path)}: {self.what}, {self.size:,} bytes"]
        lines += [f"  damaged: {self.damaged}"] if self.damaged else []
        lines += [f"  {note}" for note in self.notes]
        width = min(60, max((len(named.name) for named in self.names), default=0))
        for named in self.names:
            times = f" ×{named.count}" if named.count > 1 else ""
            lines.append(f"  {named.verdict:8} {named.name:{width}} {named.kind}, {named.use}{times}: {named.by}")
        if self.form in (*PICKLES, *PROGRAMS) and not self.damaged:
            counts = Counter(named.verdict for named in self.names)
            lines.append(
                "  " + ", ".join(f"{counts[word]} {word}" for word in ("refused", "trusted", "allowed") if counts[word])
            )
        return "\n".join(lines)


def inspect_file(path: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> Inspection:
    """Look through a file and list what it names, without making, calling or importing anything that it brings.

    It reads the names alone: that all of them are allowed doesn't say that the file is sound, ``load`` looks at more.

    Args:
        path: of the file, in any format.
        trust: packages that would be trusted: their names are marked so. They are not imported.

    Raises:
        NoSuchFile: nothing is there.
        LoadError: a directory, a device or a pipe is there, or the file can't be opened.
    """
    path, trust = Path(path), [trust] if isinstance(trust, str) else list(trust)
    with opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        form = form_of(file)
        damaged, names, notes = None, [], []
        try:
            names = list(_names(file, form, trust))
            notes = list(_notes(file, form))
        except Exception as error:
            damaged = error.message if isinstance(error, InjectError) else fact(error)
    order = {"refused": 0, "trusted": 1, "allowed": 2}
    names.sort(key=lambda named: (order[named.verdict], named.kind, named.name))
    if len(names) > _MOST_NAMES:
        notes.append(f"it has {len(names):,} names, of which the first {_MOST_NAMES:,} are listed")
    what = described(form).removeprefix("a file of ") if form == "state dict" else described(form)
    return Inspection(os.fspath(path), form, what, size, tuple(names[:_MOST_NAMES]), tuple(notes), damaged)


def _names(file: IO[bytes], form: str, trust: Sequence[str]) -> Iterator[Named]:
    if form in PICKLES:
        yield from _in_a_pickle(file, form, trust)
    elif form == "torchscript":
        yield from _in_a_script(Archive(file))
    elif form == "pt2":
        yield from _in_a_program(Archive(file))
    elif form in ("plan", "adapter"):
        yield from _in_a_plan(file, form)


def _notes(file: IO[bytes], form: str) -> Iterator[str]:
    if form in _DOORS:
        yield _DOORS[form]
    if form in PICKLES:
        yield "a pickle: a program for a small machine; se-inject reads it with a reader of its own that calls only what is listed as allowed"
    if form == "torchscript":
        yield "a program in TorchScript's language, which can't reach Python; torch's reader gets it after these checks"
    if form == "pt2":
        from se_inject.loading.exported.reader import torch_version

        yield f"a program of torch.export, written by torch {torch_version(file)}; torch.export.load would run more of it than this reader does"


def _shown(name: str) -> str:
    return printable(name, _LONGEST)


# -- pickles -----------------------------------------------------------------------------------------------


def _in_a_pickle(file: IO[bytes], form: str, trust: Sequence[str]) -> Iterator[Named]:
    names = names_in(file, form)
    for full, use, count in every_name(names):
        module, _, short = full.rpartition(".")
        verdict, kind, by = _judged(module, short, use, trust)
        yield Named(_shown(full), kind, use, verdict, by, count)
    stored = Counter(found for text in names.texts for found in named_in_text(text))
    for (kind, name), count in stored.items():
        allows = {"function": is_allowed_function, "method": is_allowed_method, "attribute": is_allowed_attribute}[kind]
        yield _operator(str(name), "operator" if kind == "function" else kind, allows(name), count)
    yield from _blocks(Counter(block for text in names.texts for block in blocks_in_text(text)), trust)


def _judged(module: str, short: str, use: str, trust: Sequence[str]) -> tuple[str, str, str]:
    if within(module, trust):
        return (
            "trusted",
            "class" if short[:1].isupper() else "function",
            f"its package was named {either('with --trust', 'as `trust`')}",
        )
    kind, by = who_allows(module, short)
    if by is None:
        return (
            "refused",
            kind,
            "on no list: not a network class of torch, torchvision, timm or se-inject, nor plain data",
        )
    if use == "called" and not may_be_called(f"{module}.{short}") and not by.startswith("a tensor's"):
        return "refused", kind, "networks are made empty and given their state; a file may not call them"
    return "allowed", kind, by


def _operator(name: str, kind: str, allowed: bool, count: int) -> Named:
    by = "on the list of operators" if allowed else "not on the list of operators"
    return Named(_shown(name), kind, "called", "allowed" if allowed else "refused", by, count)


# -- programs ----------------------------------------------------------------------------------------------


def _in_a_script(archive: Archive) -> Iterator[Named]:
    found: Counter[str] = Counter()
    for name in archive.records:
        if name.startswith("code/") and name.endswith(".py"):
            try:
                tree = parsed_source(name, archive)
            except LoadError as error:
                yield Named(_shown(name), "record", "referred", "refused", error.message)
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    yield Named(
                        _shown(name[5:-3].replace("/", ".") + "." + node.name),
                        "class",
                        "made",
                        "allowed",
                        "the archive's own",
                    )
            found.update(_operators_in(tree))
    for operator, count in found.items():
        yield _operator(operator, "operator", is_allowed_instruction(operator), count)


def _operators_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            text = ast.unparse(node.func)
            if match := re.fullmatch(r"torch\.(\w+)", text):
                yield f"aten::{match[1]}"
            elif match := re.fullmatch(r"ops\.(\w+)\.(\w+)", text):
                yield f"{match[1]}::{match[2]}"


def _in_a_program(archive: Archive) -> Iterator[Named]:
    for record in archive.records:
        if record.startswith("data/aotinductor/"):
            yield Named(_shown(record), "record", "referred", "refused", "compiled code, which can't be checked")
    found: Counter[str] = Counter()
    from se_inject.loading.exported.reader import bounded_json

    for record in (record for record in archive.records if record.startswith("models/")):
        try:
            todo: list[Any] = [bounded_json(archive, record)]
        except LoadError as error:
            yield Named(_shown(record), "record", "referred", "refused", error.message)
            continue
        while todo:
            part = todo.pop()
            if isinstance(part, list):
                todo += part
            elif isinstance(part, dict):
                todo += part.values()
                found.update(str(part[key]) for key in ("target", "as_operator") if isinstance(part.get(key), str))
    for target, count in found.items():
        yield _operator(target, "operator", _allows_target(target), count)


def _allows_target(target: str) -> bool:
    from se_inject.loading.exported.reader import is_allowed_target

    return is_allowed_target(target)


# -- plans -------------------------------------------------------------------------------------------------


def _in_a_plan(file: IO[bytes], form: str) -> Iterator[Named]:
    file.seek(0)
    is_adapter = form == "adapter"
    texts = (
        list(safetensors_metadata(file).values()) if is_adapter else [file.read(_MOST_OF_A_PLAN).decode("utf-8-sig")]
    )
    blocks: Counter[str] = Counter()
    for text in texts:
        todo: list[Any] = [json.loads(text)]
        while todo:
            part = todo.pop()
            if isinstance(part, dict):
                todo += part.values()
                if isinstance(part.get("block"), str):
                    blocks[part["block"]] += 1
            elif isinstance(part, list):
                todo += part
    yield from _blocks(blocks, ())


def _blocks(blocks: Counter[str], trust: Sequence[str]) -> Iterator[Named]:
    for block, count in blocks.items():
        verdict, by = "allowed", "a block's name, looked up among those installed"
        if is_code(block):
            verdict, by = "refused", f"the user's own code: needs {either('--trust', '`trust`')}"
            if is_trusted(block, trust):
                verdict, by = "trusted", f"its package was named {either('with --trust', 'as `trust`')}"
        yield Named(_shown(block), "block", "made", verdict, by, count)
