"""Count what a network costs and what its new blocks add: parameters, MACs, element-wise operations, bytes, time.

1 MAC is one multiply-add; the paper's FLOPs are MACs, other papers' FLOPs are 2 per MAC. Matrix products and
convolutions count as MACs (torch's own flop counter, halved). Every other operation counts its largest operand as
element-wise operations, and all operations count what they read and write as bytes of activations: that traffic,
not arithmetic, is what squeeze and scale really cost. All for one example, without computing anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from se_inject.blocks import build_block
from se_inject.errors import TraceError
from se_inject.guarding import under_guard
from se_inject.surgery import Step
from se_inject.tables import Printed, counted, percent
from se_inject.tracing import Trace, batch_of, describe, float_like, real_inputs, standing_in

_FREE = frozenset(
    {
        "view", "_unsafe_view", "t", "transpose", "permute", "expand", "detach", "alias", "slice", "select", "split",
        "split_with_sizes", "unsqueeze", "squeeze", "as_strided", "unbind", "empty", "chunk", "reshape", "narrow",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Parameters; MACs, element-wise operations and bytes of activations for one example."""

    params: int = 0
    macs: int = 0
    elementwise: int = 0
    bytes: int = 0

    @property
    def flops(self) -> int:
        """Two for each MAC."""
        return 2 * self.macs

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.elementwise + other.elementwise,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class CostRow:
    """The cost of the block at one site."""

    site: str
    stage: int | None
    block: str
    channels: int
    width: int | None
    cost: Cost


@dataclass(frozen=True, repr=False)
class CostReport(Printed):
    """The cost of a network before and after, and of the block at each site; the rows add up to the difference.

    Args:
        before: the network as it is.
        rows: one for each new block.
        uncounted: operations that torch's counter doesn't know and that may hide MACs.
    """

    before: Cost
    rows: tuple[CostRow, ...]
    uncounted: tuple[str, ...] = ()

    def text(self) -> str:
        """Format the table by stage, and the lines that sum it up."""
        from se_inject.cost.text import cost_lines, cost_text

        return cost_text(self) + "\n\n" + "\n".join(cost_lines(self))

    def summary(self) -> str:
        """Say how many blocks there are and what they add."""
        share = percent(self.added.params, self.before.params)
        return f"{counted(len(self.rows), 'block')}, {self.added.params:,} parameters ({share})"

    @property
    def added(self) -> Cost:
        """The sum of the rows."""
        return sum((row.cost for row in self.rows), Cost())

    @property
    def after(self) -> Cost:
        """The network with its blocks: before and added together."""
        return self.before + self.added

    @property
    def stages(self) -> dict[int | None, Cost]:
        """The sum of the rows of each stage."""
        result: dict[int | None, Cost] = {}
        for row in self.rows:
            result[row.stage] = result.get(row.stage, Cost()) + row.cost
        return result


@dataclass(frozen=True)
class Latency:
    """Two networks timed in turns in one run, in milliseconds for one call."""

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    rounds: int


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the MACs, element-wise operations and bytes of every operation of a call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = self.elementwise = self.bytes = 0
        self.unknown: set[str] = set()
        self.weights: dict[int, Tensor] = {}
        """Parameters and buffers, and views of them: no activations."""

    def leave_out(self, module: nn.Module) -> None:
        """Count no bytes for this module's parameters and buffers."""
        self.weights |= {id(t): t for t in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if name in _FREE or func.is_view:
            if any(id(tensor) in self.weights for tensor in tensors):
                self.weights |= {id(tensor): tensor for tensor in results}
            return output
        if not results:
            return output
        if packet in flop_registry:
            self.macs += flop_registry[packet](*args, **(kwargs or {}), out_val=output) // 2
        else:
            self.elementwise += max(tensor.numel() for tensor in (*tensors, *results))
            if not func.name().startswith("aten::") or any(
                word in name for word in ("fft", "grid_sampler", "rnn", "lstm")
            ):
                self.unknown.add(func.name())
        self.bytes += sum(t.numel() * t.element_size() for t in (*tensors, *results) if id(t) not in self.weights)
        return output


def cost_of_model(model: nn.Module, trace: Trace) -> tuple[Cost, tuple[str, ...]]:
    """Count the cost of a whole network for one example, and name the operations that were not counted."""
    params = sum(parameter.numel() for parameter in model.parameters())
    counter, batch = counted_call(model, trace)
    counts = (count // batch for count in (counter.macs, counter.elementwise, counter.bytes))
    return Cost(params, *counts), tuple(sorted(counter.unknown))


Watch = Callable[[nn.Module, Counter], AbstractContextManager[Any]]


@under_guard
def counted_call(model: nn.Module, trace: Trace, watch: Watch | None = None) -> tuple[Counter, int]:
    """Call a twin of the network without numbers, and count what it does.

    Args:
        model: the network.
        trace: an observed call of it.
        watch: entered around the call with the twin and the counter.

    Returns:
        the counter, and the batch size of the call.

    Raises:
        TraceError: the network's own forward fails.
    """
    own = batch_of(trace.inputs)
    for batch in dict.fromkeys((1, own)):
        args, kwargs = real_inputs(
            trace.inputs, batch=batch, device=torch.device("meta"), dtype=float_like(model).dtype
        )
        try:
            with standing_in(model, trace.how) as (twin, matching), Counter() as counter:
                counter.leave_out(twin)
                with watch(twin, counter) if watch is not None else nullcontext():
                    twin(*matching(args), **matching(kwargs))
            return counter, batch or 1
        except Exception as error:
            if batch == own:
                raise TraceError(
                    f"the network's own forward fails on {describe(args, kwargs)} when what it costs is counted",
                    seen=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                    hint="call the network itself on such inputs: it must not fail",
                ) from error
    raise AssertionError("the last batch raises")


def cost_of_step(step: Step, dtype: torch.dtype = torch.float32) -> CostRow:
    """Count what one block adds at its site for one example."""
    with torch.device("meta"):
        block = build_block(step.block, step.channels, step.size, step.options, step.init).to(dtype).eval()
        value = torch.empty((1, step.channels, *step.size), dtype=dtype)
    with torch.no_grad(), Counter() as counter:
        counter.leave_out(block)
        block(value)
    params = sum(parameter.numel() for parameter in block.parameters())
    return CostRow(
        site=step.site,
        stage=step.stage,
        block=step.block,
        channels=step.channels,
        width=getattr(block, "width", None),
        cost=Cost(params, counter.macs, counter.elementwise, counter.bytes),
    )


def cost_of_steps(model: nn.Module, trace: Trace, steps: Sequence[Step]) -> CostReport:
    """Count what a network costs, and what the blocks of these steps add."""
    before, unknown = cost_of_model(model, trace)
    return CostReport(before, rows_of_steps(trace, steps), unknown)


def rows_of_steps(trace: Trace, steps: Iterable[Step]) -> tuple[CostRow, ...]:
    """Count what every block adds, as often as its owner was called. Equal blocks are counted once."""
    dtype = float_like(trace.model).dtype
    known: dict[Any, CostRow] = {}
    rows = []
    for step in steps:
        key = (step.block, step.channels, step.rank, step.size, step.init, repr(sorted(step.options.items())))
        if key not in known:
            known[key] = cost_of_step(step, dtype)
        row = known[key]
        calls = max(1, trace.calls.get(step.owner, 1))
        cost = Cost(row.cost.params, row.cost.macs * calls, row.cost.elementwise * calls, row.cost.bytes * calls)
        rows.append(CostRow(step.site, step.stage, step.block, step.channels, row.width, cost))
    return tuple(rows)


@under_guard
def measure_latency(
    before: Callable[..., Any],
    after: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seconds: float = 5.0,
) -> Latency:
    """Time two networks in turns on the same inputs, for about so many seconds.

    Returns:
        medians, and the median of the ratios of neighbouring calls with their quartiles.
    """
    pairs: list[tuple[float, float]] = []
    with torch.no_grad():
        for network in (before, after):
            network(*args, **kwargs)
        end = time.perf_counter() + seconds
        while len(pairs) < 8 or (time.perf_counter() < end and len(pairs) < 200):
            if len(pairs) % 2:
                pairs.append((_timed(before, args, kwargs), _timed(after, args, kwargs)))
            else:
                late = _timed(after, args, kwargs)
                pairs.append((_timed(before, args, kwargs), late))
    ratios = sorted(after / before for before, after in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    first, second = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    return Latency(first, second, middle, low, high, len(pairs))


def _timed(network: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    start = time.perf_counter()
    network(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def graphed(network: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Record one call as a CUDA graph: what is left of its time when launching kernels costs nothing.

    Args:
        network: in eval mode, on a GPU.
        args: positional arguments of the call, whose memory the graph reads.
        kwargs: keyword arguments of the call.

    Returns:
        a function that replays the call; its arguments are ignored.
    """
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            network(*args, **kwargs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        network(*args, **kwargs)
    return lambda *_, **__: graph.replay()
