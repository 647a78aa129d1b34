"""Compute the stride of every value from the network's input: strides multiplied along the path, not sizes divided.

Without padding a map of 25 positions may have stride 8 in an image of 224. Convolutions and pooling say their strides. What
else changes the number of positions (slices, reshapes, crops) is judged by the sizes before and after, rounded; padding
changes no stride.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from se_inject.tracing import Trace, function_name_of, kind

Stride = tuple[float, ...]

_RESIZING = frozenset({"interpolate", "upsample", "Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"})
_PADDING = re.compile(r"pad|constant_pad_nd|(reflection|replication|circular|_)\w*pad\w*|\w+Pad[123]d")
_STRIDE_ARGUMENT = {
    **{f"{name}{rank}d": 3 for name in ("conv", "conv_transpose") for rank in (1, 2, 3)},
    **{f"{name}{rank}d": 2 for name in ("max_pool", "avg_pool") for rank in (1, 2, 3)},
    **{f"lp_pool{rank}d": 3 for rank in (1, 2, 3)},
    **dict.fromkeys(("convolution", "_convolution", "_convolution_mode", "deform_conv2d"), 3),
    "boolean_dispatch": 2,
}
"""Where functions of torch have their stride."""


class _Known(NamedTuple):
    """The stride of a value at the size that it had when that was last known; ``size`` None: a value as the network got it."""

    shape: tuple[int, ...]
    size: tuple[int, ...] | None
    stride: Stride


class Strides:
    """The strides of all values of an observed call.

    Args:
        trace: the call.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[int, _Known] = {}
        self._by_size: dict[tuple[int, ...], Stride] = {}
        given = [leaf for leaf in tree_leaves(trace.inputs) if isinstance(leaf, Tensor) and leaf.dim() > 2]
        self._given = _Known(tuple(given[0].shape), None, ()) if given else None
        nodes = [node for owner in trace.graphs.values() for node in owner.graph.nodes if "time" in node.meta]
        for node in sorted(nodes, key=lambda node: int(node.meta["time"])):
            self._enter(node)

    def of(self, value: Tensor) -> Stride:
        """Return the stride of a value in each dimension, as far as it is known."""
        known = self._known.get(id(value))
        return self._at(known, tuple(value.shape[2:]))

    def _enter(self, node: fx.Node) -> None:
        """Write down the strides of what a node returned."""
        results = [value for value in _tensors(node.meta["val"]) if id(value) not in self._known]
        if not results or node.op == "get_attr":
            return
        if node.op == "placeholder":
            for value in results:
                inherited = self._given if node.graph is self._root else None
                self._known[id(value)] = (
                    inherited._replace(shape=tuple(value.shape))
                    if inherited is not None
                    else _Known(tuple(value.shape), tuple(value.shape[2:]), self._at(None, tuple(value.shape[2:])))
                )
            return
        source = self._source(node)
        if source is None:
            return
        known = self._known[id(source)]
        for value in results:
            self._known[id(value)] = self._after(node, source, value, known)

    @property
    def _root(self) -> fx.Graph | None:
        owner = self.trace.graphs.get("")
        return None if owner is None else owner.graph

    def _source(self, node: fx.Node) -> Tensor | None:
        """Return the value that a node's result has its positions from: one whose size is as when it was last known, if any."""
        values = [
            value
            for source in node.all_input_nodes
            for value in _tensors(source.meta.get("val"))
            if id(value) in self._known
        ]
        settled = [value for value in values if self._known[id(value)].size == tuple(value.shape[2:])]
        return next(iter(settled or values), None)

    def _after(self, node: fx.Node, source: Tensor, value: Tensor, known: _Known) -> _Known:
        before, after = tuple(source.shape[2:]), tuple(value.shape[2:])
        own = self._own_stride(node, before, after)
        if own is None:
            return known
        reached = self._at(known, before)
        if len(reached) != len(own):
            return known
        stride = tuple(there * here for there, here in zip(reached, own, strict=True))
        self._by_size[after] = stride
        return _Known(tuple(value.shape), after, stride)

    def _own_stride(self, node: fx.Node, before: tuple[int, ...], after: tuple[int, ...]) -> Stride | None:
        """Return the stride of a convolution, a pooling or a resizing; None for what leaves positions to be judged by sizes."""
        if not before or len(before) != len(after):
            return None
        name = node.meta["class"].__name__ if node.op == "call_module" else function_name_of(node)
        if name in _RESIZING:
            return tuple(a / b for a, b in zip(before, after, strict=True))
        if _PADDING.fullmatch(name):
            return (1.0,) * len(before)
        if kind(node) not in ("conv", "pool"):
            return None
        module = node.meta.get("module")
        stride = _stride_argument(node, name) if module is None else getattr(module, "stride", None)
        stride = (stride,) * len(before) if isinstance(stride, int) else stride
        if not isinstance(stride, tuple | list) or not all(isinstance(each, int) and each > 0 for each in stride):
            return tuple(_rounded(a, b) for a, b in zip(before, after, strict=True))
        stride = tuple(stride) * len(before) if len(stride) == 1 else tuple(stride)
        if getattr(module, "transposed", "transpose" in name) or (
            name.endswith("convolution") and node.args[6:7] == (True,)
        ):
            return tuple(1 / each for each in stride)
        return tuple(float(each) for each in stride)

    def _at(self, known: _Known | None, size: tuple[int, ...]) -> Stride:
        """Return the stride that a value has at this size, which it got by operations without a stride of their own."""
        if known is None and size in self._by_size:
            return self._by_size[size]
        known = known or self._given
        if known is None:
            return (1.0,) * len(size)
        if known.size is None:
            if any(known.shape[start : start + len(size)] == size for start in range(len(known.shape))):
                return (1.0,) * len(size)
            there, stride = known.shape[2:], (1.0,) * len(size)
        else:
            there, stride = known.size, known.stride
        shared = min(len(there), len(size))
        if len(there) != len(size):  # frames that became a dimension, or one of the batch
            alike = shared and len(stride) == len(there) and there[-shared:] == size[-shared:]
            if not alike and size in self._by_size:  # tokens that became a map again
                return self._by_size[size]
            return (1.0,) * (len(size) - shared) + (stride[-shared:] if alike else (1.0,) * shared)
        return tuple(each * _rounded(a, b) for each, a, b in zip(stride, there, size, strict=True))


def _rounded(before: int, after: int) -> float:
    """Return the factor between two numbers of positions: 1 for padding and crops, else a whole number or one over it."""
    if not before or not after or 2 * max(before, after) < 3 * min(before, after):
        return 1.0
    return float(round(before / after)) if before > after else 1 / round(after / before)


def _stride_argument(node: fx.Node, name: str) -> Any:
    place = _STRIDE_ARGUMENT.get(name)
    if place is None:
        return None
    stride = node.args[place] if len(node.args) > place else node.kwargs.get("stride")
    if stride is None and ("pool" in name or name == "boolean_dispatch"):  # as far as the window
        return node.args[place - 1] if len(node.args) > place - 1 else node.kwargs.get("kernel_size")
    return 1 if stride is None else stride


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
