"""Keep the ledger that the rules write to: sites found, places refused, and values that belong to units already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from torch import Tensor, fx, nn

from se_inject.sites.dataflow import Depths
from se_inject.sites.editability import UNREACHED, Values
from se_inject.sites.operations import any_prefix, child_path, counts, labels, parent, path_of, prefixes
from se_inject.sites.outputs import is_narrow_output
from se_inject.sites.site import HeldBack, Refusal, Site
from se_inject.sites.strides import Strides
from se_inject.tracing import OwnerGraph, Trace, is_gating, kind


class Ledger:
    """The results of all rules for one network. A rule is a function ``(ledger, owner)`` that adds to them.

    Args:
        trace: an observed call.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.values = Values(trace)
        self.depths = Depths(trace)
        self.found: dict[str, Site] = {}
        """The sites by address."""
        self.refused: list[Refusal] = []
        self.missed: dict[str, Refusal] = {}
        """Units that were seen and can take no block, each once."""
        self.alone: set[str] = set()
        """Of these the modules that can't be traced and are the only ones of their class."""
        self.attending: set[str] = set()
        """Addresses of the units that are attention between positions."""
        self.postponed: list[tuple[OwnerGraph, fx.Node, str]] = []
        """Additions whose operands start from two values, each with the reason why it may be refused."""
        self.skips: set[type] = set()
        """Classes of modules that are the skips of a U-Net."""
        self.units: set[str] = set()
        """Modules that are units, and modules called within one: plain convolutions in them are the unit's own."""
        self.around: set[str] = set()
        """Modules that hold a unit, at any depth."""
        self.inside: dict[str, set[fx.Node]] = {}
        """For each graph, the nodes within its units."""

    @cached_property
    def strides(self) -> Strides:
        """The strides of all values from the network's input."""
        return Strides(self.trace)

    @cached_property
    def callers(self) -> dict[str, list[tuple[OwnerGraph, fx.Node]]]:
        """For each module the nodes that call it, each with its graph."""
        found: dict[str, list[tuple[OwnerGraph, fx.Node]]] = {}
        for owner in self.trace.graphs.values():
            for node in owner.graph.nodes:
                if node.op == "call_module":
                    found.setdefault(path_of(node), []).append((owner, node))
        return found

    def refuse(self, address: str, reason: str) -> None:
        """Write down a place that can take no block."""
        self.refused.append(Refusal(address or "(the network)", reason))

    def add(
        self,
        owner: OwnerGraph,
        value: fx.Node,
        site_kind: str,
        nodes: Iterable[fx.Node],
        held: HeldBack | None,
        join: fx.Node | None = None,
    ) -> bool:
        """Write down a value as a site, unless it is refused or known. Returns whether it is new.

        Args:
            owner: in whose graph the value is.
            value: the one that is gated.
            site_kind: ``residual``, ``concat``, ``sum`` or ``conv``.
            nodes: where attention may be already.
            held: why the site is left out by default.
            join: the addition or concatenation that the site belongs to.
        """
        refusals = len(self.refused)
        place, gated = self.values.layouts.channels_first(owner, value)
        gated = self.values.past_our_blocks(place, gated)
        if place is not owner and site_kind != "conv":
            gated = self.values.unscaled(place, gated)
        site = self._site(owner, place, gated, site_kind)
        if site is None and site_kind != "conv" and held is None and len(self.refused) > refusals:
            refusal = self.refused[-1]
            if refusal.reason != UNREACHED:
                once = f"{owner.path}: {refusal.reason}" if "several times" in refusal.reason else refusal.address
                self.missed[once] = refusal
        if site is None or site.address in self.found:
            return False
        if held is None and site_kind != "residual" and is_narrow_output(self.trace, place, gated):
            held = HeldBack.OUTPUT
        if held is None and any(is_gating(node) or counts(node).gates for node in nodes):
            held = HeldBack.ATTENTION
        label = None if join is None else labels(owner.graph)[join]
        self.found[site.address] = replace(site, held_back=held, graph=owner.path, join=label)
        return True

    def mark(self, owner: OwnerGraph, inner: list[set[fx.Node]]) -> None:
        """Write down what belongs to units: the owner as a whole, or of a larger forward the nodes within.

        Args:
            owner: whose forward holds the units.
            inner: the nodes within each of them.
        """
        if not inner:
            return
        self.around.update(prefixes(owner.path))
        if owner.path and len(inner) <= 2:
            self.units.add(owner.path)
        nodes = set().union(*inner)
        self.inside.setdefault(owner.path, set()).update(nodes)
        self.units.update(path_of(node) for node in nodes if node.op == "call_module")

    def hold_units(self, nodes: Iterable[fx.Node]) -> bool:
        """Return whether one of these nodes calls a module that holds a unit."""
        return any(node.op == "call_module" and path_of(node) in self.around for node in nodes)

    def is_in_unit(self, owner: OwnerGraph) -> bool:
        """Return whether a module is a unit, or within one."""
        return any_prefix(owner.path, self.units)

    def _site(self, owner: OwnerGraph, place: OwnerGraph, value: fx.Node, site_kind: str) -> Site | None:
        """Return the site of a value, written back where its forward can be edited; None if it is refused.

        Args:
            owner: whose forward is, or holds, the unit.
            place: in whose graph the value is: a module within, if the owner's values are not of the form (N, C, …).
            value: the one that is gated.
            site_kind: as for ``add``.
        """
        tensor = value.meta["val"]
        label = labels(place.graph).get(value, value.name)
        address = child_path(place.path, label)
        if not isinstance(tensor, Tensor) or not 3 <= tensor.dim() <= 5:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            self.refuse(address, f"its value is not of the form (N, C, …): {shape}")
            return None
        if site_kind == "conv" and all(extent == 1 for extent in tensor.shape[2:]):
            return None  # a fully connected layer in other words
        if value.op == "placeholder":
            self.refuse(address, "its value is an input of the module")
            return None
        if not tensor.is_floating_point():
            self.refuse(address, f"its value is of {tensor.dtype}: a block gates real numbers")
            return None
        path, written = self.values.written_back(place, value, label)
        reason = self.values.refusal(place, value, path, written)
        if reason:
            self.refuse(address, reason)
            return None
        unit = owner.path
        if site_kind == "conv":
            unit = path if written is None else address
        elif not owner.path or _is_long(owner):
            unit = address
        return Site(
            address=address,
            owner=path,
            value=written,
            kind=site_kind,
            channels=tensor.shape[1],
            size=tuple(tensor.shape[2:]),
            stride=self.strides.of(tensor),
            order=value.meta["time"],
            container=parent(unit) if unit != address or written is None else place.path,
            unit=unit,
        )


def _is_long(owner: OwnerGraph) -> bool:
    """Return whether one forward holds many units, so that each is a unit of its own."""
    return (
        sum(kind(node) in ("add", "cat") for node in owner.graph.nodes) > 2
        and len([child for child in owner.module.children() if not isinstance(child, nn.Sequential)]) > 12
    )
