"""Which dimension of a value is its channels, and where on its way it was of the form (N, C, …) if it isn't.

Networks of tokens keep values as (N, L, C), (L, N, C) or (N, H, W, C), and lay them out as (N, C, …) for a convolution alone.
A block of theirs stands there: behind the branch's last convolution, its normalisation and activation.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

from torch import Tensor, fx

from se_inject.sites.axes import MIXED, REORDERING, Axes, kept_axes
from se_inject.sites.operations import path_of, returned
from se_inject.sites.roles import Roles, lays_out
from se_inject.tracing import OwnerGraph, Trace, function_name_of, gate_and_gated, is_data, kind, numbers_of


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
        self.axes = Axes(trace, roles)
        self._known: dict[fx.Node, str | None] = {}

    def misread(self, value: fx.Node) -> str | None:
        """Explain why dimension 1 of a value isn't its channels; None if it is, as far as the path back to a convolution shows."""
        if value not in self._known:
            why = self._why_misread(value)
            self._known[value] = why and f"its value is not of the form (N, C, …): {why} of {_shape(value)}"
        return self._known[value]

    def _why_misread(self, value: fx.Node) -> str | None:
        found = self.axes.of(value, 1)
        if found is None:
            return None
        channels = [origin for origin in found if origin.is_channels]
        if channels and any(origin.is_batch for origin in found):
            return "its batch and its channels are together in dimension 1"
        if MIXED in found:
            return "a reshape cut its channels unevenly: they are in no one dimension"
        if found and not channels:
            return "its channels are not dimension 1"
        if all(origin.is_part for origin in channels):  # of a size of 1 as well, where there are none
            others = [axis for axis in range(2, len(_shape(value))) if self._is_all_channels(value, axis)]
            if others:
                return f"its channels are {'in dimensions 1 and' if channels else 'dimension'} {others[0]}"
        return None

    def _is_all_channels(self, value: fx.Node, axis: int) -> bool:
        """Return whether a dimension of more than 1 is made of channels alone."""
        found = self.axes.of(value, axis) if _shape(value)[axis] > 1 else None
        return bool(found) and all(origin.is_channels for origin in found or ())

    def _holds_channels(self, value: fx.Node, axis: int) -> bool:
        """Return whether the channels of a convolution or linear layer are in a dimension."""
        return any(origin.what == "channels" for origin in self.axes.of(value, axis) or ())

    def _has_channels_first(self, value: fx.Node) -> bool:
        """Return whether a value is of the form (N, C, …) by a convolution or linear layer on the path back."""
        return self._holds_channels(value, 1) and self.misread(value) is None

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
            if 3 <= found.dim() <= 5 and self._has_channels_first(spot.value):
                return Spot(spot.owner, self._unfolded(spot.value))
            if kind(spot.value) == "conv":
                break
        return Spot(owner, value)

    def _unfolded(self, value: fx.Node) -> fx.Node:
        """Return a value before its positions were put into one dimension, ``x.flatten(2)``."""
        while lays_out(value):
            (before,) = {source for source in numbers_of(value) if is_data(source)}
            fits = 3 <= before.meta["val"].dim() <= 5 and self._has_channels_first(before)
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
        if function_name_of(node) in REORDERING:
            return True
        axis = next((axis for axis in range(before.dim()) if self._holds_channels(source, axis)), None)
        return axis in kept_axes(before.shape, after.shape).values()


def _before(node: fx.Node) -> fx.Node | None:
    """Return the one value that a node is made from; of a product with a gate the value that is gated."""
    pair = gate_and_gated(node)
    data = [pair[1]] if pair else list(dict.fromkeys(source for source in numbers_of(node) if is_data(source)))
    return data[0] if len(data) == 1 else None


def _shape(value: fx.Node) -> tuple[int, ...]:
    tensor = value.meta.get("val")
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
