"""Count what each module of a network costs, one row a module, with the injected blocks marked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from se_inject.cost.counting import Cost, Counter, counted_call
from se_inject.forwards import original_class
from se_inject.surgery import steps_of
from se_inject.tables import Printed, counted, table
from se_inject.tracing import Trace


@dataclass(frozen=True)
class ModuleRow:
    """The cost of one module, with all modules in it.

    Attributes:
        path: of the module; empty for the network itself.
        kind: name of its class.
        block: name of the injected block that it is, or None.
        output: shape of the first tensor that it returned last, with the batch of the observed call.
        calls: how often it was called.
        cost: for one example; parameters that several modules share count in each.
    """

    path: str
    kind: str
    block: str | None
    output: tuple[int, ...] | None
    calls: int
    cost: Cost

    @property
    def depth(self) -> int:
        """The number of modules around it."""
        return self.path.count(".") + 1 if self.path else 0


@dataclass(frozen=True, repr=False)
class ModuleCosts(Printed):
    """The rows of a network's modules, in the order in which data enters them."""

    rows: tuple[ModuleRow, ...]
    uncounted: tuple[str, ...] = ()

    def within(self, depth: int) -> ModuleCosts:
        """Keep only the rows with at most so many modules around them, and every block."""
        return ModuleCosts(tuple(row for row in self.rows if row.depth <= depth or row.block), self.uncounted)

    def text(self, style: str = "text") -> str:
        """Format a table with a line for each row; blocks are marked with their name."""
        headers = ("module", "class", "block", "output", "params", "MACs", "element-wise", "bytes")
        lines = [
            [
                ("  " * row.depth if style == "text" else "") + (row.path or "(the network)"),
                row.kind,
                f"◆ {row.block}" if row.block else "",
                "×".join(map(str, row.output)) if row.output else "–",
                row.cost.params, row.cost.macs, row.cost.elementwise, row.cost.bytes,
            ]
            for row in self.rows
        ]  # fmt: skip
        return table(headers, lines, style, indented=style == "text")

    def summary(self) -> str:
        """Say how many rows there are, and how many blocks among them."""
        blocks = sum(row.block is not None for row in self.rows)
        return f"{counted(len(self.rows), 'module')}, {counted(blocks, 'block')} among them"

    def data(self) -> list[dict[str, Any]]:
        """Return the rows for ``--json``."""
        return [
            {"module": row.path, "class": row.kind, "block": row.block, "output": row.output, "calls": row.calls}
            | {"params": row.cost.params, "macs": row.cost.macs}
            | {"elementwise": row.cost.elementwise, "bytes": row.cost.bytes}
            for row in self.rows
        ]


def module_costs(model: nn.Module, trace: Trace) -> ModuleCosts:
    """Count the cost of each module of a network in the observed call, for one example. Nothing is computed or changed.

    Args:
        model: a network, injected or not.
        trace: an observed call of it.
    """
    meter = _Meter()
    counter, batch = counted_call(model, trace, meter.on)
    blocks = {step.path: step.block for step in steps_of(model)}
    modules = dict(model.named_modules())
    rows = []
    for path in meter.order:
        macs, elementwise, size = (count // batch for count in meter.sums[path])
        params = sum(parameter.numel() for parameter in modules[path].parameters())
        cost = Cost(params, macs, elementwise, size)
        kind = original_class(modules[path]).__name__
        rows.append(ModuleRow(path, kind, blocks.get(path), meter.outputs[path], meter.calls[path], cost))
    return ModuleCosts(tuple(rows), tuple(sorted(counter.unknown)))


class _Meter:
    """Adds up what a counter counts between a module's beginning and its end."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.sums: dict[str, tuple[int, int, int]] = {}
        self.outputs: dict[str, tuple[int, ...] | None] = {}
        self.calls: dict[str, int] = {}

    @contextlib.contextmanager
    def on(self, model: nn.Module, counter: Counter) -> Iterator[None]:
        """Measure the modules of this network while the block runs."""
        handles = []
        starts: list[tuple[int, int, int]] = []

        def figures() -> tuple[int, int, int]:
            return counter.macs, counter.elementwise, counter.bytes

        def begins(path: str) -> Any:
            def hook(*_: Any) -> None:
                if path not in self.sums:
                    self.order.append(path)
                    self.sums[path] = (0, 0, 0)
                starts.append(figures())

            return hook

        def ends(path: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                start, now, so_far = starts.pop(), figures(), self.sums[path]
                self.sums[path] = (
                    so_far[0] + now[0] - start[0],
                    so_far[1] + now[1] - start[1],
                    so_far[2] + now[2] - start[2],
                )
                self.calls[path] = self.calls.get(path, 0) + 1
                first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
                self.outputs[path] = None if first is None else tuple(first.shape)

            return hook

        try:
            for path, module in model.named_modules():
                handles += [module.register_forward_pre_hook(begins(path)), module.register_forward_hook(ends(path))]
            yield
        finally:
            for handle in handles:
                handle.remove()
