"""Place a block relative to a residual unit y = ReLU(F(x) + S(x)) (Hu et al., section 6.5 and figure 5).

* ``standard``: ReLU(SE(F(x)) + S(x)), at the site itself
* ``pre``: ReLU(F(SE(x)) + S(x)), only the branch reads the gated x
* ``post``: SE(ReLU(F(x) + S(x))), after the addition and its activation
* ``identity``: ReLU(F(x) + SE(S(x))), after the projection if there is one
* ``conv3x3``: inside F, behind the last spatial convolution, its normalisation and activation
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from se_inject.errors import OptionError
from se_inject.sites.additions import addition_of
from se_inject.sites.dataflow import lineage
from se_inject.sites.finder import ledger_of
from se_inject.sites.operations import labels, path_of, returned
from se_inject.sites.residuals import is_given, split
from se_inject.sites.site import Site
from se_inject.tracing import OwnerGraph, Trace, is_data, kind

POSITIONS = ("standard", "pre", "post", "identity", "conv3x3")


@dataclass(frozen=True)
class Place:
    """Where a block goes for one site and position.

    Args:
        owner: path of the module whose forward is edited.
        value: label of the gated value there; None: what the module returns.
        readers: labels of the nodes that read the gated value; None: all that read the value.
        channels: C of the value.
        size: its spatial size.
    """

    owner: str
    value: str | None
    readers: tuple[str, ...] | None
    channels: int
    size: tuple[int, ...]


def place_of(trace: Trace, site: Site, position: str) -> Place:
    """Find the place for a site at a position.

    Raises:
        OptionError: no such position, or none for this site.
    """
    if position not in POSITIONS:
        raise OptionError(f"no position is called `{position}`", seen=", ".join(POSITIONS))
    if position == "standard":
        return Place(site.owner, site.value, None, site.channels, site.size)
    if site.kind != "residual":
        raise OptionError(
            f"position `{position}` is one of residual units", seen=f"`{site.address}` is a {site.kind} site"
        )
    return _Unit(trace, site).place(position)


class _Unit:
    """The parts of one residual unit in its owner's graph."""

    def __init__(self, trace: Trace, site: Site) -> None:
        self.site = site
        self.trace = trace
        self.ledger = ledger_of(trace)
        self.owner = trace.graphs[site.graph]
        self.names = labels(self.owner.graph)
        self.join = next((node for node, label in self.names.items() if label == site.join), None)
        self.common: set[fx.Node] = {node for node in self.owner.graph.nodes if node.op == "placeholder"}
        self.shortcut: fx.Node | None = None
        result = returned(self.owner.graph)
        if self.join is not None:
            self.branch, self.shortcut, self.common = split(self.ledger, self.owner, self.join)
        elif result is not None:
            self.branch = result

    def place(self, position: str) -> Place:
        addition = None if self.join is None else addition_of(self.join)
        if addition is not None and len(addition.operands) > 2 and position != "post":
            raise self._none("adds more than one branch to its shortcut")
        if position == "pre":
            return self._pre()
        if position == "post":
            whole = self.join if self.join is not None else self.branch
            return self._at(self.owner, self.ledger.values.activated(self.owner, whole))
        if position == "identity":
            if self.shortcut is None or self.join is None:
                raise self._none("has no shortcut")
            addition = addition_of(self.join)
            reader = self.join if addition is None else addition.reader
            between = tuple(user for user in self.shortcut.users if user in reader.all_input_nodes)  # `x[:, None]`
            return self._at(self.owner, self.shortcut, (reader,) if reader in self.shortcut.users else between)
        found = self._spatial(self.owner, self.inside)
        if found is None:
            raise self._none("has no spatial convolution in its branch")
        return self._at(*found)

    @property
    def inside(self) -> list[fx.Node]:
        """The branch's nodes, in order."""
        behind = lineage(self.branch) - self.common
        if self.shortcut is not None:
            behind -= lineage(self.shortcut)
        return [node for node in self.owner.graph.nodes if node in behind]

    def _pre(self) -> Place:
        given = set(filter(is_given, self.inside))
        inside = set(self.inside) - given
        before = self.common | given
        starts = {source for node in inside for source in node.all_input_nodes if source in before and is_data(source)}
        if not starts:
            raise self._none("has a branch whose first module is shared with its shortcut")
        if len(starts) != 1:
            raise self._none(f"has a branch that starts from {len(starts)} values")
        (start,) = starts
        return self._at(self.owner, start, tuple(user for user in start.users if user in inside))

    def _spatial(self, owner: OwnerGraph, nodes: list[fx.Node]) -> tuple[OwnerGraph, fx.Node] | None:
        """Find the value behind the last spatial convolution among these nodes, in whatever module it is."""
        for node in reversed(nodes):
            if kind(node) == "conv" and self._is_spatial(node):
                return owner, self.ledger.values.activated(owner, node)
            if node.op != "call_module":
                continue
            inner = self.trace.graphs.get(path_of(node))
            if inner is not None:
                found = self._spatial(inner, list(inner.graph.nodes))
                if found is not None and found[0] is inner and found[1] is returned(inner.graph):
                    return owner, self.ledger.values.activated(owner, node)
                if found is not None:
                    return found
        return None

    def _is_spatial(self, node: fx.Node) -> bool:
        """Return whether a convolution reads more than one position."""
        if node.op == "call_module":
            module = self.ledger.values.module(node)
            return isinstance(module, nn.modules.conv._ConvNd) and any(extent > 1 for extent in module.kernel_size)
        weight = node.args[1] if len(node.args) > 1 else None
        return isinstance(weight, fx.Node) and weight.meta["val"][0, 0].numel() > 1

    def _at(self, owner: OwnerGraph, value: fx.Node, readers: tuple[fx.Node, ...] | None = None) -> Place:
        tensor = value.meta["val"]
        names = labels(owner.graph)
        if readers is None:
            path, label = self.ledger.values.written_back(owner, value, names[value])
            reason = self.ledger.values.refusal(owner, value, path, label)
            if reason:
                raise self._none(f"can't be gated there: {reason}")
            return Place(path, label, None, tensor.shape[1], tuple(tensor.shape[2:]))
        labelled = tuple(names[reader] for reader in readers)
        value = self.ledger.values.past_our_blocks(owner, value)
        return Place(owner.path, names[value], labelled, tensor.shape[1], tuple(tensor.shape[2:]))

    def _none(self, reason: str) -> OptionError:
        return OptionError(f"`{self.site.unit}` {reason}", hint="choose other sites, or position `standard`")
