"""Decide where a value's forward can be edited, and whether it can."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import fx, nn

from se_inject.errors import LoadError, SurgeryError
from se_inject.forwards import check_lines, expectations, lines_of, steps_data
from se_inject.sites.dataflow import IN_PLACE, last_write, lineage, reaches_output
from se_inject.sites.layouts import Layouts
from se_inject.sites.operations import convolves, means_the_same, passed_through, path_of, returned
from se_inject.sites.roles import Roles
from se_inject.tracing import (
    OwnerGraph,
    Trace,
    Untraceable,
    function_name_of,
    is_leaf,
    kind,
    returns_alike,
    training_graph,
    writes_into,
)

UNREACHED = "nothing that the network returns is made from it"


class Values:
    """Questions about values of one observed call."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.editable: dict[str, str | None] = {}
        self.roles = Roles(trace)
        self.layouts = Layouts(trace, self.roles)

    def module(self, node: fx.Node) -> nn.Module:
        """Return the module that a ``call_module`` node calls."""
        found: nn.Module = node.meta["module"]
        return found

    def unscaled(self, owner: OwnerGraph, value: fx.Node) -> fx.Node:
        """Find a value before dropout, stochastic depth, layer scale and injected blocks, as far as its shape lasts."""
        while True:
            source = self.past_our_blocks(owner, value)
            if source is value:
                source = passed_through(self.trace, value) or value
            if source is value or source.op == "placeholder":
                return value
            value = source

    def activated(self, owner: OwnerGraph, value: fx.Node) -> fx.Node:
        """Find a value after the normalisation and activation that follow it in the same graph."""
        while len(value.users) == 1:
            user = next(iter(value.users))
            if kind(user) not in ("norm", "act") and not self.activates(user):
                break
            value = user
        return self.past_our_blocks(owner, value)

    def past_our_blocks(self, owner: OwnerGraph, value: fx.Node) -> fx.Node:
        """Find a value before the injected blocks that gate it."""
        names = {step["block_name"] for step in self.steps(owner.path)}
        while value.op == "call_module" and value.target in names and isinstance(value.args[0], fx.Node):
            value = value.args[0]
        return value

    def activates(self, node: fx.Node) -> bool:
        """Return whether a node calls a module with a graph of its own that is nothing but normalisation and activation."""
        if kind(node) != "module":
            return False
        if self.roles.of(node) == "act":
            return True
        inner = self.trace.graphs.get(path_of(node))
        if inner is None:
            return False
        kinds = {kind(each) for each in inner.graph.nodes if each.op.startswith("call")}
        value = returned(inner.graph)
        return "act" in kinds and "conv" not in kinds and value is not None and not any(map(convolves, lineage(value)))

    def written_back(self, owner: OwnerGraph, value: fx.Node, label: str) -> tuple[str, str | None]:
        """Find the module whose forward is edited to gate a value, and the value's label there; None: the value it returns."""
        path, module = owner.path, owner.module
        while isinstance(module, nn.Sequential) and value.op == "call_module":
            path = path_of(value)
            module = self.trace.model.get_submodule(path)
            inner = self.trace.graphs.get(path)
            last = returned(inner.graph) if inner is not None else None
            if last is None or not isinstance(module, nn.Sequential):
                return path, None
            value = last
        result = returned(owner.graph)
        if (
            result is not None
            and value is self.past_our_blocks(owner, result)
            and not owner.iterates
            and self._returns_one(owner)
        ):
            return path, None
        if module is owner.module and self._why_not_edited(owner) is not None:
            return self._where_it_is_made(value) or (path, label)
        return path, label

    def _where_it_is_made(self, value: fx.Node) -> tuple[str, None] | None:
        """Find the module whose output a value is: it can be gated there where its caller's forward can't be edited."""
        while value.op == "call_module" and self.trace.calls.get(path_of(value)) == 1:
            path, module = path_of(value), self.module(value)
            inner = self.trace.graphs.get(path)
            last = returned(inner.graph) if inner is not None else None
            if isinstance(module, nn.Sequential):
                if last is None:
                    return None
                value = last
                continue
            by_forward = inner is not None and inner.door == "forward" and self._returns_one(inner)
            if is_leaf(module) or (by_forward and last is not None):
                return path, None
            return None
        return None

    def _returns_one(self, owner: OwnerGraph) -> bool:
        """Return whether the forward returns one tensor in training too, as far as that is known."""
        if owner.reads_training:
            with contextlib.suppress(Untraceable):
                return returned(training_graph(self.trace, owner)[0]) is not None
        return True

    def refusal(self, owner: OwnerGraph, value: fx.Node, path: str, written: str | None) -> str | None:
        """Explain why a value can't be gated; None if it can."""
        calls = self.trace.calls.get(path, 0)
        if written is None and path != owner.path and calls > max(1, self.trace.calls.get(owner.path, 1)):
            return f"`{path}` is called {calls} times: its output is not one value"
        inner = self.trace.graphs.get(path)
        if written is None and inner is not None and inner.iterates:
            return f"the forward of `{path}` goes through all its children: a block would become one of them"
        if self._is_repeated(owner, value):
            return f"`{value.target}` is called several times in one forward: each call would get a block of its own"
        if value.op == "call_module" and not returns_alike(self.trace, path_of(value)):
            return f"`{value.target}` returns something of another structure in training"
        reason = self._uneditable(owner, value, written) or self.layouts.misread(value)
        if reason is None and not reaches_output(self.trace, owner, value):
            return UNREACHED
        return reason

    def _is_repeated(self, owner: OwnerGraph, value: fx.Node) -> bool:
        """Return whether a module with convolutions returns the value, and the same forward calls that module again."""
        calls = [node for node in owner.graph.nodes if node.op == "call_module" and node.target == value.target]
        return len(calls) > 1 and convolves(value)

    def _uneditable(self, owner: OwnerGraph, value: fx.Node, written: str | None) -> str | None:
        """Explain why the value can't be gated in this forward; None if it can."""
        if written is None:
            return None
        if (why := self._why_not_edited(owner)) is not None:
            return why
        if owner.reads_training:
            training, _ = training_graph(self.trace, owner)
            if not means_the_same(owner.graph, training, written):
                return f"its forward computes `{written.partition('#')[0]}` more often in one mode than in the other"
        write = last_write(value)
        filling = writes_into(value)
        if write is not None and any(
            user < write and user not in filling and not _leads_to(user, write) for user in value.users
        ):
            return "it is written into after it was read"
        if not value.users:
            return "nobody reads its value: it is written into another, whose name is read"
        order = {node: number for number, node in enumerate(owner.graph.nodes)}
        alias = value
        while (source := self._overwritten(alias)) is not None:
            if any(order[user] > order[value] for user in source.users):
                return "its value is read by another name as well"
            alias = source
        return None

    def _why_not_edited(self, owner: OwnerGraph) -> str | None:
        """Explain why an owner's forward can't be written down; None if it can."""
        if owner.path not in self.editable:
            try:
                check_editable(self.trace, owner)
                self.editable[owner.path] = None
            except SurgeryError as error:
                self.editable[owner.path] = error.message
        return self.editable[owner.path]

    def _overwritten(self, node: fx.Node) -> fx.Node | None:
        """Find the value that a node writes its result into; None if it makes a new one."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        if node.op == "call_module":
            module = self.module(node)
            return first if getattr(module, "inplace", False) is True and is_leaf(module) else None
        name = function_name_of(node)
        in_place = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        return first if in_place or node.kwargs.get("inplace") is True else None

    def steps(self, path: str) -> list[dict[str, Any]]:
        """Return the injected steps that an owner's forward was edited by."""
        return steps_data(self.trace.model.get_submodule(path))


def _leads_to(user: fx.Node, write: fx.Node) -> bool:
    """Return whether a reader of a buffer is there to fill it: a later assignment depends on it."""
    pending, seen = [user], set()
    while pending:
        node = pending.pop()
        if node is write or function_name_of(node) == "setitem":
            return True
        if node not in seen:
            seen.add(node)
            pending += [each for each in node.users if each < write or each is write]
    return function_name_of(user) in ("getitem", "narrow", "select") and all(not each.users for each in user.users)


def check_editable(trace: Trace, owner: OwnerGraph) -> None:
    """Check that an owner's forward can be written down, for eval and, if it looks at its mode, for training.

    Raises:
        SurgeryError: it can't.
    """
    try:
        lines = lines_of(owner.graph)
        if owner.reads_training:
            lines = [["if", {"training": True}, lines_of(training_graph(trace, owner)[0]), lines]]
        check_lines(owner.kind, [*expectations(owner.constants, owner.settings), *lines], owner.door)
    except Untraceable as error:
        raise SurgeryError(str(error)) from error
    except LoadError as error:
        raise SurgeryError(f"{error.message.replace('a forward in this file', 'its forward')}") from error
