"""Trace each dimension of a value back to the dimensions that it was made from: of a convolution's output, of a linear layer's, of a module's input.

A reshape divides dimensions and puts them together; the parts are followed one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from se_inject.sites.operations import path_of, returned
from se_inject.sites.roles import Roles, lays_out
from se_inject.tracing import Trace, einsum_terms, function_name_of, is_data, kind, numbers_of

_LINEAR = ("linear", "addmm", "mm")
REORDERING = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})
_REDUCING = frozenset({"sum", "mean", "amax", "amin", "select", "getitem", "logsumexp", "prod"})
_RANK = re.compile(r"[123](?=[dD])")
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


class Origin(NamedTuple):
    """Where a dimension, or a part of it, comes from.

    Args:
        what: ``channels``, ``batch`` or ``positions`` of the output of a convolution or linear layer, ``examples``: the batch
            within a convolution's channels, ``input``: of what the module is given, or ``mixed``: a reshape cuts a
            dimension unevenly.
        axis: of a dimension of an input, its number.
        value: of a dimension of an input, the ``id`` of that tensor.
        is_part: the dimension was divided on the way, and this is one of the parts.
        is_slowest: this part holds the slowest index of the dimension that was divided.
    """

    what: str
    axis: int = 0
    value: int = 0
    is_part: bool = False
    is_slowest: bool = True

    @property
    def is_channels(self) -> bool:
        """Whether it is channels; dimension 1 of an input is taken for them."""
        return self.what == "channels" or (self.what == "input" and self.axis == 1)

    @property
    def is_batch(self) -> bool:
        """Whether it is the batch, as a whole or by the slowest index; dimension 0 of an input is taken for it."""
        whole = self.what == "batch" or (self.what == "input" and self.axis == 0)
        return (self.is_slowest and whole) or (self.what == "examples" and not self.is_part)


Origins = frozenset[Origin]
MIXED = Origin("mixed")


class Axes:
    """The origins of dimensions in one observed call.

    Args:
        trace: the call.
        roles: of its modules.
    """

    def __init__(self, trace: Trace, roles: Roles) -> None:
        self.trace = trace
        self.roles = roles
        self._known: dict[tuple[fx.Node, int], Origins | None] = {}

    def of(self, node: fx.Node, axis: int) -> Origins | None:
        """Return the origins of a dimension of a value: none for a new one of size 1, None if they aren't known."""
        key = (node, axis)
        if key not in self._known:
            self._known[key] = None  # while it is looked for
            self._known[key] = self._found(node, axis)
        return self._known[key]

    def _found(self, node: fx.Node, axis: int) -> Origins | None:
        tensor = node.meta.get("val")
        if node.op == "placeholder":
            return frozenset({Origin("input", axis, id(tensor))})
        if kind(node) in ("conv", "pool"):
            return self._of_convolution(node, axis)
        data = [source for source in numbers_of(node) if is_data(source)]
        divided = _divided(node) if not data else None
        if divided is not None:
            return self.of(divided, axis)
        if not isinstance(tensor, Tensor) or not data:
            return None
        name, source = function_name_of(node), max(data, key=lambda each: each.meta["val"].numel())
        before = source.meta["val"]
        inner = self.trace.graphs.get(path_of(node)) if kind(node) == "module" else None
        result = returned(inner.graph) if inner is not None else None
        keeps_form = before.shape == tensor.shape and self.roles.of(node) in ("norm", "act")
        if result is not None and not keeps_form:
            return self._outside(self.of(result, axis), data, source)
        if inner is None and (
            (node.op == "call_module" and isinstance(node.meta["module"], nn.Linear)) or name in _LINEAR
        ):
            last = tensor.dim() - 1
            return frozenset({Origin("channels" if axis == last else "batch" if axis == 0 else "positions")})
        if name == "stack":
            return self._of_stack(node, source, axis)
        if name == "einsum":
            return self._of_einsum(node, axis)
        if lays_out(node) and name not in REORDERING:
            return self._reshaped(source, tensor.shape, axis)
        if name in REORDERING or _is_transposed(node) or (name in _REDUCING and before.dim() != tensor.dim()):
            order = permutation(node)
            if order is None:
                return frozenset({MIXED}) if axis == 1 else None
            return frozenset() if order[axis] is None else self.of(source, order[axis] or 0)
        if before.dim() != tensor.dim() and (axis != 1 or before.shape[1:2] != tensor.shape[1:2]):
            return frozenset({Origin("channels")}) if axis == 1 and tensor.dim() > 3 else None
        return self.of(source, axis)

    def _of_convolution(self, node: fx.Node, axis: int) -> Origins:
        """Return the origin of a dimension of a convolution's or pooling's output.

        Where its weights are made from the input, each example may have its own: the batch is with the channels then.
        """
        channels = node.meta["val"].dim() - 1 - _rank(node)
        if axis != channels:
            return frozenset({Origin("batch" if axis < channels else "positions")})
        read = numbers_of(node)
        if kind(node) == "conv" and node.op != "call_module" and len(read) > 1 and is_data(read[1]):
            before = self.of(read[0], channels) or ()
            if any(origin.is_batch for origin in before):
                return frozenset({Origin("channels"), Origin("examples")})
        return frozenset({Origin("channels")})

    def _outside(self, found: Origins | None, data: list[fx.Node], source: fx.Node) -> Origins | None:
        """Return what the origins in a module's graph are in its caller's."""
        if found is None:
            return None
        given = {id(each.meta["val"]): each for each in data}
        result: set[Origin] = set()
        for origin in found:
            if origin.what != "input":
                result.add(origin)
                continue
            outer = self.of(given.get(origin.value, source), origin.axis)
            if outer is None:
                return None
            result.update(_part(each, origin.is_part, origin.is_slowest) for each in outer)
        return frozenset(result)

    def _reshaped(self, source: fx.Node, after: torch.Size, axis: int) -> Origins | None:
        """Return the origins of a dimension behind a reshape: those of every dimension that has a part in it."""
        parts = parts_of_reshape(source.meta["val"].shape, after)[axis]
        if parts is None:
            return frozenset({MIXED})
        known = [(self.of(source, part.axis), part) for part in parts]
        found = [_part(each, part.is_part, part.is_slowest) for origins, part in known for each in origins or ()]
        return frozenset(found) if found or not parts else None

    def _of_stack(self, node: fx.Node, source: fx.Node, axis: int) -> Origins | None:
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(dim, int):
            return None
        dim %= node.meta["val"].dim()
        return frozenset({Origin("positions")}) if axis == dim else self.of(source, axis - (axis > dim))

    def _of_einsum(self, node: fx.Node, axis: int) -> Origins | None:
        terms, result, operands = einsum_terms(node)
        if not terms or "." in "".join(terms) or axis >= len(result):
            return None
        holding = [(operand, term) for term, operand in zip(terms, operands, strict=True) if result[axis] in term]
        holding = [(operand, term) for operand, term in holding if is_data(operand)]
        if not holding:
            return None
        operand, term = max(holding, key=lambda pair: pair[0].meta["val"].numel())
        return self.of(operand, term.index(result[axis]))


def _rank(node: fx.Node) -> int:
    """Return the number of spatial dimensions of a convolution or pooling; a value without a batch has one dimension less."""
    size = getattr(node.meta.get("module"), "kernel_size", None)
    if isinstance(size, tuple):
        return len(size)
    name = node.meta["class"].__name__ if "class" in node.meta else function_name_of(node)
    found = _RANK.search(name)
    return int(found[0]) if found else int(node.meta["val"].dim()) - 2


def _part(origin: Origin, is_part: bool, is_slowest: bool) -> Origin:
    return origin._replace(is_part=origin.is_part or is_part, is_slowest=origin.is_slowest and is_slowest)


class Part(NamedTuple):
    """A dimension before a reshape, as a whole or in part.

    Args:
        axis: its number.
        is_part: whether it was divided.
        is_slowest: whether this holds its slowest index.
    """

    axis: int
    is_part: bool
    is_slowest: bool


def parts_of_reshape(before: Iterable[int], after: Iterable[int]) -> list[list[Part] | None]:
    """Return for each dimension behind a reshape the dimensions before it that it is made of, the slowest first.

    A dimension of size 1 is made of one of size 1 that stood at the same place, the first of the first. None where a dimension before was cut at
    a number that does not divide it: it and its neighbours are mixed.
    """
    old, new = _spans(before), _spans(after)
    found: list[list[Part] | None] = []
    for number, span in enumerate(new):
        if span[0] == span[1]:
            alike = [Part(axis, False, True) for axis, other in enumerate(old) if other == span]
            earlier = new[:number].count(span)
            found.append(alike[earlier : earlier + 1])
        else:
            found.append(_parts(old, span))
    return found


def _parts(old: list[tuple[int, int]], new: tuple[int, int]) -> list[Part] | None:
    """Return the dimensions whose indices make up that of a new one; None if one is cut unevenly."""
    parts: list[Part] = []
    for axis, (start, end) in enumerate(old):
        first, last = max(new[0], start), min(new[1], end)
        if first >= last or start == end:
            continue
        if last % first or first % start or end % last:
            return None
        parts.append(Part(axis, (first, last) != (start, end), last == end))
    return parts


def kept_axes(before: Iterable[int], after: Iterable[int]) -> dict[int, int]:
    """Return which dimensions a reshape leaves as they are: the new number of each → the old one."""
    parts = enumerate(parts_of_reshape(before, after))
    return {axis: found[0].axis for axis, found in parts if found and len(found) == 1 and not found[0].is_part}


def _spans(shape: Iterable[int]) -> list[tuple[int, int]]:
    """Return for each dimension the stride of its own index, and that of the next slower one."""
    spans, stride = [], 1
    for size in reversed(list(shape)):
        spans.append((stride, stride * size))
        stride *= size
    return spans[::-1]


def permutation(node: fx.Node) -> tuple[int | None, ...] | None:
    """Return which old dimension each new one is, for an operation that reorders, adds or removes dimensions.

    None within it: a new dimension of size 1. None as a whole: it can't be determined.
    """
    args = [_indices(arg.meta.get("val") if isinstance(arg, fx.Node) else arg) for arg in node.args[1:]]
    before = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
    if not isinstance(before, Tensor) or before.dim() > len(_PRIMES):
        return None
    sizes = _PRIMES[: before.dim()]
    try:
        x = torch.empty(sizes, device="meta")
        target: Any = getattr(x, node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
        found = target(*args, **node.kwargs) if node.op == "call_method" else target(x, *args, **node.kwargs)
        return tuple(sizes.index(size) if size > 1 else None for size in found.shape)
    except Exception:  # dimensions that are given in a form of their own
        return None


def _indices(argument: Any) -> Any:
    """Return an index with its slices made whole: they leave the order of dimensions as it is."""
    if isinstance(argument, slice):
        return slice(None)
    return tuple(map(_indices, argument)) if isinstance(argument, tuple) else argument


def _divided(node: fx.Node) -> fx.Node | None:
    """Return the value that a node is a part of, if it was divided by ``split`` or ``chunk``."""
    whole = node.all_input_nodes[0] if function_name_of(node) == "getitem" and node.all_input_nodes else None
    if whole is None or function_name_of(whole) not in ("split", "chunk", "tensor_split", "split_with_sizes"):
        return None
    data = [source for source in whole.all_input_nodes if is_data(source)]
    return data[0] if len(data) == 1 and data[0].meta["val"].dim() == node.meta["val"].dim() else None


def _is_transposed(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("T", "mT", "H", "mH")
