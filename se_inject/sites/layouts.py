"""Which dimension of a value is its channels, and where on its way it was of the form (N, C, …) if it isn't.

Networks of tokens keep values as (N, L, C), (L, N, C) or (N, H, W, C), and lay them out as (N, C, …) for a convolution alone.
A block of theirs stands there: behind the branch's last convolution, its normalisation and activation.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from se_inject.sites.operations import path_of, returned
from se_inject.sites.roles import Roles, lays_out
from se_inject.tracing import OwnerGraph, Trace, function_name_of, gate_and_gated, is_data, kind

_LINEAR = ("linear", "addmm", "mm")
_PERMUTATIONS = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


class Spot(NamedTuple):
    """A value, and the graph in which it is computed."""

    owner: OwnerGraph
    value: fx.Node


class Layouts:
    """The forms of the values of one observed call.

    Args:
        trace: the call.
        roles: of its modules.
    """

    def __init__(self, trace: Trace, roles: Roles) -> None:
        self.trace = trace
        self.roles = roles
        self._known: dict[fx.Node, str | None] = {}

    def misread(self, value: fx.Node) -> str | None:
        """Explain why dimension 1 of a value isn't its channels; None if it is, as far as the path back to a convolution shows."""
        if value not in self._known:
            found = self._channels_at(value, 1)
            fits = found is None or found is True or (not isinstance(found, bool) and found == 1)
            shape = tuple(value.meta["val"].shape) if isinstance(value.meta.get("val"), Tensor) else ()
            reason = f"its value is not of the form (N, C, …): its channels are not dimension 1 of {shape}"
            self._known[value] = None if fits else reason
        return self._known[value]

    def channels_first(self, owner: OwnerGraph, value: fx.Node) -> Spot:
        """Find the last value of the form (N, C, …) on the way to one that isn't; itself if there is none.

        Goes back over what lays out, drops, scales, normalises, activates or projects, into modules and out of them, as far
        as the last convolution.
        """
        tensor = value.meta.get("val")
        if not isinstance(tensor, Tensor) or self.misread(value) is None:
            return Spot(owner, value)
        for spot in self._way_back(owner, value):
            found = spot.value.meta["val"]
            if 3 <= found.dim() <= 5 and self._channels_at(spot.value, 1) is True:
                return Spot(spot.owner, self._unfolded(spot.value))
            if kind(spot.value) == "conv":
                break
        return Spot(owner, value)

    def _unfolded(self, value: fx.Node) -> fx.Node:
        """Return a value before its positions were put into one dimension, ``x.flatten(2)``."""
        while lays_out(value):
            (before,) = {source for source in value.all_input_nodes if is_data(source)}
            fits = 3 <= before.meta["val"].dim() <= 5 and self._channels_at(before, 1) is True
            if not fits or not self._keeps_channels(value):
                break
            value = before
        return value

    def _way_back(self, owner: OwnerGraph, node: fx.Node) -> Generator[Spot, None, fx.Node | None]:
        """Yield the values on the one way to a value, last first; return the graph's input that it ends at, None if it ends before."""
        while node.op != "placeholder":
            yield Spot(owner, node)
            if kind(node) == "conv" or (lays_out(node) and not self._keeps_channels(node)):
                return None
            before = _before(node)
            inner = self.trace.graphs.get(path_of(node)) if self.roles.of(node) == "module" else None
            result = returned(inner.graph) if inner is not None else None
            if self.roles.of(node) == "module":
                if inner is None or result is None or not self._is_called_with(inner, owner):
                    return None
                start = yield from self._way_back(inner, result)
                given = [source for source in node.all_input_nodes if start and source.meta["val"] is start.meta["val"]]
                before = given[0] if given else None
            if before is None:
                return None
            node = before
        return node

    def _is_called_with(self, inner: OwnerGraph, owner: OwnerGraph) -> bool:
        """Return whether a module is called as often as its caller, each time with the same kinds of arguments and with grad."""
        calls, kinds = self.trace.calls, self.trace.kinds.get(inner.path, ())
        as_often = calls.get(inner.path, 0) == calls.get(owner.path, 1)
        return as_often and len(kinds) <= 1 and inner.path not in self.trace.without_grad

    def _keeps_channels(self, node: fx.Node) -> bool:
        """Return whether what lays a value out neither divides its channels nor puts them together with other dimensions."""
        (source,) = {each for each in node.all_input_nodes if is_data(each)}
        before, after = source.meta["val"], node.meta["val"]
        if function_name_of(node) in _PERMUTATIONS:
            return True
        axis = next((axis for axis in range(before.dim()) if self._channels_at(source, axis) is True), None)
        return axis in kept_axes(before.shape, after.shape).values()

    def _channels_at(self, node: fx.Node, axis: int) -> bool | int | None:
        """Return whether an axis of a value is its channels; if the path back ends at the graph's input, which axis of that.

        None if no convolution or linear layer is on the path back, for axis 1.
        """
        while True:
            tensor = node.meta.get("val")
            data = [source for source in node.all_input_nodes if is_data(source)]
            if node.op == "placeholder":
                return axis
            name = function_name_of(node)
            if kind(node) in ("conv", "pool"):
                return axis == 1
            divided = _divided(node) if not data else None
            if divided is not None:
                node = divided
                continue
            if not isinstance(tensor, Tensor) or not data:
                return None if axis == 1 else False
            source = max(data, key=lambda each: each.meta["val"].numel())
            before = source.meta["val"]
            inner = self.trace.graphs.get(path_of(node)) if kind(node) == "module" else None
            result = returned(inner.graph) if inner is not None else None
            if inner is not None and before.shape == tensor.shape and self.roles.of(node) in ("norm", "act"):
                pass  # however it lays its input out, it gives it back in the same form
            elif inner is not None and result is not None:
                found = self._channels_at(result, axis)
                if found is None or isinstance(found, bool):
                    return found
                axis = found
            elif (node.op == "call_module" and isinstance(node.meta["module"], nn.Linear)) or name in _LINEAR:
                return axis == tensor.dim() - 1
            elif name in _PERMUTATIONS or _is_transposed(node):
                order = permutation(node)
                if order is None:
                    return None if axis == 1 else False
                axis = order[axis]
            elif lays_out(node) and (moved := self._before_reshape(source, tensor.shape, axis)) is not None:
                if moved < 0:
                    return False
                axis = moved
            elif before.dim() != tensor.dim() and (axis != 1 or before.shape[1:2] != tensor.shape[1:2]):
                return axis == 1 and tensor.dim() > 3
            node = source

    def _before_reshape(self, source: fx.Node, after: torch.Size, axis: int) -> int | None:
        """Return which dimension an axis was before a reshape, -1 if the channels are another axis now, None if that can't be told."""
        kept = kept_axes(source.meta["val"].shape, after)
        if axis in kept:
            return kept[axis]
        return -1 if any(self._channels_at(source, old) is True for old in kept.values()) else None


def kept_axes(before: torch.Size, after: torch.Size) -> dict[int, int]:
    """Return which dimensions a reshape leaves as they are: the new number of each → the old one."""
    kept: dict[int, int] = {}
    old, new = 0, 0
    while old < len(before) and new < len(after):
        if before[old] == after[new]:
            kept[new] = old
        elif before[old] == 1:
            old += 1
            continue
        elif after[new] == 1:
            new += 1
            continue
        else:
            left, right = before[old], after[new]
            while left != right:
                if left < right and old + 1 < len(before):
                    old += 1
                    left *= before[old]
                elif right < left and new + 1 < len(after):
                    new += 1
                    right *= after[new]
                else:
                    return kept
        old, new = old + 1, new + 1
    return kept


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Return which old dimension each new one is, for an operation that changes their order; None if it can't be told."""
    sizes = _PRIMES[: node.meta["val"].dim()]
    args = [arg.meta.get("val") if isinstance(arg, fx.Node) else arg for arg in node.args[1:]]
    try:
        x = torch.empty(sizes, device="meta")
        target: Any = getattr(x, node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
        found = target(*args, **node.kwargs) if node.op == "call_method" else target(x, *args, **node.kwargs)
        return tuple(sizes.index(size) for size in found.shape)
    except Exception:  # dimensions that are given in a form of their own
        return None


def _divided(node: fx.Node) -> fx.Node | None:
    """Return the value that a node is a part of, if it was divided by ``split`` or ``chunk``."""
    whole = node.all_input_nodes[0] if function_name_of(node) == "getitem" and node.all_input_nodes else None
    if whole is None or function_name_of(whole) not in ("split", "chunk", "tensor_split", "split_with_sizes"):
        return None
    data = [source for source in whole.all_input_nodes if is_data(source)]
    return data[0] if len(data) == 1 and data[0].meta["val"].dim() == node.meta["val"].dim() else None


def _is_transposed(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("T", "mT", "H", "mH")


def _before(node: fx.Node) -> fx.Node | None:
    """Return the one value that a node is made from; of a product with a gate the value that is gated."""
    pair = gate_and_gated(node)
    data = [pair[1]] if pair else list(dict.fromkeys(source for source in node.all_input_nodes if is_data(source)))
    return data[0] if len(data) == 1 else None
