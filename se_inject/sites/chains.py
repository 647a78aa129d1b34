"""Find sites in plain chains of convolutions: behind each run, its normalisation and its activation.

A depthwise convolution and the pointwise one behind it are one run. Only networks without units of the other kinds have
these in their stages.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from se_inject.sites.ledger import Ledger
from se_inject.sites.operations import any_prefix, path_of, returned
from se_inject.sites.roles import lays_out
from se_inject.sites.site import HeldBack
from se_inject.tracing import OwnerGraph, function_name_of, is_data, kind, numbers_of


def plain_convolutions(ledger: Ledger, owners: list[OwnerGraph]) -> None:
    """Find where the runs of convolutions outside of all units end."""
    stageless = (HeldBack.NESTED, HeldBack.OUTPUT)
    runs = _Runs(ledger)
    ends = [
        (owner, value, activated)
        for owner in owners
        if not ledger.is_in_unit(owner)
        for value, activated in runs.ends(owner, ledger.inside.get(owner.path, set()))
    ]
    missed = ledger.missed.keys() - (ledger.alone if len(ends) >= _MANY else set())
    units = missed or ledger.attending or any(site.held_back not in stageless for site in ledger.found.values())
    for owner, value, activated in ends:
        held = HeldBack.OUTSIDE if units else None if activated else HeldBack.HEAD
        ledger.add(owner, value, "conv", _readers(value), held)
    for path in ledger.missed.keys() & ledger.alone:  # what its parts have is all that it could have
        if any(site.held_back is None and any_prefix(site.address, {path}) for site in ledger.found.values()):
            del ledger.missed[path]


_RESIZING = frozenset({"interpolate", "upsample", "pad", "Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"})
_MANY = 3
"""With so many runs of convolutions a network is made of them, and a module that can't be traced, alone of its class, is not a unit of it."""


def _readers(value: fx.Node) -> Iterator[fx.Node]:
    """Yield who reads a value, also past what only hands it on."""
    for user in value.users:
        yield user
        if kind(user) == "pass" or lays_out(user):
            yield from _readers(user)


_CONTINUE = ("norm", "act", "conv", "pass", "pool")
"""What a run goes on with."""


class _Runs:
    """Runs of convolutions with their normalisations and activations, graph by graph, children first."""

    def __init__(self, ledger: Ledger) -> None:
        self.values = ledger.values
        self.trace = ledger.trace
        self.callers = ledger.callers
        self._open: set[str] = set()
        """Modules that return a convolution nobody has activated yet: their caller goes on with it."""
        self._halves: set[str] = set()
        """Of these the modules that return an activated depthwise convolution, to a module that begins with a pointwise one."""

    def ends(self, owner: OwnerGraph, inside: set[fx.Node]) -> Iterator[tuple[fx.Node, bool]]:
        """Find the value behind each run of convolutions in one graph, and whether it is activated.

        Args:
            owner: whose graph.
            inside: nodes of units, which have their own sites.
        """
        running: set[fx.Node] = set()
        for node in owner.graph.nodes:
            if node in inside:
                continue
            read = [source for source in node.all_input_nodes if source in running]
            what = self._operation(node, continues=bool(read))
            if kind(node) == "module" and read and self.values.past_our_blocks(owner, node) is not node:
                continue
            if what == "conv" and kind(node) == "module":
                for source in read:  # a module that activates what it reads first, and convolves it then
                    if self._is_activated_in(node, source):
                        yield self._laid_out(source), True
                        running.discard(source)
            if what == "conv" or (read and what in ("norm", "pass", "pool")):
                running.add(node)
            elif read and what == "act":
                if self._is_depthwise_start(owner, node):
                    running.add(node)
                else:
                    yield self._gated_by_itself(node, read), True
            elif read and node.op == "output" and owner.path and returned(owner.graph) in running:
                self._open.add(owner.path)
            else:
                for source in read:
                    if not self._goes_on(source):
                        value = self._laid_out(source)
                        yield value, self._is_activated_later(value)
                        running.discard(source)

    def _operation(self, node: fx.Node, *, continues: bool) -> str:
        """Return what a node is to a run: a module that ends in an open convolution is one, one that only activates an activation."""
        if kind(node) == "module" and path_of(node) in self._open:
            return "conv"
        return "act" if continues and self.values.activates(node) else self.values.roles.of(node)

    def _laid_out(self, value: fx.Node) -> fx.Node:
        """Return a value before it was given another form, or handed on as it is."""
        while self.values.roles.of(value) == "pass":
            before = {source for source in numbers_of(value) if is_data(source)}
            if len(before) != 1:
                break
            (value,) = before
        return value

    def _gated_by_itself(self, activation: fx.Node, read: list[fx.Node]) -> fx.Node:
        """Return the product of a value and its activation, ``x * sigmoid(x)``, where an activation is written so; else itself."""
        for user in activation.users:
            if kind(user) == "mul" and set(user.all_input_nodes) <= {activation, *read} and len(activation.users) == 1:
                return user
        return activation

    def _is_activated_in(self, call: fx.Node, value: fx.Node) -> bool:
        """Return whether a module activates a value that it is given before it convolves it."""
        inner = self.trace.graphs.get(path_of(call)) if call.op == "call_module" else None
        given = [node for node in inner.graph.nodes if node.op == "placeholder"] if inner is not None else []
        return any(node.meta["val"] is value.meta["val"] and self._is_activated_later(node) for node in given)

    def _is_activated_later(self, value: fx.Node) -> bool:
        """Return whether a value is activated in its graph, or a module called there, before it is convolved: perhaps normalised, joined or resized first."""
        pending, seen = [value], set()
        while pending:
            node = pending.pop()
            for user in node.users:
                role = self.values.roles.of(user)
                if role == "act" or (role == "module" and self._is_activated_in(user, node)):
                    return True
                handed_on = role in ("norm", "pass", "pool", "cat") or function_name_of(user) in _RESIZING
                if user not in seen and handed_on and user.op != "output" and not lays_out(user):
                    seen.add(user)
                    pending.append(user)
        return False

    def _is_depthwise_start(self, owner: OwnerGraph, activation: fx.Node) -> bool:
        """Return whether this activation stands between a depthwise convolution and a pointwise one, each perhaps in a module of its own."""
        before: fx.Node | None = activation
        while before is not None and kind(before) != "conv" and not self._is_half(before):
            data = [source for source in before.all_input_nodes if is_data(source)]
            before = data[0] if len(data) == 1 else None
        if before is None or not (self._is_half(before) or self._is_depthwise(before)):
            return False
        return self._is_read_pointwise(owner, activation)

    def _is_read_pointwise(self, owner: OwnerGraph, value: fx.Node) -> bool:
        """Return whether a pointwise convolution alone reads a value, here or where its module is called."""
        while len(value.users) == 1 and kind(next(iter(value.users))) == "pass":
            (value,) = value.users
        if len(value.users) != 1:
            return False
        (user,) = value.users
        if user.op == "output":
            calls = self.callers.get(owner.path, [])
            if returned(owner.graph) is not value or len(calls) != 1:
                return False
            caller, call = calls[0]
            if not self._is_read_pointwise(caller, call):
                return False
            self._halves.add(owner.path)
            return True
        return self._begins_pointwise(user)

    def _begins_pointwise(self, node: fx.Node) -> bool:
        """Return whether a node is a pointwise convolution, or a module whose input goes into one alone."""
        if kind(node) == "conv":
            module = self.values.module(node) if node.op == "call_module" else None
            return isinstance(module, nn.modules.conv._ConvNd) and all(extent == 1 for extent in module.kernel_size)
        inner = self.trace.graphs.get(path_of(node)) if kind(node) == "module" else None
        given = [each for each in inner.graph.nodes if each.op == "placeholder"] if inner is not None else [node]
        readers = [user for each in given for user in each.users if is_data(user)]  # not those that ask for its size
        is_handed_on = node in given and (kind(node) == "pass" or function_name_of(node) == "pad")
        if len(given) != 1 or len(readers) != 1 or (node in given and not is_handed_on):
            return False
        return self._begins_pointwise(readers[0])

    def _is_half(self, node: fx.Node) -> bool:
        """Return whether a node calls a module that ends in a depthwise convolution nobody has activated yet."""
        inner = self.trace.graphs.get(path_of(node)) if kind(node) == "module" and path_of(node) in self._open else None
        last = returned(inner.graph) if inner is not None else None
        while last is not None and kind(last) in ("norm", "pass"):
            data = [source for source in last.all_input_nodes if is_data(source)]
            last = data[0] if len(data) == 1 else None
        return last is not None and kind(last) == "conv" and self._is_depthwise(last)

    def _is_depthwise(self, node: fx.Node) -> bool:
        module = self.values.module(node) if node.op == "call_module" else None
        return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels

    def _goes_on(self, node: fx.Node) -> bool:
        """Return whether the run of convolutions continues behind this value."""
        if node.op == "call_module" and path_of(node) in self._halves:
            return True
        return any(self._operation(user, continues=True) in _CONTINUE for user in node.users)
