"""The rule for plain convolutions: where a run of them ends."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from se_inject.sites.editability import Values
from se_inject.sites.operations import is_data, returned
from se_inject.tracing import OwnerGraph


class Chains:
    """Runs of convolutions with their normalisations and activations, graph by graph, children first."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self._open: set[str] = set()
        """Modules that return a convolution nobody has activated yet: their caller goes on with it."""

    def ends(self, owner: OwnerGraph, inside: set[fx.Node]) -> Iterator[tuple[fx.Node, bool]]:
        """The value behind each run of convolutions in one graph, and whether it is activated.

        Args:
            owner: whose graph.
            inside: nodes of units, which have their own sites.
        """
        running: set[fx.Node] = set()
        for node in owner.graph.nodes:
            kind = self.values.kind(owner, node)
            continues = any(source in running for source in node.all_input_nodes)
            if node in inside:
                continue
            if kind == "module" and self.values.trace.child(owner.path, node.target) in self._open:
                kind = "conv"
            elif (
                kind == "module"
                and continues
                and self.values.activates(self.values.trace.child(owner.path, node.target))
            ):
                kind = "act"
            elif continues and self.values.past_our_blocks(owner, node) is not node:
                continue
            if kind == "conv" or (continues and kind in ("norm", "pass", "pool")):
                running.add(node)
            elif continues and kind == "act":
                if self._is_depthwise_start(owner, node):
                    running.add(node)
                else:
                    yield node, True
            elif continues and node.op == "output" and owner.path and returned(owner.graph) in running:
                self._open.add(owner.path)
            elif continues:
                for source in node.all_input_nodes:
                    if source in running and not self._goes_on(owner, source):
                        yield source, False
                        running.discard(source)

    def _is_depthwise_start(self, owner: OwnerGraph, activation: fx.Node) -> bool:
        """Whether this activation stands between a depthwise convolution and a pointwise one."""
        before: fx.Node | None = activation
        while before is not None and not self._convolves(owner, before):
            data = [source for source in before.all_input_nodes if is_data(source)]
            before = data[0] if len(data) == 1 else None
        passed = activation
        while len(passed.users) == 1 and self.values.kind(owner, next(iter(passed.users))) == "pass":
            (passed,) = passed.users
        after = [user for user in passed.users if self._convolves(owner, user)]
        if before is None or len(after) != 1 or len(passed.users) != 1:
            return False
        (first, _), (_, second) = self._form(owner, before), self._form(owner, after[0])
        return first and second

    def _convolves(self, owner: OwnerGraph, node: fx.Node) -> bool:
        return self.values.kind(owner, node) == "conv"

    def _form(self, owner: OwnerGraph, node: fx.Node) -> tuple[bool, bool]:
        """Whether a convolution is depthwise, and whether it is pointwise."""
        if node.op != "call_module":
            return False, False
        module = self.values.trace.model.get_submodule(self.values.trace.child(owner.path, node.target))
        if not isinstance(module, nn.modules.conv._ConvNd):
            return False, False
        return 1 < module.groups == module.in_channels, all(extent == 1 for extent in module.kernel_size)

    def _goes_on(self, owner: OwnerGraph, node: fx.Node) -> bool:
        """Whether the run of convolutions continues behind this value."""
        kinds = {self.values.kind(owner, user) for user in node.users}
        return bool(kinds & {"norm", "act", "conv", "pass", "pool"})
