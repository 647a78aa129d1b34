"""A trace: everything that one observed call of a model did, as values that nothing changes afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from se_inject.tracing.proxy import DATA_DECIDES

Guards = tuple[tuple[fx.Node, bool], ...]
"""Conditions that the traced branch depends on, each with the answer it had."""


class Counts(NamedTuple):
    """Counts of operations that ran while a node's value was computed.

    Attributes:
        convolutions: how many, those on 1×1 values left out.
        macs: their multiply-adds.
        gates: products of a value with a gate made from it.
        attention: matrices of attention between positions.
    """

    convolutions: int = 0
    macs: int = 0
    gates: int = 0
    attention: int = 0

    def since(self, before: Counts) -> Counts:
        """Return what ran since there were ``before``."""
        return NOTHING if self is before else Counts(*map(int.__sub__, self, before))


NOTHING = Counts()


@dataclass(frozen=True, eq=False)
class OwnerGraph:
    """One module's forward as a graph, children as leaves.

    Each node has ``node.meta["val"]``, its value in the observed call, ``node.meta["time"]``, when that came to be, and
    ``node.meta["counts"]``, a ``Counts``. The call of a child has ``node.meta["path"]``, the child's path in the model,
    ``node.meta["module"]``, ``node.meta["class"]``, its class then, and ``node.meta["door"]`` if a method of the child was called.
    ``node.meta["within"]`` is the path and name of a child's method that is written out here. ``node.meta["operation"]`` says what a node computes.

    Attributes:
        path: of the module in the model.
        module: the user's.
        kind: its class when it was observed.
        graph: its forward.
        constants: arguments that were no tensors, and their values.
        guards: conditions on which this branch of the forward depends.
        settings: plain attributes that the forward read, and their values.
        reads_training: whether the forward asks for the mode.
        iterates: whether the forward goes through all children, where a new one would be called as well.
        inputs: positional and keyword arguments of the call, and which plain numbers among them are computed.
        helpers: what had to be patched for the forward to be traced.
        door: the method by which the module is called, if that isn't its forward: what is written here is that method.
    """

    path: str
    module: nn.Module
    kind: type
    graph: fx.Graph
    constants: Mapping[str, Any]
    guards: Guards
    settings: Mapping[str, Any]
    reads_training: bool
    iterates: bool
    inputs: tuple[tuple[Any, ...], dict[str, Any], frozenset[int | str]]
    helpers: tuple[Any, ...] = ()
    door: str = "forward"


@dataclass(frozen=True, eq=False)
class Trace:
    """One observed call of a model. Frozen: asking for more (``training_graph``) observes into another trace.

    Attributes:
        model: the user's.
        inputs: positional and keyword arguments of the call.
        how: the tensors that stood for the model's: ``meta``, ``fake`` or ``real``.
        graphs: path of a module → its forward as a graph.
        failures: path of a module → why there is no graph.
        calls: path of a module → how often it was called, in the order of first calls.
        kinds: path of a module → the kinds of its arguments.
        canonical: other path of a shared module → the path that all else is under.
        without_grad: paths of modules that ran without grad.
        hooked: paths of modules with forward hooks.
        outputs: of the call.
        macs: multiply-adds of its convolutions.
        size: spatial size of what the first convolution read.
        notes: what the user should know about the call.
        doors: path of a module → the method by which it was called first.
    """

    model: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    how: str
    graphs: Mapping[str, OwnerGraph]
    failures: Mapping[str, str]
    calls: Mapping[str, int]
    kinds: Mapping[str, frozenset[Any]]
    canonical: Mapping[str, str]
    without_grad: frozenset[str]
    hooked: frozenset[str]
    outputs: Any
    macs: int
    size: tuple[int, ...]
    notes: tuple[str, ...] = ()
    doors: Mapping[str, str] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What ``training_graph`` and the search for sites found, so that they look once."""

    def may_skip(self, path: str) -> bool:
        """Return whether a module around this one decides by the data what it calls: not every input need reach this one."""
        parts = path.split(".")
        around = [".".join(parts[:depth]) for depth in range(len(parts))]
        return any(DATA_DECIDES in self.failures.get(parent, "") for parent in around)

    def child(self, owner: str, target: Any) -> str:
        """Return the path of a module that an owner's graph names relative to the owner: the one its trace is under."""
        path = f"{owner}.{target}" if owner else str(target)
        return self.canonical.get(path, path)


def float_like(model: nn.Module) -> torch.Tensor:
    """Make a tensor of no elements with the dtype and device of the model's first floating-point parameter.

    Without one: float32 on the CPU.
    """
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return torch.empty(0) if first is None else torch.empty(0, dtype=first.dtype, device=first.device)
