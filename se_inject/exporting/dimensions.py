"""Name the batch and the spatial dimensions of a call's tensors, and choose other sizes to check a file at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
"""The names of spatial dimensions in a file, by their number."""


class Free(NamedTuple):
    """The dimensions that a file leaves open."""

    batch: bool
    size: bool = False

    def __str__(self) -> str:
        opened = [name for name, is_open in zip(("batch", "size"), self, strict=True) if is_open]
        return f"dynamic {' and '.join(opened)}" if opened else "fixed batch"


FIXED = Free(False)


class Case(NamedTuple):
    """One call that a file is checked with: its batch, and the number of its size; 0 is the size of the example."""

    batch: int
    size: int = 0


class Dimensions:
    """The batch and the spatial dimensions of the tensors in one call.

    The batch is the first dimension of the first tensor, and an equal first dimension of any other. Spatial are the
    last dimensions of a tensor, as many as the network's first convolution has, behind the channels; and those of a
    tensor without channels (a mask) that end in the same sizes.

    Args:
        model: the network.
        example: positional and keyword arguments of one call.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        self.batch = next((tensor.size(0) for tensor in tensors if tensor.dim()), None)
        first = next((module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
        rank = max((tensor.dim() for tensor in tensors), default=2) if first is None else first.weight.dim()
        self.rank = min(max(rank - 2, 1), 3)
        images = [tensor for tensor in tensors if tensor.dim() > self.rank and tensor.is_floating_point()]
        largest = max((image.dim() for image in images), default=0)
        self.sizes = list(dict.fromkeys(tuple(i.shape[-self.rank :]) for i in images if i.dim() == largest))

    def has_batch(self, leaf: Any) -> bool:
        """Tell whether a leaf of the arguments has the batch as its first dimension."""
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == self.batch

    def spatial(self, leaf: Tensor) -> range:
        """Return the numbers of a tensor's spatial dimensions; empty if it has none."""
        found = leaf.dim() - self.has_batch(leaf) >= self.rank and tuple(leaf.shape[-self.rank :]) in self.sizes
        return range(leaf.dim() - self.rank, leaf.dim()) if found else range(0)

    def names(self, leaf: Any, free: Free) -> dict[int, str]:
        """Return the free dimensions of a leaf of the arguments, by number, with their names in a file."""
        named: dict[int, str] = {}
        if free.batch and self.has_batch(leaf):
            named[0] = "batch"
        if free.size and isinstance(leaf, Tensor) and (spatial := self.spatial(leaf)):
            which = self.sizes.index(tuple(leaf.shape[-self.rank :]))
            named |= {
                d: name + (f"_{which}" if which else "") for d, name in zip(spatial, NAMES[self.rank], strict=True)
            }
        return named

    def shape(self, leaf: Tensor, free: Free) -> str:
        """Return a tensor's shape with the free dimensions by name: ``batch×3×224×224``."""
        names = self.names(leaf, free)
        return "×".join(str(names.get(d, size)) for d, size in enumerate(leaf.shape)) or "a number"

    def other_sizes(self) -> Iterator[dict[tuple[int, ...], tuple[int, ...]]]:
        """Choose other spatial sizes for every one in the call, the most informative first.

        Odd ones and never square; then in steps of 8, 32 and 64, for networks that join maps of several strides; then
        the double and the half, for those that take one shape of image alone.
        """
        far = range(self.rank, 0, -1)  # width changes by one step, height by two
        changes = [
            lambda size, steps: (size + max(1, size // 8) * steps) | 1,
            lambda size, steps: (size - max(1, size // 8) * steps - 1) | 1,
            *(
                lambda size, steps, step=step, sign=sign: size + sign * step * steps
                for step in (8, 32, 64)
                for sign in (1, -1)
            ),
            lambda size, steps: size + 32 * (2 * self.rank + 1 - steps),
            lambda size, steps: 2 * size,
            lambda size, steps: size // 2,
        ]
        for change in changes:
            sizes = {old: tuple(map(change, old, far)) for old in self.sizes}
            if all(min(new) > 0 and new != old for old, new in sizes.items()):
                yield sizes
