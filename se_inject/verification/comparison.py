"""Compare a file's outputs with the network's: how the error is measured, and what is allowed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from se_inject.errors import ExportError

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""The relative error allowed; the coarsest type among weights, inputs and outputs decides.

A runtime adds up in another order and folds batch norm into convolutions. Measured in ONNX Runtime with random
weights: in float32 at most 1.3e-6 (ResNets, DenseNet, EfficientNet, ConvNeXt, MobileNet) and 8e-6 (ResNet-50
with blocks that gate strongly); in float16 1.2e-3, about one rounding. Roughly ten times that leaves room for
what was not measured; a wrong operator or weight is off by far more. bfloat16 rounds eight times as coarsely.
"""


class FileCheck(NamedTuple):
    """The largest errors of a file at one batch size, over all outputs.

    The relative error is the largest absolute one over the largest absolute value of that output. For outputs
    of integers or booleans, both are the share of elements that differ.
    """

    batch: int
    max_abs_error: float
    max_rel_error: float
    size: str = ""
    """The spatial size, ``224×224``."""


class Rejected(Exception):
    """A file that is not right; the message says how."""


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """List the tensors in an output of any structure, each with a name made of keys, fields and positions."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Tensor):
        yield name or "output", value
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, (list, tuple)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    else:  # another container that torch knows, or nothing with tensors
        items = [(i, leaf) for i, leaf in enumerate(pytree.tree_leaves(value)) if isinstance(leaf, Tensor)]
    for key, item in items:
        prefix = name or ("output" if isinstance(key, int) else "")
        yield from tensors(item, f"{prefix}_{key}" if prefix else str(key))


def difference(got: Iterable[tuple[str, Tensor]], want: Iterable[tuple[str, Tensor]]) -> tuple[float, float]:
    """Compute the largest absolute and the largest relative error over all outputs; see `FileCheck`."""
    ours = [tensor.detach().cpu() for _, tensor in got]
    theirs = [tensor.detach().cpu() for _, tensor in want]
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (ours, theirs)]
        raise Rejected(f"outputs of shapes {shapes[0]}, the network's are {shapes[1]}")
    worst = [(0.0, 0.0)]
    for a, b in zip(ours, theirs, strict=True):
        if not (b.is_floating_point() or b.is_complex()):
            worst.append(((a != b).double().mean().item(),) * 2 if b.numel() else (0.0, 0.0))
            continue
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            worst.append((float("inf"), float("inf")))
        elif finite.any():
            wide = torch.promote_types(b.dtype, torch.float64)
            error = (a.to(wide) - b.to(wide))[finite].abs().max().item()
            worst.append((error, error / (b[finite].abs().max().item() or 1.0)))
    return max(absolute for absolute, _ in worst), max(relative for _, relative in worst)


_SCHEMA = re.compile(r"\S+\(.*\) -> .*:")  # torch.jit prints the function's signature before what is wrong


def reason(error: BaseException) -> str:
    """Choose the most informative line of an exception: of its root cause, without colours and advice."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not _SCHEMA.fullmatch(line)] or [""]
    if lines[0].startswith("Constraints violated"):  # torch.export: what was violated comes after
        lines = [line.removeprefix("- ") for line in lines if line.startswith("- ")] or lines
    line = lines[0] if isinstance(error, (Rejected, ExportError)) else f"{type(error).__name__}: {lines[0]}"
    return line.rstrip(": ")[:200]


def same_value(one: Any, other: Any) -> bool:
    """Return whether two entries of a state dict are the same: type, shape, device and numbers."""
    if isinstance(one, tuple | list) and type(one) is type(other) and len(one) == len(other):
        return all(map(same_value, one, other))
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    return one.dtype == other.dtype and one.device == other.device and same_numbers(one, other)


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers at the same places, NaN counted as one."""
    if one.shape != other.shape:
        return False
    try:
        return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
    except NotImplementedError:  # of 8 bits, or complex ones of 32: torch stores them, and compares none
        return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds finite numbers alone."""
    try:
        return bool(tensor.sum().isfinite() or tensor.isfinite().all())  # a sum is soon made
    except NotImplementedError:
        return bool(tensor.float().isfinite().all())


class Unlike:
    """Stands for two containers with other keys, or of other lengths."""


def parts_of(value: Any) -> dict[Any, Any] | None:
    """List the contents of a container of any class, by key, position or attribute; None for any other value."""
    if isinstance(value, dict):
        return dict(dict.items(value))
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, Tensor | type | torch.nn.Module) or callable(value):
        return None
    return getattr(value, "__dict__", None)


def pairs_in(one: Any, other: Any, seen: frozenset[int] = frozenset()) -> Iterator[tuple[Any, Any]]:
    """Pair the leaves of two values; where their structures differ, return the difference, and nothing beyond."""
    parts, others = parts_of(one), parts_of(other)
    if parts is None or others is None or type(one) is not type(other) or id(one) in seen:
        if id(one) not in seen:
            yield one, other
    elif parts.keys() != others.keys() or (isinstance(one, dict) and list(parts) != list(others)):
        yield Unlike(), Unlike()
    else:
        for key, part in parts.items():
            yield from pairs_in(part, others[key], seen | {id(one)})


def tensors_in(value: Any) -> list[Tensor]:
    """Find every tensor in a value, in containers of any class, at any depth."""
    return [leaf for leaf, _ in pairs_in(value, value) if isinstance(leaf, Tensor)]
