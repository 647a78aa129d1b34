"""Check the arguments that a file's forward gives to operators of torch's dispatcher: some end the process by a number.

An operator of the dispatcher takes numbers where a type of numbers, a layout or a memory format is meant, and looks none of
them up before it uses them as an index. `tests/fuzz/operators.py` finds such; `tests/fuzz/operators.md` is its result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from se_inject.errors import LoadError, quoted
from se_inject.forwards import all_lines

_ENUMERATED = {
    "ScalarType": frozenset((*range(12), 15)),
    "Layout": frozenset((0,)),
    "MemoryFormat": frozenset(range(4)),
}
"""The numbers that mean something, by the type that a schema declares."""
_BY_NAME = {"dtype": "ScalarType", "layout": "Layout", "memory_format": "MemoryFormat"}


def check_arguments(lines: list[Any]) -> None:
    """Refuse arguments that no program has and that make operators crash.

    Args:
        lines: of a stored forward out of a file.

    Raises:
        LoadError: an operator gets one.
    """
    lines = list(all_lines(lines))
    sources = _sources(lines)
    for kind, *parts in lines:
        if kind == "set" and str(parts[1]).startswith("ops:"):
            _check_call(str(parts[1]), list(parts[2]), dict(parts[3]), sources)


def _check_call(name: str, args: list[Any], kwargs: dict[str, Any], sources: dict[str, bool]) -> None:
    if name == "ops:aten._native_batch_norm_legit.no_stats":
        if (args[3] if len(args) > 3 else kwargs.get("training")) is not True:
            raise LoadError("a program in this file normalises by statistics that it doesn't have")
        return
    if name.startswith("ops:torchvision.roi_align"):
        _check_roi_align(args, kwargs)
    schemas = _schemas(name)
    if schemas and not any("Tensor" in str(schema) for schema in schemas):
        raise LoadError(f"a forward in this file computes numbers with `{name[4:]}`", seen="Python's operators do that")
    places = {place for schema in schemas for place in _enumerated(schema)}
    for position, key, kind in sorted(places, key=str):
        value = kwargs.get(key) if position is None or position >= len(args) else args[position]
        if not _is_one(value, kind, sources):
            raise LoadError(
                f"a forward in this file calls `{name[4:]}` with a `{key}` that is none", seen=quoted(value)
            )
    if ".prim_" in name and not any(isinstance(each, dict) for each in (*args[1:3], *kwargs.values())):
        raise LoadError(f"a forward in this file calls `{name[4:]}` without saying what to convert to")


def _check_roi_align(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Refuse a scale that is none, and sizes beyond any network's. Where the boxes lie is known when it runs, not before."""
    given: dict[str, Any] = {**dict(zip(("input", "rois", *_OF_ROI_ALIGN), args, strict=False)), **kwargs}
    for name, (least, most) in _OF_ROI_ALIGN.items():
        value = given.get(name)
        is_computed = isinstance(value, dict) and "float" not in value
        if not is_computed and not (isinstance(value, int | float) and least <= value <= most):
            raise LoadError(
                f"a forward in this file calls `torchvision.roi_align` with a `{name}` that no network has",
                seen=quoted(value),
            )


_OF_ROI_ALIGN = {
    "spatial_scale": (1e-6, 1e3),
    "pooled_height": (1, 1024),
    "pooled_width": (1, 1024),
    "sampling_ratio": (-1, 64),
}
"""Its numbers, in the order of its schema, and what they may be."""


def _is_one(value: Any, kind: str, sources: dict[str, bool]) -> bool:
    """Return whether a value is, or will be, a type of numbers, a layout or a memory format."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return value in _ENUMERATED[kind]
    if isinstance(value, dict) and "node" in value:
        return sources.get(value["node"], False)
    return True


def _sources(lines: Iterable[Any]) -> dict[str, bool]:
    """Return for each name that is set whether it is always what a tensor says of its numbers or its layout, or a constant."""
    found: dict[str, bool] = {}
    for kind, *parts in lines:
        if kind in ("set", "method", "attribute", "let", "call", "read", "original"):
            said = kind == "attribute" and parts[2] in ("dtype", "layout")
            said |= kind == "let" and isinstance(parts[1], dict) and not {"node", "float"} & parts[1].keys()
            for name in parts[0]:
                found[name] = found.get(name, True) and said
    return found


@functools.cache
def _schemas(name: str) -> tuple[Any, ...]:
    """Return the schemas of an operator, ``ops:aten.to.dtype`` or ``ops:aten.to``; none if it isn't there."""
    found: Any = torch.ops
    for part in name.removeprefix("ops:").split("."):
        found = getattr(found, part, None)
    if isinstance(found, torch._ops.OpOverload):
        return (found._schema,)
    if isinstance(found, torch._ops.OpOverloadPacket):
        return tuple(getattr(found, overload)._schema for overload in found.overloads())  # type: ignore[no-untyped-call]
    return ()


def _enumerated(schema: Any) -> Iterator[tuple[int | None, str, str]]:
    """List the arguments that are a type of numbers, a layout or a memory format: position, name, and which of the three."""
    for position, argument in enumerate(schema.arguments):
        declared = str(argument.real_type).removeprefix("Optional[").rstrip("]").rstrip("?")
        kind = declared if declared in _ENUMERATED else _BY_NAME.get(argument.name)
        if kind is not None:
            yield None if argument.kwarg_only else position, argument.name, kind
