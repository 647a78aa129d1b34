"""Edit the graph of a forward so that it calls blocks."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from se_inject.errors import SurgeryError
from se_inject.forwards import Form, expectations, lines_of
from se_inject.sites import labels, last_write, returned
from se_inject.surgery.method_bodies import FORWARD, Body, Inlined, bodies_of, calls_around, mark_calls
from se_inject.surgery.step import Step
from se_inject.tracing import Guards, OwnerGraph, Trace, Untraceable, training_graph, training_settings


class Edited(NamedTuple):
    """An edited forward, and the methods that hold blocks, as lines.

    Args:
        bodies: the lines of ``forward`` and of each method, by name.
        inlined: methods that compute gated values and stay as they are: why.
    """

    bodies: dict[str, list[Any]]
    inlined: dict[str, str]


def new_bodies(trace: Trace, path: str, earlier: Sequence[Step], steps: Sequence[Step]) -> Edited:
    """Return the forward of an owner with blocks: the author's own is called where they act on what it returns alone.

    Args:
        trace: an observed call.
        path: of the owner.
        earlier: what was put into it before; its graph holds these blocks.
        steps: what is put into it now.

    Raises:
        SurgeryError: its forward can't be written down, or a step does not fit it.
    """
    every = (*earlier, *steps)
    owner = trace.graphs.get(path)
    if any(step.value is not None for step in every) or (owner is not None and owner.door != FORWARD):
        return edited_bodies(trace, path, earlier, steps)
    if calls_with(trace, path, None)[0]:
        with contextlib.suppress(SurgeryError):
            edited = edited_bodies(trace, path, earlier, steps)
            if len(edited.bodies) > 1:
                return edited
    gated = {"node": "gated"}
    calls = [["call", ["gated"], step.block_name, [gated], {}] for step in every]
    return Edited({FORWARD: [["original", ["gated"]], *calls, ["return", gated]]}, {})


def calls_with(trace: Trace, path: str, value: str | None) -> tuple[list[str], str]:
    """Return the public methods of an owner that compute a value within its forward, and the method of a child that does.

    As far as the trace tells; the latter is empty if there is none.

    Args:
        trace: an observed call.
        path: of the owner.
        value: label of the value; None: what the forward returns.
    """
    owner = trace.graphs.get(path)
    if owner is None:
        return [], ""
    if value is None:
        found = returned(owner.graph)
    else:
        found = next((node for node, label in labels(owner.graph).items() if label == value), None)
    if found is None:
        return [], ""
    return list(dict.fromkeys(call.name for call in calls_around(found))), found.meta.get("within", "")


def edited_bodies(
    trace: Trace, path: str, earlier: Sequence[Step], steps: Sequence[Step], *, training: bool = True
) -> Edited:
    """Return an owner's edited forward as lines: what it was observed with, then both modes if they differ.

    The public methods in which it calls blocks likewise, as far as they can be told apart from it.

    Args:
        trace: an observed call.
        path: of the owner.
        earlier: what was put into it before; its graph holds these blocks.
        steps: what is put into it now.
        training: False leaves the forward of training mode out.

    Raises:
        SurgeryError: its forward can't be written down, or a step does not fit it.
    """
    owner = trace.graphs.get(path)
    if owner is None:
        raise SurgeryError(
            f"the forward of `{path}` can't be edited", seen=trace.failures.get(path, "it was not called")
        )
    try:
        graphs = [(owner.graph, owner.guards)]
        settings = dict(owner.settings)
        if training and owner.reads_training:
            other = training_graph(trace, owner)
            if lines_of(other[0]) != lines_of(owner.graph):
                graphs.append(other)
            settings |= training_settings(trace, owner)
        for step in (*earlier, *steps):
            settings.pop(step.block_name, None)  # an attribute that was None is the block's name now
        settings |= _lengths(owner, [graph for graph, _ in graphs])
        inlined: dict[str, str] = {}
        while True:
            try:
                modes = [_edited(graph, guards, earlier, steps, inlined) for graph, guards in graphs]
                bodies = _in_both(modes, owner.constants, settings)
                if owner.door != FORWARD:
                    bodies = {**bodies, FORWARD: [], owner.door: bodies[FORWARD]}
                return Edited(bodies, inlined)
            except Inlined as error:
                inlined[error.name] = error.reason
    except (SurgeryError, Untraceable) as error:
        message = error.message if isinstance(error, SurgeryError) else str(error)
        raise SurgeryError(f"the forward of `{path}` can't be edited", seen=message) from error


def _lengths(owner: OwnerGraph, graphs: Sequence[fx.Graph]) -> dict[str, Any]:
    """Return how many modules are in the lists and dicts of an owner whose items its forward calls: others are added to it."""
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
    lists = {
        name: owner.module._modules.get(name)
        for name, _, item in (path.partition(".") for path in sorted(called))
        if item
    }
    return {name: Form(len(each)) for name, each in lists.items() if isinstance(each, nn.ModuleList | nn.ModuleDict)}


def _in_both(
    modes: list[dict[str, Body]], constants: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Write the bodies of eval mode down, with those of training if that differs."""
    evaluated, trained = modes[0], modes[-1]
    for name in evaluated.keys() ^ trained.keys():
        raise Inlined(name, "it computes gated values in one mode alone")
    found = {}
    for name, body in evaluated.items():
        lines, others = lines_of(body.graph), lines_of(trained[name].graph)
        expected = expectations(constants if name == FORWARD else body.constants, settings)
        if name != FORWARD and expected != expectations(trained[name].constants, settings):
            raise Inlined(name, "its arguments differ between the modes")
        if lines != others:
            lines = [["if", {"training": True}, others, lines]]
        found[name] = [*expected, *lines]
    return found


def _edited(
    graph: fx.Graph, guards: Guards, earlier: Sequence[Step], steps: Sequence[Step], inlined: Collection[str]
) -> dict[str, Body]:
    """Copy the graph, pass every step's value through its block for those that are to read it, and take it apart by methods.

    Blocks at one value form a chain, in the order of the steps; those for some readers stand behind those for all.
    """
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, mapping)
    copy.output(output)
    mark_calls(copy, mapping)
    names = {label: mapping[node] for node, label in labels(graph).items() if node in mapping}
    result = returned(graph)
    for_all = {step.block_name: step.readers is None for step in earlier}
    for node in copy.nodes:
        if node.op == "call_module" and node.target in for_all:
            node.meta["for_all"] = for_all[node.target]
    for step in sorted(steps, key=lambda step: step.readers is not None):
        value = mapping[result] if step.value is None and result is not None else names.get(step.value or "")
        if value is None:
            raise SurgeryError(f"its forward has no value `{step.value}` in training mode")
        if step.readers is None:
            _gate(copy, value, step.block_name)
        else:
            _gate_for(copy, value, step.block_name, _readers(names, value, step))
    for node, answer in guards:
        _assert(copy, mapping[node], answer)
    return bodies_of(copy, {step.block_name for step in (*earlier, *steps)}, inlined)


def _gate(graph: fx.Graph, value: fx.Node, block_name: str) -> None:
    """Let all who read the value, or the last of its blocks for all, read a new block's output instead."""
    while (block := next((user for user in value.users if user.meta.get("for_all")), None)) is not None:
        value = block
    write = last_write(value)  # a buffer is gated when it is full
    users = [user for user in value.users if write is None or user > write]
    with graph.inserting_after(value if write is None else write):
        gated = graph.call_module(block_name, (value,))
    _is_in_method_of(write or value, gated)
    gated.meta["for_all"] = True
    for user in users:
        user.replace_input_with(value, gated)


def _gate_for(graph: fx.Graph, value: fx.Node, block_name: str, readers: list[fx.Node]) -> None:
    """Let only these nodes read the gated value, behind the blocks through which they read it already."""
    read = {source for reader in readers for source in reader.all_input_nodes if _ungated(source) is value}
    if len(read) != 1:
        raise SurgeryError("two of its blocks share some of the readers of a value, and not all")
    (source,) = read
    with graph.inserting_before(min(readers)):
        gated = graph.call_module(block_name, (source,))
    _is_in_method_of(min(readers), gated)
    gated.meta["for_all"] = False
    for reader in readers:
        reader.replace_input_with(source, gated)


def _ungated(node: fx.Node) -> fx.Node:
    """Find a value before the blocks in front of it."""
    while "for_all" in node.meta:
        (node,) = node.all_input_nodes
    return node


def _readers(names: dict[str, fx.Node], value: fx.Node, step: Step) -> list[fx.Node]:
    """Find the nodes that a step names as readers of its value."""
    found = [names.get(reader) for reader in step.readers or ()]
    readers = [node for node in found if node is not None and any(_ungated(s) is value for s in node.all_input_nodes)]
    if not readers or len(readers) < len(found):
        raise SurgeryError(f"its value `{step.value}` is not read by {', '.join(step.readers or ()) or 'nobody'}")
    return readers


def _assert(graph: fx.Graph, condition: fx.Node, answer: bool) -> None:
    """Check that a condition that the traced branch depends on still has its answer."""
    holds = condition
    with graph.inserting_after(condition):
        if not answer:
            holds = graph.call_function(operator.not_, (condition,))
    with graph.inserting_after(holds):
        check = graph.call_function(
            torch._assert, (holds, "the input's shape takes another branch than the one edited")
        )
    _is_in_method_of(condition, *{holds, check})


def _is_in_method_of(node: fx.Node, *others: fx.Node) -> None:
    """Note that nodes were put into the call of a method that a node is in."""
    for other in others:
        other.meta["method"] = node.meta.get("method")
