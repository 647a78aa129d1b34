"""Capture a network with ``torch.export``, and find what the program assumes about sizes."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch.export import Dim

from se_inject.exporting.dimensions import Free
from se_inject.exporting.reference import Reference

_SHOWN = 3  # conditions that are shown
_SAMPLE = (2, 3, 16, 17, 101, 224, 4096)  # sizes that a condition is tried with


def captured(reference: Reference, free: Free) -> tuple[Any, list[str]]:
    """Capture the network's forward, with the free dimensions in whatever range its branches leave them.

    A named dimension would have to hold at every size from 0 on: on CUDA torch's own operators take batches of up to
    65,535, and a convolution of stride 2 makes 1 of 2.

    Args:
        reference: the network, in eval mode.
        free: the dimensions that the program leaves open.

    Returns:
        the ``ExportedProgram``, and notes on the sizes that it doesn't hold for.

    Raises:
        Exception: whatever `torch.export` raises.
    """
    args, kwargs = reference.call(free)
    shapes = reference.dynamic_shapes(free, lambda _: Dim.DYNAMIC)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined] # no 0 and 1 apart
        program = torch.export.export(reference.model, args, kwargs, dynamic_shapes=shapes, strict=False)
    return program, _notes(program, reference, free)


def _notes(program: Any, reference: Reference, free: Free) -> list[str]:
    """Say which sizes the program doesn't hold for: their ranges, and other conditions on them."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    examples = [
        leaf for leaf in torch.utils._pytree.tree_leaves(reference.arguments()) if isinstance(leaf, torch.Tensor)
    ]
    named: dict[str, tuple[str, Any]] = {}
    notes = []
    for tensor, example in zip(tensors, examples, strict=False):
        for dimension, name in reference.dimensions.names(example, free).items():
            size = tensor.shape[dimension]
            if isinstance(size, torch.SymInt):
                named.setdefault(str(size.node.expr), (name, program.range_constraints.get(size.node.expr)))
    for name, limits in dict.fromkeys(named.values()):
        least, most = (2, None) if limits is None else (_number(limits.lower), _number(limits.upper))
        if least is not None and least > 2:
            notes.append(f"right for a {name} from {least} on: below, the network computes otherwise")
        if most is not None:
            notes.append(f"right for a {name} up to {most}: beyond, the network computes otherwise")
    return notes + _conditions(program, reference, free)


def _conditions(program: Any, reference: Reference, free: Free) -> list[str]:
    """Say what else the sizes must satisfy, in the names of the dimensions."""
    names = {}
    for argument, leaf in reference.arguments().items():
        for dimension, name in reference.dimensions.names(leaf, free).items():
            names[f"L['{argument}'].size()[{dimension}]"] = name
    found = []
    for guard in getattr(program, "_guards_code", None) or ():
        text = re.sub(r"L\['\w+'\]\.size\(\)\[\d+\]", lambda match: names.get(match[0], match[0]), guard)
        involved = [name for name in names.values() if re.search(rf"\b{name}\b", text)]
        if len(set(involved)) == 1 and re.fullmatch(r"[\w ]+<=? \w+|\w+ <=? \w+( and .*)?|\w+ >=? \d+", text):
            continue  # a range, which is reported
        if involved and not _always(text, list(dict.fromkeys(involved))):
            found.append(text)
    more = [f"{len(found) - _SHOWN} more conditions hold"] if len(found) > _SHOWN else []
    return [f"right where {condition}" for condition in [*found[:_SHOWN], *more]]


def _always(condition: str, names: list[str]) -> bool:
    """Tell whether a condition of torch's holds for all sizes of a sample; False if that can't be found out."""
    code = compile(condition, "condition", "eval")
    try:
        return all(
            eval(code, {"__builtins__": {}}, dict(zip(names, sizes, strict=True)))
            for sizes in itertools.product(_SAMPLE, repeat=len(names))
        )
    except Exception:
        return False


def _number(limit: Any) -> int | None:
    """Convert a limit of a range to a number; None for infinity."""
    try:
        number = int(limit)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    return number if number < 2**62 else None
