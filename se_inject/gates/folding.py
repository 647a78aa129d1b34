"""Find the convolutions or norms whose weights a constant gate can be folded into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from se_inject.sites import returned
from se_inject.tracing import OwnerGraph, Trace, function_name_of, kind

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.modules.pooling._MaxPoolNd)
"""f(g·x) = g·f(x) for g ≥ 0 alone."""
_LINEAR = (
    nn.Identity, nn.modules.dropout._DropoutNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.Upsample,
)  # fmt: skip
"""f(g·x) = g·f(x) for any g of each channel."""
_HOMOGENEOUS_FUNCTIONS = frozenset(
    {"relu", "relu_", "leaky_relu", "leaky_relu_", "max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch"}
)
_LINEAR_FUNCTIONS = frozenset(
    {
        "dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth", "contiguous", "clone", "avg_pool1d", "avg_pool2d",
        "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "upsample", "identity",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Fold:
    """Weights that a part of a gate is multiplied into.

    Args:
        module: path of a convolution or norm.
        start: the first of the gate's channels that it makes.
        stop: the one behind its last.
        needs_positive: whether the gate must not be negative, since a ReLU or a max pooling lies between.
    """

    module: str
    start: int
    stop: int
    needs_positive: bool = False


class NotFoldable(Exception):
    """The reason why a gate can't be folded, in its message."""


class Folds:
    """Finds, in an observed injected network, what a block's gate could be folded into.

    Args:
        trace: an observed call of the injected network.
        blocks: paths of all blocks of ours in it.
    """

    def __init__(self, trace: Trace, blocks: Sequence[str]) -> None:
        self.trace = trace
        self.blocks = frozenset(blocks)
        self.callers: dict[str, list[tuple[OwnerGraph, fx.Node]]] = {}
        for owner in trace.graphs.values():
            for node in owner.graph.nodes:
                if node.op == "call_module":
                    self.callers.setdefault(trace.child(owner.path, node.target), []).append((owner, node))
        named = trace.model.named_modules(remove_duplicate=False)
        holders = (id(p) for _, module in named for p in module._parameters.values() if p is not None)
        self.shared = {key for key, count in Counter(holders).items() if count > 1}

    def of(self, path: str, channels: int) -> tuple[Fold, ...]:
        """Find the modules that a block's gate can be folded into exactly.

        Raises:
            NotFoldable: something else reads the value, or it isn't made by a convolution or norm of its own.
        """
        owner, node = self._only_call(path)
        value = next((argument for argument in node.args if isinstance(argument, fx.Node)), None)
        if value is None:
            raise NotFoldable("it is called without a value")
        return tuple(self._behind(owner, value, node, 0, channels, False))

    def _only_call(self, path: str) -> tuple[OwnerGraph, fx.Node]:
        calls = self.callers.get(path, [])
        if len(calls) != 1:
            raise NotFoldable(
                f"`{path}` is called {len(calls)} times" if calls else f"the call of `{path}` is not seen"
            )
        return calls[0]

    def _behind(
        self, owner: OwnerGraph, node: fx.Node, reader: fx.Node, start: int, stop: int, positive: bool
    ) -> list[Fold]:
        """Go back from a value whose only reader is known to what makes it."""
        others = [
            user
            for user in node.users
            if user is not reader and isinstance(user.meta.get("val"), (Tensor, tuple, list))
        ]
        if others or any(user.op == "output" for user in node.users if user is not reader):
            raise NotFoldable(f"`{node.name}` is read by others as well")
        if node.op == "placeholder":
            return self._before_call(owner, start, stop, positive)
        if node.op == "call_module":
            return self._module(owner, node, start, stop, positive)
        name = function_name_of(node) if node.op in ("call_function", "call_method") else ""
        data = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
        what = kind(node)
        if what == "add" and len(data) == 2 and all(_shape(source) == _shape(node) for source in data):
            return [fold for source in data for fold in self._behind(owner, source, node, start, stop, positive)]
        if what == "cat" and node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0) in (
            1,
            1 - len(_shape(node)),
        ):
            return self._concatenated(owner, node, start, positive)
        if what == "mul" and len(data) in (1, 2):
            whole = [source for source in data if _shape(source) == _shape(node) and source.op != "get_attr"]
            if len(whole) == 1:
                return self._behind(owner, whole[0], node, start, stop, positive)
        if len(data) == 1 and (name in _LINEAR_FUNCTIONS or name in _HOMOGENEOUS_FUNCTIONS):
            return self._behind(owner, data[0], node, start, stop, positive or name in _HOMOGENEOUS_FUNCTIONS)
        raise NotFoldable(f"it is behind `{name or node.name}`")

    def _concatenated(self, owner: OwnerGraph, node: fx.Node, start: int, positive: bool) -> list[Fold]:
        folds: list[Fold] = []
        parts = node.args[0] if isinstance(node.args[0], (list, tuple)) else []
        for part in parts:
            if not isinstance(part, fx.Node):
                raise NotFoldable("it is behind a concatenation that can't be taken apart")
            stop = start + _shape(part)[1]
            folds += self._behind(owner, part, node, start, stop, positive)
            start = stop
        return folds

    def _before_call(self, owner: OwnerGraph, start: int, stop: int, positive: bool) -> list[Fold]:
        """Follow a value that is an argument of the module: go on in the forward that calls it."""
        if not owner.path:
            raise NotFoldable("it gates the network's own input")
        outer, call = self._only_call(owner.path)
        values = [argument for argument in call.args if isinstance(argument, fx.Node)]
        if len(values) != 1 or call.kwargs:
            raise NotFoldable(f"`{owner.path}` is called with several values")
        return self._behind(outer, values[0], call, start, stop, positive)

    def _module(self, owner: OwnerGraph, node: fx.Node, start: int, stop: int, positive: bool) -> list[Fold]:
        path = self.trace.child(owner.path, node.target)
        module = self.trace.model.get_submodule(path)
        if path in self.blocks:
            raise NotFoldable(f"it is behind another block, `{path}`")
        self._only_call(path)
        if isinstance(module, (*_NORMS, nn.modules.conv._ConvNd)):
            self._check_weights(module, path, stop - start)
            return [Fold(path, start, stop, positive)]
        data = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
        if isinstance(module, (*_LINEAR, *_HOMOGENEOUS)) and len(data) == 1:
            return self._behind(owner, data[0], node, start, stop, positive or isinstance(module, _HOMOGENEOUS))
        inner = self.trace.graphs.get(path)
        result = None if inner is None else returned(inner.graph)
        if inner is None or result is None:
            raise NotFoldable(f"it is behind `{path}`, a {type(module).__name__}")
        output = next(iter(reversed(inner.graph.nodes)))
        return self._behind(inner, result, output, start, stop, positive)

    def _check_weights(self, module: Any, path: str, channels: int) -> None:
        weight = module._parameters.get("weight")
        if parametrize.is_parametrized(module):
            raise NotFoldable(f"the weights of `{path}` are parametrised")
        if weight is None:
            raise NotFoldable(f"`{path}` has no weights of its own")
        if any(id(p) in self.shared for p in module._parameters.values() if p is not None):
            raise NotFoldable(f"the weights of `{path}` are shared")
        made = module.out_channels if isinstance(module, nn.modules.conv._ConvNd) else weight.shape[0]
        if made != channels:
            raise NotFoldable(f"`{path}` makes {made} channels, and the gate has {channels}")


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def fold_(model: nn.Module, fold: Fold, gate: Tensor) -> dict[str, Tensor]:
    """Multiply the gate's part into the weights in front, and return these as they were, by name.

    The product is taken in float64 and rounded once.
    """
    module: Any = model.get_submodule(fold.module)
    part = gate[fold.start : fold.stop].double()
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in ("weight", "bias"):
            parameter = module._parameters.get(name)
            if parameter is None:
                continue
            before[f"{fold.module}.{name}"] = parameter.detach().clone()
            factor = part.to(parameter.device) if parameter.device.type != "mps" else part
            if name == "weight" and isinstance(module, nn.modules.conv._ConvNd):
                factor = _for_weight(module, factor)
            parameter.copy_((parameter.double() * factor).to(parameter.dtype))
    return before


def _for_weight(module: nn.modules.conv._ConvNd, factor: Tensor) -> Tensor:
    """Reshape one factor for each output channel to multiply a convolution's weight."""
    ones = [1] * len(module.kernel_size)
    if not module.transposed:
        return factor.reshape(-1, 1, *ones)
    group = module.in_channels // module.groups  # its weight is (C_in, C_out / groups, …)
    return (
        factor.reshape(module.groups, 1, -1, *ones).expand(-1, group, -1, *ones).reshape(module.in_channels, -1, *ones)
    )
