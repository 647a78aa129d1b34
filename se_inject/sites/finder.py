"""Trace → sites: the rules by which places for blocks are found, one for each kind.

What is looked for is structure, never a name.

* **residual**: an addition whose operands start from a common value, one of them with fewer convolutions on its
  shortest way: the shortcut. The site is the other one, the branch, before what only scales it (dropout, stochastic
  depth, layer scale). Blocks of the same class beside such a unit that have no addition are gated at their output.
* **concat**, **sum**: a concatenation along the channels, or a sum of branches of equal depth, from a common value at one
  resolution (Inception, Fire, CSP, shuffle units, RepVGG). The site is the joined value; if a convolution follows in
  the same module, what that module returns.
* **conv**: what follows a run of convolutions: its normalisation and activation. A depthwise convolution and the
  pointwise one behind it are one run. Only networks without units of the other kinds have these in their stages.

Within one another, the inner unit has the site: an outer addition or concatenation over units is held back.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from se_inject.forwards import class_of
from se_inject.sites.chains import Chains
from se_inject.sites.dataflow import Depths, lineage, shared_lineage
from se_inject.sites.editability import Values
from se_inject.sites.operations import (
    any_prefix,
    child_path,
    convolutions,
    is_data,
    joins_channels,
    labels,
    parent,
    prefixes,
    returned,
    slice_origins,
    slices_channels,
)
from se_inject.sites.selection import ATTENDED, DENSE, HEAD, INJECTED, NESTED, OUTSIDE, Refusal, Site, Sites
from se_inject.sites.stages import staged
from se_inject.tracing import OwnerGraph, Trace, is_gating, observe_model, sources


def find_sites(model: nn.Module, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None) -> Sites:
    """Find every place of a network that a block could gate, by stage, and those refused. Changes nothing.

    Args:
        model: the network.
        example_inputs: as for ``plan``.
        example_kwargs: as for ``plan``.

    Raises:
        TraceError: the network's own forward fails on the inputs.
    """
    return sites_in(observe_model(model, example_inputs, example_kwargs))


def sites_in(trace: Trace) -> Sites:
    """Every site of an observed network, grouped into stages. Nothing is changed.

    Returns:
        the sites that nothing holds back chosen, the others in ``all_sites``.
    """
    if trace not in _FOUND:
        finder = Finder(trace)
        sites = staged(trace, finder.sites())
        failed = (Refusal(path or "(the network)", reason) for path, reason in trace.failures.items())
        chosen = tuple(site for site in sites if site.stage is not None and site.held_back is None)
        _FOUND[trace] = Sites(chosen, (*failed, *finder.refused), sites, trace.size)
    return _FOUND[trace]


_FOUND: weakref.WeakKeyDictionary[Trace, Sites] = weakref.WeakKeyDictionary()
"""The sites of every trace that is still in use: a trace is a value, and to look again costs seconds on long networks."""


class Finder:
    """One pass over the one-level graphs for each rule, children before their parents."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.refused: list[Refusal] = []
        self.found: dict[str, Site] = {}
        self.units: set[str] = set()
        """Modules that are units, and modules called within one: plain convolutions in them are the unit's own."""
        self.around: set[str] = set()
        """Modules that hold a unit, at any depth."""
        self.inside: dict[str, set[fx.Node]] = {}
        """For each graph, the nodes within its units."""
        self.values = Values(trace)
        self.depths = Depths(trace)

    def sites(self) -> list[Site]:
        graphs = []
        for owner in self.trace.graphs.values():
            if owner.path in self.trace.without_grad:
                self._refuse(owner.path, "it runs without grad: a block in it could not be trained")
            elif len(self.trace.kinds.get(owner.path, ())) > 1:
                self._refuse(owner.path, "it is called with different kinds of arguments")
            else:
                graphs.append(owner)
        for owner in graphs:
            self._residuals(owner)
        self._units_without_shortcut(graphs)
        for owner in graphs:
            self._joins(owner)
        units = any(site.held_back != NESTED for site in self.found.values())
        chains = Chains(self.values)
        for owner in graphs:
            if not any_prefix(owner.path, self.units):
                for value, activated in chains.ends(owner, self.inside.get(owner.path, set())):
                    held = OUTSIDE if units else None if activated else HEAD
                    self._add(owner, value, "conv", self._readers(owner, value), held)
        return self._named(sorted(self.found.values(), key=lambda site: site.order))

    def _readers(self, owner: OwnerGraph, value: fx.Node) -> Iterator[fx.Node]:
        """Who reads a value, also past what only hands it on."""
        for user in value.users:
            yield user
            if self.values.kind(owner, user) == "pass":
                yield from self._readers(owner, user)

    def _residuals(self, owner: OwnerGraph) -> None:
        """The branches of the additions in one graph; an addition around other units is held back."""
        found: list[tuple[fx.Node, set[fx.Node], str | None]] = []
        cells = self._cells(owner)
        for node in owner.graph.nodes:
            operands = self._operands(owner, node, "add")
            if len(operands) != 2 or node in cells:
                continue
            common = shared_lineage(operands)
            where = child_path(owner.path, labels(owner.graph)[node])
            if not common:
                if any(convolutions(behind) for operand in operands for behind in lineage(operand)):
                    self._refuse(where, "its operands do not start from one value: it joins, it does not skip")
                continue
            parts = self._parts(owner, operands, common)
            if parts is None or self._is_reparametrised(owner, *parts, common):
                continue  # branches only: a join
            branch, shortcut = parts
            inside = lineage(branch) - lineage(shortcut)
            own = lineage(shortcut) - common
            slices = set(filter(slices_channels, own))
            if any(slice_origins(each) & common for each in slices) or (
                slices and not any(map(slices_channels, inside))
            ):
                self._refuse(where, "its operands start from different channels of one value")
                continue
            around = any(inside & {other} for other, _, _ in found) or self._hold_units(owner, inside | own)
            if any(node.meta.get("counts", (0, 0, 0, 0))[3] for node in inside | own):
                self._refuse(where, "its branch is attention between positions, which is left alone")
                continue
            value = self.values.unscaled(owner, branch)
            found.append((node, inside, NESTED if around else None))
            self._add(owner, value, "residual", inside | own, found[-1][2], node)
        self._mark(owner, [nodes for _, nodes, held in found if held is None])

    def _cells(self, owner: OwnerGraph) -> set[fx.Node]:
        """All within the concatenations of sums (NASNet's cells): these have the site, not the sums."""
        inside: set[fx.Node] = set()
        for node in owner.graph.nodes:
            operands = self._operands(owner, node, "cat")
            sums = [operand for operand in operands if self.values.kind(owner, operand) == "add"]
            if len(sums) > 1 and joins_channels(node):
                inside |= lineage(node)
        return inside

    def split(self, owner: OwnerGraph, join: fx.Node) -> tuple[fx.Node, fx.Node | None, set[fx.Node]]:
        """Branch and shortcut of an addition that is a residual unit's, and the values that both start from."""
        operands = self._operands(owner, join, "add")
        common = shared_lineage(operands)
        if not common and (branch := self._only_deep(operands)) is not None:
            (shortcut,) = set(operands) - {branch}
            return branch, shortcut, {node for node in owner.graph.nodes if node.op == "placeholder"}
        parts = self._parts(owner, operands, common)
        return (join, None, common) if parts is None else (*parts, common)

    def _only_deep(self, operands: list[fx.Node]) -> fx.Node | None:
        """The one of two operands with convolutions behind it; None if both have some, or neither."""
        deep = [operand for operand in operands if any(map(convolutions, lineage(operand)))]
        return deep[0] if len(deep) == 1 else None

    def _parts(
        self, owner: OwnerGraph, operands: list[fx.Node], common: set[fx.Node]
    ) -> tuple[fx.Node, fx.Node] | None:
        """The branch and the shortcut: with more convolutions on the shortest way, and with fewer."""
        one, other = operands
        depths = [self.depths.between(owner, operand, common) for operand in operands]
        return None if depths[0] == depths[1] else (one, other) if depths[0] > depths[1] else (other, one)

    def _is_reparametrised(self, owner: OwnerGraph, branch: fx.Node, shortcut: fx.Node, common: set[fx.Node]) -> bool:
        """Whether a sum is of linear branches, one of them the normalised input alone, as RepVGG's is in training."""
        if self.depths.between(owner, shortcut, common) or self.depths.is_bare(owner, shortcut, common):
            return False
        return not any(self.depths.contains(owner.path, node, "act") for node in lineage(branch) - common)

    def behind(self, node: fx.Node) -> set[fx.Node]:
        """A node and every tensor it was computed from."""
        return lineage(node)

    def _units_without_shortcut(self, graphs: list[OwnerGraph]) -> None:
        """A block of the same class as a residual unit, near one, whose shortcut is missing or is its caller's.

        Without one it is gated at what it returns.
        """
        kin: dict[str, set[Any]] = {}
        for site in self.found.values():
            if site.held_back != NESTED:
                kind = class_of(self.trace.model.get_submodule(site.unit if site.unit == site.owner else site.owner))
                for near in (parent(site.unit), parent(parent(site.unit))):
                    kin.setdefault(near, set()).add(kind)
        for owner in graphs:
            kinds = kin.get(parent(owner.path), set()) | kin.get(parent(parent(owner.path)), set())
            if not owner.path or owner.path in self.around or any_prefix(owner.path, self.units):
                continue
            result = returned(owner.graph)
            if class_of(owner.module) not in kinds or result is None or not any(map(convolutions, lineage(result))):
                continue
            join, branch = self._given_shortcut(owner) or (None, result)
            value = self.values.unscaled(owner, branch)
            if self._add(owner, value, "residual", lineage(result), None, join):
                self._mark(owner, [lineage(result)])

    def _given_shortcut(self, owner: OwnerGraph) -> tuple[fx.Node, fx.Node] | None:
        """The last addition whose one operand is the caller's, and its other operand."""
        for node in reversed(owner.graph.nodes):
            operands = self._operands(owner, node, "add")
            branch = self._only_deep(operands) if len(operands) == 2 else None
            if branch is not None:
                return node, branch
        return None

    def _joins(self, owner: OwnerGraph) -> None:
        """Concatenations and sums of branches in one graph, the outermost of nested ones."""
        if any_prefix(owner.path, self.units):
            return
        joins: list[tuple[fx.Node, str, set[fx.Node]]] = []
        taken = set(self.inside.get(owner.path, ()))
        cells = self._cells(owner)
        for node in reversed(owner.graph.nodes):
            kind = self.values.kind(owner, node)
            operands = self._operands(owner, node, kind)
            if (
                kind not in ("add", "cat")
                or len(operands) < 2
                or node in taken
                or (kind == "cat" and not joins_channels(node))
            ):
                continue
            common = shared_lineage(operands)
            inside = set().union(*map(lineage, operands)) - common
            if not (common or node in cells) or not any(map(convolutions, inside)):
                continue
            if kind == "add" and max(self.depths.between(owner, operand, common) for operand in operands) < 1:
                continue
            parts = self._parts(owner, operands, common) if kind == "add" else None
            if parts and not self._is_reparametrised(owner, *parts, common):
                continue
            size = node.meta["val"].shape[2:].numel()
            if any(
                0 < behind.meta["val"].shape[2:].numel() < size for behind in inside if behind.meta["val"].dim() > 2
            ):
                where = child_path(owner.path, labels(owner.graph)[node])
                self._refuse(where, "it joins values that came from different resolutions")
                continue
            taken |= inside
            joins.append((node, {"add": "sum", "cat": "concat"}[kind], inside))
        result = returned(owner.graph)
        for node, kind, inside in reversed(joins):
            value = node
            if len(joins) == 1 and result is not None and node in sources(result) and owner.path:
                after = lineage(result) - lineage(node)
                if any(map(convolutions, after)) and result.meta["val"].shape[2:] == node.meta["val"].shape[2:]:
                    value = result
            held = NESTED if self._hold_units(owner, inside) else None
            if self._add(owner, self.values.activated(owner, value), kind, inside, held, node) and held is None:
                self._mark(owner, [inside])
                for layer in self._dense_layers(owner, node):
                    self._add(owner, layer, kind, lineage(layer), DENSE)

    def _dense_layers(self, owner: OwnerGraph, join: fx.Node) -> list[fx.Node]:
        """The modules whose outputs a concatenation puts together, if one of them reads another's."""
        operands = self._operands(owner, join, "cat")
        layers = [operand for operand in operands if operand.op == "call_module" and convolutions(operand)]
        return layers if any(sources(one) & set(layers) for one in layers) else []

    def _mark(self, owner: OwnerGraph, inner: list[set[fx.Node]]) -> None:
        """Remember what belongs to units: the owner as a whole, or of a larger forward the nodes within."""
        if not inner:
            return
        self.around.update(prefixes(owner.path))
        if owner.path and len(inner) <= 2:
            self.units.add(owner.path)
        nodes = set().union(*inner)
        self.inside.setdefault(owner.path, set()).update(nodes)
        self.units.update(self.trace.child(owner.path, node.target) for node in nodes if node.op == "call_module")

    def _hold_units(self, owner: OwnerGraph, nodes: Iterable[fx.Node]) -> bool:
        return any(
            node.op == "call_module" and self.trace.child(owner.path, node.target) in self.around for node in nodes
        )

    def _operands(self, owner: OwnerGraph, node: fx.Node, kind: str) -> list[fx.Node]:
        """The tensors that an addition or concatenation puts together, if they are of one form (N, C, …)."""
        if kind not in ("add", "cat") or self.values.kind(owner, node) != kind:
            return []
        values = node.meta.get("val")
        arguments: Any = node.args[:2] if kind == "add" else (*node.args, node.kwargs.get("tensors", ()))[0]
        if isinstance(arguments, fx.Node) or not isinstance(values, Tensor) or not 3 <= values.dim() <= 5:
            return []
        operands = [argument for argument in arguments if isinstance(argument, fx.Node) and is_data(argument)]
        shapes = {tuple(operand.meta["val"].shape[:1] + operand.meta["val"].shape[2:]) for operand in operands}
        if kind == "add":
            shapes = {tuple(operand.meta["val"].shape) for operand in operands}
        return operands if len(shapes) == 1 else []

    def _add(
        self,
        owner: OwnerGraph,
        value: fx.Node,
        kind: str,
        nodes: Iterable[fx.Node],
        held: str | None,
        join: fx.Node | None = None,
    ) -> bool:
        """Take a value as a site, unless it is refused or known; ``nodes`` are those where attention may be."""
        site = self._site(owner, value, kind)
        if site is None or site.address in self.found:
            return False
        if held is None and any(is_gating(node) or node.meta.get("counts", (0, 0, 0))[2] for node in nodes):
            held = ATTENDED
        label = None if join is None else labels(owner.graph)[join]
        self.found[site.address] = replace(site, held_back=held, graph=owner.path, join=label)
        return True

    def _site(self, owner: OwnerGraph, value: fx.Node, kind: str) -> Site | None:
        """The site of a value, written back where its forward can be edited; None if it is refused."""
        tensor = value.meta["val"]
        label = labels(owner.graph).get(value, value.name)
        address = child_path(owner.path, label)
        if not isinstance(tensor, Tensor) or not 3 <= tensor.dim() <= 5:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            self._refuse(address, f"its value is not of the form (N, C, …): {shape}")
            return None
        if kind == "conv" and all(extent == 1 for extent in tensor.shape[2:]):
            return None  # a fully connected layer in other words
        if value.op == "placeholder":
            self._refuse(address, "its value is an input of the module")
            return None
        path, written = self.values.written_back(owner, value, label)
        reason = self.values.refusal(owner, value, path, written)
        if reason:
            self._refuse(address, reason)
            return None
        unit = owner.path
        if kind == "conv":
            unit = path if written is None else address
        elif not owner.path or self._is_long(owner):
            unit = address
        return Site(
            address=address,
            owner=path,
            value=written,
            kind=kind,
            channels=tensor.shape[1],
            size=tuple(tensor.shape[2:]),
            order=value.meta["time"],
            container=parent(unit) if unit != address or written is None else owner.path,
            unit=unit,
        )

    def _is_long(self, owner: OwnerGraph) -> bool:
        """Whether one forward holds many units, so that each is a unit of its own."""
        return (
            sum(self.values.kind(owner, node) in ("add", "cat") for node in owner.graph.nodes) > 2
            and len([child for child in owner.module.children() if not isinstance(child, nn.Sequential)]) > 12
        )

    def _refuse(self, address: str, reason: str) -> None:
        self.refused.append(Refusal(address or "(the network)", reason))

    def _named(self, sites: list[Site]) -> list[Site]:
        """The sites with a block name each that depends on the network alone, not on what is selected."""
        owners = Counter(site.owner for site in sites)
        injected: dict[str, list[str]] = {}
        for path, module in self.trace.model.named_modules():
            for step in self.values.steps(path) if hasattr(type(module), "_se_inject_body") else ():
                site_address = path + step["site"] if step["site"].startswith(".") else step["site"]
                injected.setdefault(site_address.lstrip("."), []).append(child_path(path, step["block_name"]))
        result: list[Site] = []
        for site in sites:
            label = re.sub(r"\W+", "_", site.value or "out")
            name = "se" if owners[site.owner] == 1 else f"se_{label}"
            taken = {other.block_name for other in result if other.owner == site.owner}
            owner = self.trace.model.get_submodule(site.owner)
            if name in taken or (not injected.get(site.address) and _is_taken(owner, name, site.value)):
                name = f"{name}_block"
            blocks = tuple(injected.get(site.address, ()))
            result.append(
                replace(
                    site,
                    block_name=name,
                    blocks=blocks,
                    held_back=INJECTED if blocks else site.held_back,
                )
            )
        return result


def _is_taken(owner: nn.Module, name: str, value: str | None) -> bool:
    """Whether an attribute is there already; one that is None is free, unless the author's own forward goes on reading it."""
    return (
        hasattr(type(owner), name) or (value is None and hasattr(owner, name)) or getattr(owner, name, None) is not None
    )
