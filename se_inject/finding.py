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

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from se_inject._tracer import Untraceable, holds_tensor
from se_inject.bodies import check_editable, original_class
from se_inject.errors import SurgeryError
from se_inject.operations import (
    child_path,
    convolutions,
    is_data,
    labels,
    means_the_same,
    operation,
    passed_through,
    returned,
)
from se_inject.sites import ATTENDED, HEAD, INJECTED, NESTED, OUTSIDE, Refusal, Site, Sites, staged
from se_inject.tracing import OwnerGraph, Trace, is_gating, is_leaf, sources


def find_sites(trace: Trace) -> Sites:
    """Every site of an observed network, grouped into stages. Nothing is changed.

    Returns:
        the sites that nothing holds back chosen, the others in ``all_sites``.
    """
    finder = Finder(trace)
    sites = staged(finder.sites())
    refused = (*(Refusal(path or "(the network)", reason) for path, reason in trace.failures.items()), *finder.refused)
    chosen = tuple(site for site in sites if site.stage is not None and site.held_back is None)
    first = next((value for value in _tensors(trace.inputs) if value.dim() > 2), None)
    return Sites(chosen, refused, sites, tuple(first.shape[2:]) if first is not None else ())


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
        self.open: set[str] = set()
        """Modules that return a convolution nobody has activated yet: their caller goes on with it."""
        self.inside: dict[str, set[fx.Node]] = {}
        """For each graph, the nodes within its units."""
        self.depths: dict[str, int] = {}
        self.editable: dict[str, str | None] = {}

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
        has_units = any(site.held_back != NESTED for site in self.found.values())
        for owner in graphs:
            if not _any_prefix(owner.path, self.units):
                self._chains(owner, has_units)
        return self._named(sorted(self.found.values(), key=lambda site: site.order))

    # -- units ---------------------------------------------------------------------------------------------

    def _residuals(self, owner: OwnerGraph) -> None:
        """The branches of the additions in one graph; an addition around other units is held back."""
        found: list[tuple[fx.Node, set[fx.Node], str | None]] = []
        for node in owner.graph.nodes:
            operands = self._operands(owner, node, "add")
            if len(operands) != 2:
                continue
            common = _common(operands)
            where = child_path(owner.path, labels(owner.graph)[node])
            if not common:
                if any(convolutions(behind) for operand in operands for behind in _behind(operand)):
                    self._refuse(where, "its operands do not start from one value: it joins, it does not skip")
                continue
            parts = self._parts(owner, operands, common)
            if parts is None:
                continue  # branches of equal depth are a join
            branch, shortcut = parts
            inside = _behind(branch) - _behind(shortcut)
            own = _behind(shortcut) - common
            if any(map(_slices_channels, own)) and not any(map(_slices_channels, inside)):
                self._refuse(where, "its operands start from different channels of one value")
                continue
            around = any(inside & {other} for other, _, _ in found) or self._hold_units(owner, inside | own)
            if any(node.meta.get("counts", (0, 0, 0, 0))[3] for node in inside):
                self._refuse(where, "its branch is attention between positions, which is left alone")
                continue
            value = self._unscaled(owner, branch)
            found.append((node, inside, NESTED if around else None))
            self._add(owner, value, "residual", inside | own, found[-1][2], node)
        self._mark(owner, [nodes for _, nodes, held in found if held is None])

    def split(self, owner: OwnerGraph, join: fx.Node) -> tuple[fx.Node, fx.Node | None, set[fx.Node]]:
        """Branch and shortcut of an addition that is a residual unit's, and the values that both start from."""
        operands = self._operands(owner, join, "add")
        common = _common(operands)
        branch, shortcut = self._parts(owner, operands, common) or (join, None)
        return branch, shortcut, common

    def _parts(
        self, owner: OwnerGraph, operands: list[fx.Node], common: set[fx.Node]
    ) -> tuple[fx.Node, fx.Node] | None:
        """The branch and the shortcut: with more convolutions on the shortest way, and with fewer."""
        one, other = operands
        depths = [self._depth(owner, operand, common) for operand in operands]
        return None if depths[0] == depths[1] else (one, other) if depths[0] > depths[1] else (other, one)

    def behind(self, node: fx.Node) -> set[fx.Node]:
        """A node and every tensor it was computed from."""
        return _behind(node)

    def _units_without_shortcut(self, graphs: list[OwnerGraph]) -> None:
        """A block of the same class as a residual unit, near one, that has no addition: gate what it returns."""
        kin: dict[str, set[type]] = {}
        for site in self.found.values():
            if site.held_back != NESTED:
                kind = original_class(
                    self.trace.model.get_submodule(site.unit if site.unit == site.owner else site.owner)
                )
                for near in (_parent(site.unit), _parent(_parent(site.unit))):
                    kin.setdefault(near, set()).add(kind)
        for owner in graphs:
            kinds = kin.get(_parent(owner.path), set()) | kin.get(_parent(_parent(owner.path)), set())
            if not owner.path or owner.path in self.around or _any_prefix(owner.path, self.units):
                continue
            result = returned(owner.graph)
            if (
                original_class(owner.module) not in kinds
                or result is None
                or not any(map(convolutions, _behind(result)))
            ):
                continue
            if self._add(owner, self._unscaled(owner, result), "residual", _behind(result), None):
                self._mark(owner, [_behind(result)])

    def _joins(self, owner: OwnerGraph) -> None:
        """Concatenations and sums of branches in one graph, the outermost of nested ones."""
        if _any_prefix(owner.path, self.units):
            return
        joins: list[tuple[fx.Node, str, set[fx.Node]]] = []
        taken = set(self.inside.get(owner.path, ()))
        for node in reversed(owner.graph.nodes):
            kind = self.kind(owner, node)
            operands = self._operands(owner, node, kind)
            if (
                kind not in ("add", "cat")
                or len(operands) < 2
                or node in taken
                or (kind == "cat" and not _joins_channels(node))
            ):
                continue
            common = _common(operands)
            inside = set().union(*map(_behind, operands)) - common
            depths = [self._depth(owner, operand, common) for operand in operands]
            if not common or max(depths) < 1 or (kind == "add" and len(set(depths)) > 1):
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
                after = _behind(result) - _behind(node)
                if any(map(convolutions, after)) and result.meta["val"].shape[2:] == node.meta["val"].shape[2:]:
                    value = result
            held = NESTED if self._hold_units(owner, inside) else None
            if self._add(owner, self.activated(owner, value), kind, inside, held, node) and held is None:
                self._mark(owner, [inside])

    def _mark(self, owner: OwnerGraph, inner: list[set[fx.Node]]) -> None:
        """Remember what belongs to units: the owner as a whole, or of a larger forward the nodes within."""
        if not inner:
            return
        self.around.update(_prefixes(owner.path))
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
        if kind not in ("add", "cat") or self.kind(owner, node) != kind:
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

    def _depth(self, owner: OwnerGraph, node: fx.Node, common: set[fx.Node]) -> float:
        """The least number of convolutions on a way from one of the common values to this one."""
        known: dict[fx.Node, float] = dict.fromkeys(common, 0)
        pending = [node]
        while pending:
            current = pending[-1]
            before = [source for source in current.all_input_nodes if is_data(source) or _is_bundle(source)]
            waiting = [source for source in before if source not in known]
            if current not in known and waiting:
                pending += waiting
                continue
            if current not in known:
                ways = [known[source] for source in before]
                known[current] = self._own_depth(owner.path, current) + min(ways) if ways else math.inf
            pending.pop()
        return known[node]

    def _own_depth(self, owner: str, node: fx.Node) -> int:
        if not convolutions(node):
            return 0
        if node.op != "call_module":
            return 1
        return self._depth_of(self.trace.child(owner, node.target))

    def _depth_of(self, path: str) -> int:
        """The least number of convolutions from a module's input to its output."""
        owner = self.trace.graphs.get(path)
        if owner is None:
            return 1
        if path in self.depths:
            return self.depths[path]
        inputs = {node for node in owner.graph.nodes if node.op == "placeholder"}
        output = next(iter(reversed(owner.graph.nodes)))
        depth = self._depth(owner, output, inputs)
        self.depths[path] = 0 if math.isinf(depth) else int(depth)
        return self.depths[path]

    # -- plain convolutions --------------------------------------------------------------------------------

    def _chains(self, owner: OwnerGraph, has_units: bool) -> None:
        """The values after each run of convolutions in one graph: after its normalisation and activation."""
        running: set[fx.Node] = set()
        inside = self.inside.get(owner.path, set())
        for node in owner.graph.nodes:
            kind = self.kind(owner, node)
            continues = any(source in running for source in node.all_input_nodes)
            if node in inside:
                continue
            if kind == "module" and self.trace.child(owner.path, node.target) in self.open:
                kind = "conv"
            elif kind == "module" and continues and self._activates(self.trace.child(owner.path, node.target)):
                kind = "act"
            elif continues and self._past_our_blocks(owner, node) is not node:
                continue
            if kind == "conv" or (continues and kind in ("norm", "pass", "pool")):
                running.add(node)
            elif continues and kind == "act":
                if self._is_depthwise_start(owner, node):
                    running.add(node)
                else:
                    self._plain(owner, node, has_units)
            elif continues and node.op == "output" and owner.path and returned(owner.graph) in running:
                self.open.add(owner.path)
            elif continues:
                for source in node.all_input_nodes:
                    if source in running and not self._goes_on(owner, source):
                        self._plain(owner, source, has_units, activated=False)
                        running.discard(source)

    def _plain(self, owner: OwnerGraph, value: fx.Node, has_units: bool, *, activated: bool = True) -> None:
        held = OUTSIDE if has_units else None if activated else HEAD
        self._add(owner, value, "conv", value.users, held)

    def _is_depthwise_start(self, owner: OwnerGraph, activation: fx.Node) -> bool:
        """Whether this activation stands between a depthwise convolution and a pointwise one."""
        before: fx.Node | None = activation
        while before is not None and not self._convolves(owner, before):
            data = [source for source in before.all_input_nodes if is_data(source)]
            before = data[0] if len(data) == 1 else None
        behind = [user for user in activation.users if self._convolves(owner, user)]
        if before is None or len(behind) != 1 or len(activation.users) != 1:
            return False
        (first, _), (_, second) = self._form(owner, before), self._form(owner, behind[0])
        return first and second

    def _convolves(self, owner: OwnerGraph, node: fx.Node) -> bool:
        return self.kind(owner, node) == "conv"

    def _form(self, owner: OwnerGraph, node: fx.Node) -> tuple[bool, bool]:
        """Whether a convolution is depthwise, and whether it is pointwise."""
        if node.op != "call_module":
            return False, False
        module = self.trace.model.get_submodule(self.trace.child(owner.path, node.target))
        if not isinstance(module, nn.modules.conv._ConvNd):
            return False, False
        return 1 < module.groups == module.in_channels, all(extent == 1 for extent in module.kernel_size)

    def _activates(self, path: str) -> bool:
        """Whether a module with a graph of its own is nothing but normalisation and activation."""
        inner = self.trace.graphs.get(path)
        if inner is None:
            return False
        kinds = {self.kind(inner, node) for node in inner.graph.nodes if node.op.startswith("call")}
        value = returned(inner.graph)
        return (
            "act" in kinds and "conv" not in kinds and value is not None and not any(map(convolutions, _behind(value)))
        )

    def _goes_on(self, owner: OwnerGraph, node: fx.Node) -> bool:
        """Whether the run of convolutions continues behind this value."""
        kinds = {self.kind(owner, user) for user in node.users}
        return bool(kinds & {"norm", "act", "conv", "pass", "pool"})

    # -- common --------------------------------------------------------------------------------------------

    def kind(self, owner: OwnerGraph, node: fx.Node) -> str:
        return operation(self.trace, owner.path, node)

    def _unscaled(self, owner: OwnerGraph, value: fx.Node) -> fx.Node:
        """A value before dropout, stochastic depth, layer scale and our own blocks, as far as its shape lasts."""
        while True:
            source = self._past_our_blocks(owner, value)
            if source is value:
                source = passed_through(self.trace, owner.path, value) or value
            if source is value or source.op == "placeholder":
                return value
            value = source

    def activated(self, owner: OwnerGraph, value: fx.Node) -> fx.Node:
        """A value after the normalisation and activation that follow it in the same graph."""
        while len(value.users) == 1:
            user = next(iter(value.users))
            kind = self.kind(owner, user)
            if kind not in ("norm", "act") and not (
                kind == "module" and self._activates(self.trace.child(owner.path, user.target))
            ):
                break
            value = user
        return self._past_our_blocks(owner, value)

    def _past_our_blocks(self, owner: OwnerGraph, value: fx.Node) -> fx.Node:
        """A value before the blocks of ours that gate it."""
        names = {step["block_name"] for step in self._steps(owner.path)}
        while value.op == "call_module" and value.target in names and isinstance(value.args[0], fx.Node):
            value = value.args[0]
        return value

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
        path, written = self.written_back(owner, value, label)
        if written is None and path != owner.path and self.trace.calls.get(path, 0) > 1:
            self._refuse(address, f"`{path}` is called {self.trace.calls[path]} times: its output is not one value")
            return None
        reason = self._uneditable(owner, value, path, written) or self._misread(owner, value)
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
            container=_parent(unit) if unit != address or written is None else owner.path,
            unit=unit,
        )

    def _uneditable(self, owner: OwnerGraph, value: fx.Node, path: str, written: str | None) -> str | None:
        """Why the value can't be gated in this forward; None if it can."""
        if written is None:
            return None
        if owner.path not in self.editable:
            try:
                check_editable(self.trace, owner)
                self.editable[owner.path] = None
            except SurgeryError as error:
                self.editable[owner.path] = error.message
        if self.editable[owner.path]:
            return self.editable[owner.path]
        if owner.reads_training:
            training, _ = self.trace.training_graph(owner)
            if not means_the_same(owner.graph, training, written):
                return f"its forward computes `{written.partition('#')[0]}` more often in one mode than in the other"
        if not value.users:
            return "nobody reads its value: it is written into another, whose name is read"
        order = {node: number for number, node in enumerate(owner.graph.nodes)}
        alias = value
        while (source := self._overwritten(owner, alias)) is not None:
            if any(order[user] > order[value] for user in source.users):
                return "its value is read by another name as well"
            alias = source
        return None

    def _overwritten(self, owner: OwnerGraph, node: fx.Node) -> fx.Node | None:
        """The value that a node writes its result into; None if it makes a new one."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        if node.op == "call_module":
            module = self.trace.model.get_submodule(self.trace.child(owner.path, node.target))
            return first if getattr(module, "inplace", False) is True and is_leaf(module) else None
        name = str(getattr(node.target, "__name__", node.target))
        in_place = name in ("iadd", "isub", "imul", "itruediv") or (name.endswith("_") and not name.endswith("__"))
        return first if in_place or node.kwargs.get("inplace") is True else None

    def _misread(self, owner: OwnerGraph, value: fx.Node) -> str | None:
        """Why dimension 1 of a value isn't its channels; None if it is, as far as the way back to a convolution tells."""
        found = self._channels_at(owner, value, 1)
        if found is True or (not isinstance(found, bool) and found == 1):
            return None
        return f"its value is not of the form (N, C, …): its channels are not dimension 1 of {tuple(value.meta['val'].shape)}"

    def _channels_at(self, owner: OwnerGraph, node: fx.Node, axis: int) -> bool | int:
        """Whether an axis of a value is its channels; if the way back ends at the graph's input, which axis of that."""
        while True:
            tensor = node.meta.get("val")
            data = [source for source in node.all_input_nodes if is_data(source)]
            kind = self.kind(owner, node)
            if node.op == "placeholder":
                return axis
            if not isinstance(tensor, Tensor) or not data or kind in ("conv", "pool"):
                return axis == 1
            name = getattr(node.target, "__name__", node.target)
            before = data[0].meta["val"]
            inner = self.trace.graphs.get(self.trace.child(owner.path, node.target)) if kind == "module" else None
            result = returned(inner.graph) if inner is not None else None
            if inner is not None and result is not None:
                found = self._channels_at(inner, result, axis)
                if isinstance(found, bool):
                    return found
                axis = found
            elif (node.op == "call_module" and isinstance(self._module(owner, node), nn.Linear)) or name == "linear":
                return axis == tensor.dim() - 1
            elif name == "permute":
                dims = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
                axis = int(dims[axis]) % tensor.dim()  # type: ignore[arg-type]
            elif name in ("transpose", "swapaxes", "swapdims"):
                one, other = (int(dim) % tensor.dim() for dim in node.args[1:3])  # type: ignore[arg-type]
                axis = {one: other, other: one}.get(axis, axis)
            elif before.dim() != tensor.dim() and (axis != 1 or before.shape[1] != tensor.shape[1]):
                return axis == 1 and tensor.dim() > 3
            node = max(data, key=lambda source: source.meta["val"].numel())

    def _module(self, owner: OwnerGraph, node: fx.Node) -> nn.Module:
        return self.trace.model.get_submodule(self.trace.child(owner.path, node.target))

    def written_back(self, owner: OwnerGraph, value: fx.Node, label: str) -> tuple[str, str | None]:
        """Which module's forward is edited to gate a value, and the value's label there; None: what it returns."""
        path, module = owner.path, owner.module
        while isinstance(module, nn.Sequential) and value.op == "call_module":
            path = self.trace.child(path, value.target)
            module = self.trace.model.get_submodule(path)
            inner = self.trace.graphs.get(path)
            last = returned(inner.graph) if inner is not None else None
            if last is None or not isinstance(module, nn.Sequential):
                return path, None
            value = last
        result = returned(owner.graph)
        if result is not None and value is self._past_our_blocks(owner, result) and self._returns_one(owner):
            return path, None
        return path, label

    def _returns_one(self, owner: OwnerGraph) -> bool:
        """Whether the forward returns one tensor in training too, as far as that can be told."""
        if owner.reads_training:
            with contextlib.suppress(Untraceable):
                return returned(self.trace.training_graph(owner)[0]) is not None
        return True

    def _is_long(self, owner: OwnerGraph) -> bool:
        """Whether one forward holds many units, so that each is a unit of its own."""
        return (
            sum(self.kind(owner, node) in ("add", "cat") for node in owner.graph.nodes) > 2
            and len([child for child in owner.module.children() if not isinstance(child, nn.Sequential)]) > 12
        )

    def _refuse(self, address: str, reason: str) -> None:
        self.refused.append(Refusal(address or "(the network)", reason))

    def _named(self, sites: list[Site]) -> list[Site]:
        """The sites with a block name each that depends on the network alone, not on what is selected."""
        owners = Counter(site.owner for site in sites)
        injected: dict[str, list[str]] = {}
        for path, module in self.trace.model.named_modules():
            for step in self._steps(path) if hasattr(type(module), "_se_inject_body") else ():
                site_address = path + step["site"] if step["site"].startswith(".") else step["site"]
                injected.setdefault(site_address.lstrip("."), []).append(child_path(path, step["block_name"]))
        result: list[Site] = []
        for site in sites:
            label = re.sub(r"\W+", "_", site.value or "out")
            name = "se" if owners[site.owner] == 1 else f"se_{label}"
            taken = {other.block_name for other in result if other.owner == site.owner}
            owner = self.trace.model.get_submodule(site.owner)
            if name in taken or (not injected.get(site.address) and _is_taken(owner, name)):
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

    def _steps(self, path: str) -> list[dict[str, Any]]:
        """The steps of ours that an owner's forward was edited by."""
        body = getattr(type(self.trace.model.get_submodule(path)), "_se_inject_body", None)
        return json.loads(body)["steps"] if body else []


def _tensors(inputs: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _is_taken(owner: nn.Module, name: str) -> bool:
    """Whether an attribute is there already; one that is None on the instance is free."""
    return hasattr(type(owner), name) or getattr(owner, name, None) is not None


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def _any_prefix(path: str, roots: set[str]) -> bool:
    return any(prefix in roots for prefix in _prefixes(path))


def _behind(node: fx.Node) -> set[fx.Node]:
    return sources(node) | {node}


def _common(operands: list[fx.Node]) -> set[fx.Node]:
    return set.intersection(*map(_behind, operands))


def _is_bundle(node: fx.Node) -> bool:
    """Whether a node's value is a structure of tensors: a split, a list input."""
    value = node.meta.get("val")
    return isinstance(value, tuple | list | dict) and holds_tensor(value)


def _slices_channels(node: fx.Node) -> bool:
    """Whether a node takes some of the channels of a value."""
    if getattr(node.target, "__name__", node.target) not in ("getitem", "narrow", "slice"):
        return False
    value = node.meta["val"]
    for source in node.all_input_nodes:
        whole = source.meta.get("val")
        if _is_bundle(source):
            return True
        if isinstance(whole, Tensor) and whole.dim() == value.dim() and value.shape[1] < whole.shape[1]:
            return True
    return False


def _joins_channels(node: fx.Node) -> bool:
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return isinstance(dim, int) and dim % int(node.meta["val"].dim()) == 1
