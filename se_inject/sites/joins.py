"""Find sites at concatenations along the channels and at sums of branches of equal depth that start from a common value.

Inception, Fire, CSP, shuffle units, RepVGG. The site is the joined value; if a convolution follows in the same module, what
that module returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, fx, nn

from se_inject.forwards import class_of
from se_inject.sites.additions import addition_of, operands_of
from se_inject.sites.dataflow import lineage, shared_lineage, since
from se_inject.sites.ledger import Ledger
from se_inject.sites.operations import child_path, convolves, joins_channels, labels, parent, path_of, returned
from se_inject.sites.residuals import by_depth, is_reparametrised, nodes_in_cells
from se_inject.sites.site import HeldBack, Site
from se_inject.tracing import OwnerGraph, kind, sources

_SITE_KINDS = {"add": "sum", "cat": "concat"}


class _Join(NamedTuple):
    node: fx.Node
    kind: str
    inside: set[fx.Node]


def joined_branches(ledger: Ledger, owner: OwnerGraph) -> None:
    """Find the concatenations and sums of branches in one graph, the outermost of nested ones."""
    if ledger.is_in_unit(owner):
        return
    joins: list[_Join] = []
    taken = set(ledger.inside.get(owner.path, ()))
    cells = nodes_in_cells(owner)
    for node in reversed(owner.graph.nodes):
        join = None if node in taken else _join(ledger, node, cells)
        if join is None:
            continue
        if _is_iterated(join):
            where = child_path(owner.path, labels(owner.graph)[node])
            ledger.refuse(where, "it is one turn of several: a module in it is called again on its own result")
            continue
        if class_of(owner.module) in ledger.skips:
            where = child_path(owner.path, labels(owner.graph)[node])
            ledger.refuse(where, "it joins a value with what smaller resolutions made of it, as a U-Net does")
            continue
        if _mixes_resolutions(join):
            where = child_path(owner.path, labels(owner.graph)[node])
            ledger.refuse(where, "it joins values that came from different resolutions")
            continue
        taken |= join.inside
        joins.append(join)
    for join in reversed(joins):
        value = ledger.values.activated(owner, _joined_value(owner, join.node, alone=len(joins) == 1))
        over_units = ledger.hold_units(join.inside) or join.inside & ledger.inside.get(owner.path, set())
        held = HeldBack.NESTED if over_units else None
        if ledger.add(owner, value, join.kind, join.inside, held, join.node) and held is None:
            ledger.mark(owner, [join.inside])
            for layer in _dense_layers(join.node):
                ledger.add(owner, layer, join.kind, lineage(layer), HeldBack.DENSE)


def skips(ledger: Ledger, owners: list[OwnerGraph]) -> None:
    """Find the classes of modules that do nothing but put a value beside what smaller resolutions made of it: the skips of a U-Net.

    The innermost of such modules may keep the resolution: it is of the same class as the others.
    """
    for owner in owners:
        joins = [node for node in owner.graph.nodes if kind(node) == "cat"]
        operands = operands_of(joins[0], "cat") if len(joins) == 1 and owner.path else []
        if len(operands) != 2 or isinstance(owner.module, nn.Sequential) or not joins_channels(joins[0]):
            continue
        common = shared_lineage(operands)
        depths = [ledger.depths.between(operand, common) for operand in operands] if common else []
        if depths and min(depths) < 1 <= max(depths):
            inside = since(operands, common)
            if _shrinks(ledger, inside, joins[0].meta["val"].shape[2:].numel()):
                ledger.skips.add(class_of(owner.module))


def _shrinks(ledger: Ledger, nodes: Iterable[fx.Node], size: int) -> bool:
    """Return whether a convolution among these nodes, or in a module that they call, has fewer positions, and more than one."""
    for node in nodes:
        value = node.meta.get("val")
        if kind(node) == "conv" and isinstance(value, Tensor) and 1 < value.shape[2:].numel() < size:
            return True
        inner = ledger.trace.graphs.get(path_of(node)) if kind(node) == "module" and convolves(node) else None
        if inner is not None and _shrinks(ledger, inner.graph.nodes, size):
            return True
    return False


def dense_blocks(ledger: Ledger) -> None:
    """Make one site of each run of layers that put what they compute beside what they read (``cat([x, f(x)])``).

    A layer of such a run reads what the one before returned. The run's site is the last one's; the layers are held back.
    """
    layers = [layer for site in ledger.found.values() if (layer := _self_concatenating(ledger, site)) is not None]
    by_input = {id(layer.given.meta["val"]): layer for layer in layers}
    followed = {id(layer.join.meta["val"]) for layer in layers} & set(by_input)
    followers = {layer.site.address for key in followed for layer in [by_input[key]]}
    runs = {layer.site.address for layer in layers if id(layer.join.meta["val"]) in followed} | followers
    for layer in layers:
        if layer.site.address not in runs:
            continue
        site, container = layer.site, parent(layer.site.unit)
        if id(layer.join.meta["val"]) in followed:
            del ledger.found[site.address]
        elif container:
            ledger.found[site.address] = replace(site, unit=container, container=parent(container))
        for new in layer.new:
            ledger.add(layer.owner, new, "concat", lineage(new), HeldBack.DENSE, layer.join)


class _Layer(NamedTuple):
    """A module that returns a concatenation of what it reads with what it computes."""

    site: Site
    owner: OwnerGraph
    join: fx.Node
    given: fx.Node
    new: list[fx.Node]


def _self_concatenating(ledger: Ledger, site: Site) -> _Layer | None:
    """Return the layer that a site belongs to, if its module returns a concatenation of its input and new values."""
    owner = ledger.trace.graphs[site.graph]
    result = returned(owner.graph)
    if site.kind != "concat" or site.held_back is not None or result is None or not owner.path:
        return None
    operands = operands_of(result, "cat")
    given = [operand for operand in operands if operand.op == "placeholder"]
    new = [operand for operand in operands if operand.op != "placeholder"]
    return _Layer(site, owner, result, given[0], new) if len(given) == 1 and new else None


def _join(ledger: Ledger, node: fx.Node, cells: set[fx.Node]) -> _Join | None:
    """Return the join that a node is, if its operands are branches of one unit."""
    operation = "cat" if kind(node) == "cat" else "add"
    operands = operands_of(node, operation)
    if len(operands) < 2 or (operation == "cat" and not joins_channels(node)):
        return None
    common = shared_lineage(operands)
    inside = since(operands, common)
    if not (common or node in cells) or not any(map(convolves, inside)):
        return None
    if operation == "add":
        addition = addition_of(node)
        if addition is None or not addition.is_plain:
            return None
        if max(ledger.depths.between(operand, common) for operand in operands) < 1:
            return None
        parts = by_depth(ledger, operands, common)
        if parts and not is_reparametrised(ledger, *parts, common):
            return None
    return _Join(node, _SITE_KINDS[operation], inside)


def _is_iterated(join: _Join) -> bool:
    """Return whether a module behind a join is called on what an earlier call of it gave."""
    calls = [node for node in join.inside if node.op == "call_module" and convolves(node)]
    repeated = {node.target for node in calls if [each.target for each in calls].count(node.target) > 1}
    return any(
        before.target == node.target and before in lineage(node) and before is not node
        for node in calls
        if node.target in repeated
        for before in calls
    )


def _mixes_resolutions(join: _Join) -> bool:
    """Return whether a value behind a join is smaller than the join."""
    size = join.node.meta["val"].shape[2:].numel()
    values = [node.meta["val"] for node in join.inside]
    maps = [value for value in values if isinstance(value, Tensor) and value.dim() > 2]
    return any(0 < value.shape[2:].numel() < size for value in maps)


def _joined_value(owner: OwnerGraph, node: fx.Node, *, alone: bool) -> fx.Node:
    """Return what is gated: the join itself, or what the module returns if convolutions follow at this resolution."""
    result = returned(owner.graph)
    if not alone or result is None or not owner.path or node not in sources(result):
        return node
    after = lineage(result) - lineage(node)
    same_size = result.meta["val"].shape[2:] == node.meta["val"].shape[2:]
    return result if any(map(convolves, after)) and same_size else node


def _dense_layers(join: fx.Node) -> list[fx.Node]:
    """Return the modules whose outputs a concatenation puts together, if one of them reads another's."""
    layers = [operand for operand in operands_of(join, "cat") if operand.op == "call_module" and convolves(operand)]
    return layers if any(sources(one) & set(layers) for one in layers) else []
