"""Describe a unit for people: its branches as operations in a row, where they join, what comes after."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from se_inject.sites.additions import addition_of
from se_inject.sites.dataflow import lineage, shared_lineage
from se_inject.sites.finder import ledger_of
from se_inject.sites.operations import labels, path_of, returned
from se_inject.sites.residuals import split
from se_inject.sites.site import Site
from se_inject.tracing import OwnerGraph, Trace, function_name_of, is_data, is_leaf, kind

_MOST = 24
"""Operations of one branch that are listed; more are counted."""


@dataclass(frozen=True)
class Operation:
    """One operation of a unit.

    Args:
        kind: ``conv``, ``norm``, ``act``, ``pool``, ``mul``, ``module``, ``block`` (one of ours), ``other``, or ``end`` for
            the value of a module whose operations come before.
        text: a few letters that say what it is: ``3×3 /2``, ``BN``, ``ReLU``.
        owner: path of the module in whose forward it stands.
        label: the label of its value there.
        path: of the module that it is; empty for a function.
    """

    kind: str
    text: str
    owner: str
    label: str
    path: str = ""


@dataclass(frozen=True)
class Parts:
    """A unit taken apart.

    Args:
        lanes: the operations of each branch, in order; of a residual unit the branch first, then the shortcut.
        join: ``add`` or ``cat``; None if nothing is joined.
        after: the operations behind the join.
    """

    lanes: tuple[tuple[Operation, ...], ...]
    join: str | None
    after: tuple[Operation, ...]


def parts_of(trace: Trace, site: Site, blocks: frozenset[str] = frozenset()) -> Parts:
    """Take the unit of a site apart. What can't be determined is left out: this is for pictures, not for decisions.

    Args:
        trace: an observed call.
        site: one of its sites.
        blocks: paths of blocks of ours in the network, which are listed as operations of the kind ``block``.
    """
    owner = trace.graphs.get(site.graph)
    if owner is None:
        return Parts(((),), None, ())
    names = labels(owner.graph)
    join = None if site.join is None else next((node for node, label in names.items() if label == site.join), None)
    if join is None:
        owner, value = _value(trace, owner, site)
        chain = [] if value is None else _run(trace, owner, value) if site.kind == "conv" else _ordered(owner, value)
        return Parts((_operations(trace, owner, chain, blocks),), None, ())
    if site.kind == "residual":
        branch, shortcut, common = split(ledger_of(trace), owner, join)
        ends = [branch] if shortcut is None else [branch, shortcut]
    else:
        ends = [source for source in join.all_input_nodes if is_data(source)]
        common = shared_lineage(ends)
    lanes = []
    for end in ends:
        others = {other for other in ends if other is not end}
        before = set().union(*(lineage(other) | {other} for other in others if other in lineage(end)), common)
        lanes.append(_operations(trace, owner, _ordered(owner, end, before), blocks))
    return Parts(
        tuple(lanes), "cat" if kind(join) == "cat" else "add", _operations(trace, owner, _behind(join), blocks)
    )


def _value(trace: Trace, owner: OwnerGraph, site: Site) -> tuple[OwnerGraph, fx.Node | None]:
    """Find the gated value, and the graph it is in: the result of a module without a graph is a value of its caller."""
    if site.owner in trace.graphs:
        owner = trace.graphs[site.owner]
        names = labels(owner.graph)
        return owner, next((node for node, label in names.items() if label == site.value), None) or returned(
            owner.graph
        )
    for node in owner.graph.nodes:
        if node.op == "call_module" and path_of(node) == site.owner:
            return owner, node
    return owner, returned(owner.graph)


def _ordered(owner: OwnerGraph, end: fx.Node, common: set[fx.Node] | None = None) -> list[fx.Node]:
    """List the nodes that a value is computed from, in order, without those that other branches start from too."""
    inside = (lineage(end) | {end}) - (common or set())
    return [node for node in owner.graph.nodes if node in inside and node.op != "placeholder"]


def _run(trace: Trace, owner: OwnerGraph, value: fx.Node) -> list[fx.Node]:
    """Go back from a value to the convolution before it, or to the two of a separable one."""
    found: list[fx.Node] = []
    node: fx.Node | None = value
    convolutions = 0
    while node is not None and node.op != "placeholder" and convolutions < 2:
        if convolutions and kind(node) in ("act", "norm", "pool", "module"):
            break
        found.append(node)
        convolutions += kind(node) in ("conv", "module")
        data = [source for source in node.all_input_nodes if is_data(source)]
        node = data[0] if len(data) == 1 else None
    while found and convolutions == 2 and kind(found[-1]) == "conv":
        if _groups(trace, found[-1]) > 1:
            break
        found.pop()
        convolutions -= 1
    return found[::-1]


def _behind(join: fx.Node) -> list[fx.Node]:
    """List the nodes after a join, as long as each has one reader."""
    found: list[fx.Node] = []
    node = join
    while len(node.users) == 1 and (user := next(iter(node.users))).op != "output":
        if sum(is_data(source) for source in user.all_input_nodes) > 1:
            break
        found.append(user)
        node = user
    return found[:4]


def _operations(trace: Trace, owner: OwnerGraph, nodes: list[fx.Node], blocks: frozenset[str]) -> tuple[Operation, ...]:
    found: list[Operation] = []
    names = labels(owner.graph)
    for node in nodes:
        what = "add" if addition_of(node) is not None else kind(node)
        path = path_of(node) if node.op == "call_module" else ""
        if path in blocks:
            found.append(Operation("block", "", owner.path, names.get(node, ""), path))
            continue
        inner = trace.graphs.get(path) if path else None
        if what == "module" and inner is not None and len(inner.graph.nodes) <= _MOST:
            result = returned(inner.graph)
            if result is not None:
                found += _operations(trace, inner, _ordered(inner, result), blocks)
                found.append(Operation("end", "", owner.path, names.get(node, ""), path))
            continue
        if what == "pass" or (not is_data(node) and what != "module"):
            if found:
                found.append(Operation("end", "", owner.path, names.get(node, "")))
            continue
        found.append(Operation(what, _text(trace, node, what), owner.path, names.get(node, ""), path))
    return tuple(found)


def _text(trace: Trace, node: fx.Node, what: str) -> str:
    module = node.meta.get("module")
    if what == "add":
        return "+"
    if what == "mul":
        return "×"
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module)
    name = type(module).__name__ if module is not None else function_name_of(node).strip("_")
    if what == "conv":
        return "conv" if module is None else name
    for long, brief in _BRIEF.items():
        if name.startswith(long):
            return brief
    return name if len(name) <= 14 else name[:13] + "…"


def _convolution(module: nn.modules.conv._ConvNd) -> str:
    size = "×".join(map(str, module.kernel_size)) if len(module.kernel_size) > 1 else f"k{module.kernel_size[0]}"
    stride = max(module.stride)
    groups = "" if module.groups == 1 else " dw" if module.groups == module.in_channels else f" g{module.groups}"
    up = "↑" if module.transposed else ""
    return f"{up}{size}{groups}" + (f" /{stride}" if stride > 1 and not up else "")


_BRIEF = {
    "BatchNorm": "BN", "FrozenBatchNorm": "BN", "SyncBatchNorm": "BN", "batch_norm": "BN", "LayerNorm": "LN", "layer_norm": "LN",
    "GroupNorm": "GN", "group_norm": "GN", "InstanceNorm": "IN", "relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "MaxPool": "max pool",
    "max_pool": "max pool", "AvgPool": "avg pool", "avg_pool": "avg pool", "AdaptiveAvgPool": "mean", "boolean_dispatch": "pool",
    "Hardswish": "h-swish", "hardswish": "h-swish", "Hardsigmoid": "h-sigmoid", "iadd": "+", "concat": "concat", "cat": "concat",
}  # fmt: skip


def _groups(trace: Trace, node: fx.Node) -> int:
    if node.op != "call_module":
        return 1
    module = trace.model.get_submodule(path_of(node))
    return getattr(module, "groups", 1) if is_leaf(module) else 1
