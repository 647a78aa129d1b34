"""A forward's graph → the same graph with blocks in it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from se_inject.errors import SurgeryError
from se_inject.forwards import expectations, lines_of
from se_inject.sites import labels, last_write, returned
from se_inject.surgery.step import Step
from se_inject.tracing import Trace, Untraceable, training_graph, training_settings


def edited_lines(
    trace: Trace, path: str, earlier: list[Step], steps: list[Step], *, training: bool = True
) -> list[Any]:
    """Return an owner's edited forward as lines: what it was observed with, then both modes if they differ.

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
        lines = lines_of(_edited(owner.graph, owner.guards, earlier, steps))
        settings = dict(owner.settings)
        if training and owner.reads_training:
            other, guards = training_graph(trace, owner)
            if lines_of(other) != lines_of(owner.graph):
                trained = lines_of(_edited(other, guards, earlier, steps))
                lines = [["if", {"training": True}, trained, lines]]
            settings |= training_settings(trace, owner)
        for step in (*earlier, *steps):
            settings.pop(step.block_name, None)  # an attribute that was None is the block's name now
        return [*expectations(owner.constants, settings), *lines]
    except (SurgeryError, Untraceable) as error:
        message = error.message if isinstance(error, SurgeryError) else str(error)
        raise SurgeryError(f"the forward of `{path}` can't be edited", seen=message) from error


def _edited(
    graph: fx.Graph, guards: tuple[tuple[fx.Node, bool], ...], earlier: list[Step], steps: list[Step]
) -> fx.Graph:
    """Copy the graph, and pass every step's value through its block for those that are to read it.

    Blocks at one value form a chain, in the order of the steps; those for some readers stand behind those for all.
    """
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, mapping)
    copy.output(output)
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
    return copy


def _gate(graph: fx.Graph, value: fx.Node, block_name: str) -> None:
    """Let all who read the value, or the last of its blocks for all, read a new block's output instead."""
    while (block := next((user for user in value.users if user.meta.get("for_all")), None)) is not None:
        value = block
    write = last_write(value)  # a buffer is gated when it is full
    users = [user for user in value.users if write is None or user > write]
    with graph.inserting_after(value if write is None else write):
        gated = graph.call_module(block_name, (value,))
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
    with graph.inserting_after(condition):
        if not answer:
            condition = graph.call_function(operator.not_, (condition,))
    with graph.inserting_after(condition):
        graph.call_function(torch._assert, (condition, "the input's shape takes another branch than the one edited"))
