"""The network that is exported: the calls its files are checked with, and what it answers to them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from se_inject.errors import ExportError
from se_inject.exporting.conversion import Conversion
from se_inject.progress import step
from se_inject.tracing import SMALL_SIDE, copied, cropped, describe, preserved
from se_inject.verification import TOLERANCES, Check, Rejected, difference, reason, tensors

BATCHES = (1, 2, 5)
"""The batch sizes a file is run at, unless its batch is fixed."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


class Written(NamedTuple):
    """A file that is there, and has not been compared yet."""

    how: str
    run: Callable[..., Any] | None
    """The file, loaded back, as a function of the network's arguments; None if it can't be run here."""
    notes: tuple[str, ...] = ()


class Network:
    """The network, the calls its files are checked with, and its answers: the same for every format.

    Args:
        model: the network, converted already.
        args: positional arguments of one call.
        kwargs: keyword arguments of that call.
        conversion: what the call's tensors are converted to.
        opset: the ONNX opset; None for the exporter's own choice.
        small: crop large inputs, if the network takes them then: enough for a file that holds no shapes.

    Raises:
        ExportError: the network's own forward fails.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        conversion: Conversion,
        *,
        opset: int | None = None,
        small: bool = False,
    ) -> None:
        self.model = model
        self.opset = opset
        self.signature = inspect.signature(model.forward)
        ordered = {name: kwargs[name] for name in self.signature.parameters if name in kwargs}
        example: Call = args, {**ordered, **kwargs}  # the order in which exporters number the inputs
        self.conversion = conversion.on(model)
        smaller = cropped(example, SMALL_SIDE) if small else None
        self.cropped = smaller is not None and describe(*smaller) != describe(*example)
        try:
            self._observe_all(smaller or example)
        except ExportError:
            if not self.cropped:
                raise
            self.cropped = False
            self._observe_all(example)
        leaves = pytree.tree_leaves((self.calls, self.answers, list(model.parameters())))
        self.dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)}
        coarsest = max(TOLERANCES.get(dtype, 0.0) for dtype in self.dtypes)
        if self.conversion.device is not None and self.conversion.device.type == "cuda":
            coarsest = max(coarsest, TOLERANCES[torch.float16])  # convolutions in TF32 round as float16 does
        self.tolerance = max(coarsest, TOLERANCES[torch.float32])

    def has_batch(self, leaf: Any) -> bool:
        """Whether a leaf of the arguments has the batch as its first dimension."""
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == self.batch

    def call(self, dynamic: bool) -> Call:
        """What to export with; for a dynamic batch not at 1, which exporters take for a constant."""
        call: Call = copied(self.calls[BATCHES[-1] if dynamic else self.batch])
        return call

    def run(self, function: Callable[..., Any], batch: int) -> Any:
        """Call the network or a file; an operation in place spoils only a copy of the inputs."""
        args, kwargs = copied(self.calls[batch])
        return function(*args, **kwargs)

    def dynamic_shapes(self, dimension: Any) -> dict[str, Any]:
        """`dimension` for the batch of every input that has one, by the names of forward's parameters."""
        args, kwargs = self.example
        shapes: dict[str, Any] = pytree.tree_map(
            lambda leaf: {0: dimension} if self.has_batch(leaf) else None,
            dict(self.signature.bind(*args, **kwargs).arguments),
        )
        return shapes

    def check(self, run: Callable[..., Any], dynamic: bool, tolerance: float) -> Iterator[Check]:
        """Compare a file with the network; `Rejected` when it computes something else."""
        for batch in BATCHES if dynamic else (self.batch,):
            step(f"running what was exported at batch {batch}")
            want = self.answers[batch]
            check = Check(batch, *difference(tensors(self.run(run, batch)), want))
            if not check.max_rel_error <= tolerance:
                if max(difference(tensors(self.run(self.model.eval(), batch)), want)) > 0:
                    raise ExportError(
                        "the network's own output changes from call to call in eval mode",
                        hint="a file can't be compared with it: make it deterministic in eval mode",
                    )
                seen, allowed = f"{check.max_rel_error:.1e}", f"{tolerance:.0e}"
                raise Rejected(f"relative error {seen} at batch {batch}, allowed {allowed}")
            yield check

    def _observe_all(self, example: Call) -> None:
        """Ask at every batch size, and find out whether there is but one that the network runs at."""
        self.example = example
        sizes = [leaf.size(0) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
        self.batch = sizes[0] if sizes else 1
        self.calls: dict[int, Call] = {}
        self.answers: dict[int, list[tuple[str, Tensor]]] = {}
        self._observe(self.batch)
        self.fixed = None if sizes else "no input has a batch dimension"
        for batch in BATCHES if sizes else ():
            try:
                self._observe(batch)
            except ExportError as error:
                self.fixed = f"the network itself fails at batch {batch}: {reason(error)}"
                break

    def _observe(self, batch: int) -> None:
        if batch in self.answers:
            return
        generator = torch.Generator().manual_seed(batch)

        def resized(tensor: Tensor) -> Tensor:
            resized = _at_batch(tensor, batch, generator) if self.has_batch(tensor) else tensor
            return self.conversion.tensor(resized)

        self.calls[batch] = pytree.tree_map_only(Tensor, resized, self.example)
        try:
            with untouched(self.model):
                self.answers[batch] = list(tensors(self.run(self.model.eval(), batch)))
        except Exception as error:
            raise ExportError(
                "the network's own forward fails on the example inputs",
                seen=reason(error),
                hint="pass example inputs, of a shape and type that the network accepts",
            ) from error
        if not self.answers[batch]:
            raise ExportError("the network's output holds no tensor: there is nothing to compare a file with")


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back, afterwards, every module's attributes, flags, tables and hooks, and the buffers' values."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with preserved(model):
            yield
    finally:
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _at_batch(tensor: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """The same kind of values at another batch size: rows repeated, or drawn anew if in floating point."""
    rows = tensor[torch.arange(batch, device=tensor.device) % tensor.size(0)]
    if not tensor.is_floating_point() or not tensor.numel():
        return rows
    values = tensor.detach().flatten()
    if (values == values[0]).all():  # zeros or ones tell little
        return rows + torch.randn(rows.shape, generator=generator).to(rows)
    if batch == tensor.size(0):
        return tensor
    return values[torch.randint(len(values), rows.shape, generator=generator).to(tensor.device)]
