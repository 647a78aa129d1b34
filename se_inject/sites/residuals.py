"""Find residual units: additions whose operands start from a common value.

The operand with fewer convolutions on its shortest path from there is the shortcut. The site is the other one, the branch,
before what only scales it (dropout, stochastic depth, layer scale).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, fx

from se_inject.forwards import class_of
from se_inject.sites.additions import Addition, addition_of, joined_by_custom_operator, operands_of
from se_inject.sites.dataflow import lineage, shared_lineage, since
from se_inject.sites.ledger import Ledger
from se_inject.sites.operations import (
    any_prefix,
    attends,
    child_path,
    convolves,
    joins_channels,
    labels,
    parent,
    returned,
    slice_origins,
    slices_channels,
)
from se_inject.sites.outputs import is_image_output
from se_inject.sites.site import ATTENTION, HeldBack
from se_inject.tracing import OwnerGraph, function_name_of, kind


class Split(NamedTuple):
    """The parts of a residual unit: the branch, the shortcut if there is one, and the values that both start from."""

    branch: fx.Node
    shortcut: fx.Node | None
    common: set[fx.Node]


def residual_units(ledger: Ledger, owner: OwnerGraph) -> None:
    """Find the branches of the additions in one graph; an addition around other units is held back."""
    found: list[tuple[fx.Node, set[fx.Node], HeldBack | None]] = []
    cells = nodes_in_cells(owner)
    for node in owner.graph.nodes:
        _refuse_custom_operator(ledger, owner, node)
        addition = addition_of(node)
        if addition is not None and len(addition.operands) > 2 and node not in cells:
            found += _several_branches(ledger, owner, node, addition)
        if addition is None or len(addition.operands) != 2 or node in cells:
            continue
        common = shared_lineage(addition.operands)
        if not common:
            if any(convolves(behind) for operand in addition.operands for behind in lineage(operand)):
                _postpone(ledger, owner, node, "its operands do not start from one value: it joins, it does not skip")
            continue
        parts = by_depth(ledger, addition.operands, common)
        if parts is None and _attends_to_positions(addition.operands, common):
            _refuse_attention(ledger, owner, node, since(addition.operands, common))
            continue
        if parts is None or is_reparametrised(ledger, *parts, common) or _is_recurrent(ledger, owner, parts[0], common):
            continue  # branches only: a join, or a state
        branch, shortcut = parts
        factors: set[fx.Node] = set().union(*map(lineage, addition.factors))
        inside = (lineage(branch) | factors) - lineage(shortcut)
        own = lineage(shortcut) - common - lineage(branch)
        if _differ_in_channels(inside, own, common):
            _postpone(ledger, owner, node, "its operands start from different channels of one value")
            continue
        around = any(inside & {other} for other, _, _ in found) or ledger.hold_units(inside | own)
        if any(map(attends, inside | own)):
            _refuse_attention(ledger, owner, node, inside | own)
            continue
        held = HeldBack.NESTED if around else None
        is_output = held is None and is_image_output(ledger.trace, owner, node, inside)
        if is_output and ledger.values.layouts.misread(node) is None:
            held = HeldBack.OUTPUT
        found.append((node, inside, held))
        ledger.add(owner, ledger.values.unscaled(owner, branch), "residual", inside | own | {node}, held, node)
    ledger.mark(owner, [nodes for _, nodes, held in found if held is None])


def _several_branches(
    ledger: Ledger, owner: OwnerGraph, node: fx.Node, addition: Addition
) -> list[tuple[fx.Node, set[fx.Node], HeldBack | None]]:
    """Find the branches of a sum of three or more in which one operand is plainly the shortcut: each has a site of its own."""
    common = shared_lineage(addition.operands)
    depths = [ledger.depths.between(operand, common) for operand in addition.operands] if common else []
    if depths.count(0) != 1:
        return []
    shortcut = addition.operands[depths.index(0)]
    branches = [operand for operand in addition.operands if operand is not shortcut]
    inside = since(addition.operands, common) - lineage(shortcut)
    linear = any(is_reparametrised(ledger, branch, shortcut, common) for branch in branches)
    if linear or any(map(attends, inside)) or ledger.hold_units(inside):
        return []
    for branch in branches:
        own = (lineage(branch) - lineage(shortcut)) | {node}
        ledger.add(owner, ledger.values.unscaled(owner, branch), "residual", own, None, node)
    return [(node, inside, None)]


def _attends_to_positions(operands: list[fx.Node], common: set[fx.Node]) -> bool:
    """Return whether one of two operands is attention with convolutions in it, and the other what it starts from."""
    behind = [lineage(operand) - common for operand in operands]
    return any(
        any(map(attends, nodes)) and any(map(convolves, nodes)) and not any(map(convolves, other))
        for nodes, other in (behind, behind[::-1])
    )


def _refuse_attention(ledger: Ledger, owner: OwnerGraph, node: fx.Node, inside: set[fx.Node]) -> None:
    """Write down an addition whose branch is attention between positions."""
    where = child_path(owner.path, labels(owner.graph)[node])
    ledger.refuse(where, ATTENTION)
    if not ledger.hold_units(inside):
        ledger.attending.add(where)


def _refuse_custom_operator(ledger: Ledger, owner: OwnerGraph, node: fx.Node) -> None:
    """Write down a custom operator that puts a branch and its shortcut together."""
    operands = joined_by_custom_operator(node)
    common = shared_lineage(operands) if operands else set()
    if common and by_depth(ledger, operands, common) is not None:
        where = child_path(owner.path, labels(owner.graph)[node])
        ledger.refuse(
            where, f"what the custom operator `{node.target}` does with a branch and its shortcut isn't known"
        )


def _postpone(ledger: Ledger, owner: OwnerGraph, node: fx.Node, reason: str) -> None:
    """Leave an addition for ``two_streams``, or refuse it."""
    if _streams(node) is not None or _given_pair(node) is not None:
        ledger.postponed.append((owner, node, reason))
    else:
        ledger.refuse(child_path(owner.path, labels(owner.graph)[node]), reason)


def two_streams(ledger: Ledger) -> None:
    """Find the units ``a + f(b)`` of two streams, both given to the module: outside of other units, or where it returns the sum."""
    for owner, node, reason in ledger.postponed:
        pair = _given_pair(node)
        opening = None if pair is None else _opening(ledger, owner, *pair)
        if pair is not None and opening is not None:
            branch, _ = pair
            nodes = lineage(branch) | {node}
            if ledger.add(owner, ledger.values.unscaled(owner, branch), "residual", nodes | opening, None, node):
                ledger.mark(owner, [nodes])
            continue
        streams = _streams(node)
        alone = not any_prefix(owner.path, ledger.units) and node not in ledger.inside.get(owner.path, ())
        if streams is not None and _is_handed_on(node) and (alone or owner.path in ledger.units):
            branch, shortcut = streams
            inside = lineage(branch) - lineage(shortcut)
            if ledger.add(owner, ledger.values.unscaled(owner, branch), "residual", inside, None, node):
                ledger.mark(owner, [inside])
            continue
        ledger.refuse(child_path(owner.path, labels(owner.graph)[node]), reason)


def _streams(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return branch and shortcut of a sum of one given value and what convolutions make of another of the same shape."""
    pair = _branch_and_shortcut(node)
    if pair is None:
        return None
    branch, shortcut = pair
    shape = shortcut.meta["val"].shape
    given = [each for each in lineage(shortcut) if isinstance(each.meta["val"], Tensor)]
    if any(each.meta["val"].shape[2:] != shape[2:] for each in given) or not any(map(is_given, given)):
        return None
    others = lineage(branch) - lineage(shortcut)
    return (branch, shortcut) if any(is_given(each) and each.meta["val"].shape == shape for each in others) else None


def _given_pair(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return branch and shortcut of a sum of an argument as it is and what convolutions make of others."""
    pair = _branch_and_shortcut(node)
    if pair is None or pair[1].op != "placeholder" or pair[1] in lineage(pair[0]):
        return None
    return pair


def _branch_and_shortcut(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the two operands of a sum, the one with convolutions first; None unless exactly one has some."""
    operands = operands_of(node, "add")
    branch = _only_deep(operands) if len(operands) == 2 else None
    if branch is None:
        return None
    (shortcut,) = set(operands) - {branch}
    return branch, shortcut


def _opening(ledger: Ledger, owner: OwnerGraph, branch: fx.Node, shortcut: fx.Node) -> set[fx.Node] | None:
    """Return the caller's part of a unit: how it made the argument that the branch starts from of the shortcut, ``last(x, f(x))``.

    None if it made it of something else.
    """
    started = {id(node.meta["val"]) for node in lineage(branch) if node.op == "placeholder"}
    found: set[fx.Node] = set()
    for caller, call in ledger.callers.get(owner.path, ()):
        given = {id(node.meta["val"]): node for node in call.all_input_nodes}
        before = given.get(id(shortcut.meta["val"]))
        starts = [node for key, node in given.items() if key in started]
        if before is None or not starts or not all(before in lineage(node) for node in starts):
            return None
        inside = set().union(*map(lineage, starts)) - lineage(before)
        ledger.mark(caller, [inside | {call}])
        found |= inside
    return found or None


def is_given(node: fx.Node) -> bool:
    """Return whether a value is an argument of the module, or part of one."""
    while function_name_of(node) in ("getitem", "chunk", "split", "tensor_split", "narrow") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _is_handed_on(node: fx.Node) -> bool:
    """Return whether a sum is one of the streams that the module returns, activated or not: no convolution of its own reads it alone (Res2Net's does)."""
    return any(
        user.op == "output" or kind(user) == "cat" or (kind(user) in ("act", "norm", "pass") and _is_handed_on(user))
        for user in node.users
    )


def units_without_shortcut(ledger: Ledger, owners: list[OwnerGraph], *, anywhere: bool = False) -> None:
    """Find blocks of the same class as a residual unit, near one, whose shortcut is missing or is its caller's.

    Without one it is gated at what it returns.

    Args:
        ledger: what has been found.
        owners: the modules.
        anywhere: instead those anywhere in the network that return another shape than they read, so that they can have none.
    """
    kin: dict[str, set[Any]] = {}
    for site in ledger.found.values():
        if site.held_back is not HeldBack.NESTED:
            for near in ("*",) if anywhere else (parent(site.unit), parent(parent(site.unit))):
                kin.setdefault(near, set()).add(class_of(ledger.trace.model.get_submodule(site.graph)))
    for owner in owners:
        if anywhere:
            classes = kin.get("*", set()) if _changes_shape(owner) else set()
        else:
            classes = kin.get(parent(owner.path), set()) | kin.get(parent(parent(owner.path)), set())
        if not owner.path or owner.path in ledger.around or any_prefix(owner.path, ledger.units):
            continue
        result = returned(owner.graph)
        if class_of(owner.module) not in classes or result is None or not any(map(convolves, lineage(result))):
            continue
        join, branch = _given_shortcut(owner) or (None, result)
        value = ledger.values.unscaled(owner, branch)
        if ledger.add(owner, value, "residual", lineage(result), None, join):
            ledger.mark(owner, [lineage(result)])


def _changes_shape(owner: OwnerGraph) -> bool:
    """Return whether a module returns a map of another shape than the one that it reads."""
    result = returned(owner.graph)
    given = [node.meta["val"] for node in owner.graph.nodes if node.op == "placeholder"]
    maps = [value for value in given if isinstance(value, Tensor)]
    return result is not None and len(maps) == 1 and maps[0].shape != result.meta["val"].shape


def split(ledger: Ledger, owner: OwnerGraph, join: fx.Node) -> Split:
    """Divide an addition that is a residual unit's into its parts."""
    operands = operands_of(join, "add")
    common = shared_lineage(operands)
    if not common and (branch := _only_deep(operands)) is not None:
        (shortcut,) = set(operands) - {branch}
        return Split(branch, shortcut, {node for node in owner.graph.nodes if node.op == "placeholder"})
    parts = by_depth(ledger, operands, common)
    return Split(join, None, common) if parts is None else Split(*parts, common)


def by_depth(ledger: Ledger, operands: list[fx.Node], common: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Return the branch and the shortcut: with more convolutions on the shortest path, and with fewer; None if equal, or of more than two.

    If a path without convolutions leads to both, the one without any is the shortcut (``x + cat([x1, f(x2)])``), unless the
    other is linear.
    """
    if len(operands) != 2:
        return None
    one, other = operands
    depths = [ledger.depths.between(operand, common) for operand in operands]
    if depths == [0, 0]:
        depths = [ledger.depths.between(operand, common, longest=True) for operand in operands]
        if min(depths) > 0 or not any(
            ledger.depths.contains(node, "act") for node in lineage(one) | lineage(other) - common
        ):
            return None
    return None if depths[0] == depths[1] else (one, other) if depths[0] > depths[1] else (other, one)


def is_reparametrised(ledger: Ledger, branch: fx.Node, shortcut: fx.Node, common: set[fx.Node]) -> bool:
    """Return whether a sum is of linear branches, one of them the normalised input alone, as RepVGG's is in training."""
    if ledger.depths.between(shortcut, common) or ledger.depths.is_bare(shortcut, common):
        return False
    return not any(ledger.depths.contains(node, "act") for node in lineage(branch) - common)


def _is_recurrent(ledger: Ledger, owner: OwnerGraph, branch: fx.Node, common: set[fx.Node]) -> bool:
    """Return whether an addition updates a state, as a gated recurrent unit's does: its module is called again, and gates lead to it."""
    return ledger.trace.calls.get(owner.path, 0) > 1 and not ledger.depths.between(branch, common)


def nodes_in_cells(owner: OwnerGraph) -> set[fx.Node]:
    """Return all within the concatenations of sums (NASNet's cells): these have the site, not the sums.

    The halves of a reversible unit, ``cat(a + f(b), b + g(a + f(b)))``, are no cell.
    """
    inside: set[fx.Node] = set()
    for node in owner.graph.nodes:
        sums = [operand for operand in operands_of(node, "cat") if kind(operand) == "add"]
        if len(sums) > 1 and joins_channels(node) and not all(map(_is_coupled, sums)):
            inside |= lineage(node)
    return inside


def _is_coupled(node: fx.Node) -> bool:
    """Return whether a sum changes some channels of a given value by what convolutions make of others."""
    pair = _branch_and_shortcut(node)
    return pair is not None and slices_channels(pair[1]) and is_given(pair[1])


def _differ_in_channels(inside: set[fx.Node], own: set[fx.Node], common: set[fx.Node]) -> bool:
    """Return whether branch and shortcut start from different channels of a common value."""
    slices = set(filter(slices_channels, own))
    return any(slice_origins(each) & common for each in slices) or (
        bool(slices) and not any(map(slices_channels, inside))
    )


def _only_deep(operands: list[fx.Node]) -> fx.Node | None:
    """Return the one of two operands with convolutions behind it; None if both have some, or neither."""
    deep = [operand for operand in operands if any(map(convolves, lineage(operand)))]
    return deep[0] if len(deep) == 1 else None


def _given_shortcut(owner: OwnerGraph) -> tuple[fx.Node, fx.Node] | None:
    """Return the last addition whose one operand is the caller's, and its other operand."""
    for node in reversed(owner.graph.nodes):
        pair = _branch_and_shortcut(node)
        if pair is not None:
            return node, pair[0]
    return None
