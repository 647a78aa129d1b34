"""Prepare the network that is exported: the calls that its files are checked with, and its outputs for them."""

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
from se_inject.exporting.dimensions import Case, Dimensions, Free
from se_inject.exporting.silence import blocks_called
from se_inject.progress import step
from se_inject.tracing import SMALL_SIDE, copied, cropped, describe, preserved
from se_inject.verification import TOLERANCES, FileCheck, Rejected, difference, reason, tensors

BATCHES = (1, 2, 5)
"""The batch sizes a file is run at, unless its batch is fixed."""

OTHER_SIZES = 2
"""How many other spatial sizes a file is run at, if its size is free."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


class Written(NamedTuple):
    """A file that is there, and has not been compared yet."""

    how: str
    run: Callable[..., Any] | None
    """The file, loaded back, as a function of the network's arguments; None if it can't be run here."""
    notes: tuple[str, ...] = ()


class Reference:
    """The network, the calls its files are checked with, and its answers: the same for every format.

    Args:
        model: the network, converted already.
        args: positional arguments of one call.
        kwargs: keyword arguments of that call.
        conversion: what the call's tensors are converted to.
        opset: the ONNX opset; None for the exporter's own choice.
        small: crop large inputs, if the network takes them then: enough for a file that holds no shapes.
        dynamic_size: ask at other spatial sizes too.

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
        dynamic_size: bool = False,
    ) -> None:
        self.model = model
        self.opset = opset
        self.dynamic_size = dynamic_size
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

    def call(self, free: Free) -> Call:
        """Return the call to export with; its batch is not 1 if the batch is dynamic, since exporters take 1 for a constant."""
        call: Call = copied(self.calls[Case(BATCHES[-1] if free.batch else self.batch)])
        return call

    def run(self, function: Callable[..., Any], case: Case) -> Any:
        """Call the network or a file; an operation in place spoils only a copy of the inputs."""
        args, kwargs = copied(self.calls[case])
        return function(*args, **kwargs)

    def arguments(self) -> dict[str, Any]:
        """Return the example's arguments, by the names of forward's parameters."""
        args, kwargs = self.example
        return dict(self.signature.bind(*args, **kwargs).arguments)

    def dynamic_shapes(self, free: Free, dimension: Callable[[str], Any]) -> dict[str, Any] | None:
        """Make the ``dynamic_shapes`` of exporters: a value for every free dimension of every input; None if there is none.

        Args:
            free: the dimensions that are left open.
            dimension: the value for a dimension of this name.
        """

        def of(leaf: Any) -> dict[int, Any] | None:
            return {d: dimension(name) for d, name in self.dimensions.names(leaf, free).items()} or None

        shapes: dict[str, Any] = pytree.tree_map(of, self.arguments())
        return shapes if any(leaf is not None for leaf in pytree.tree_leaves(shapes)) else None

    def input_names(self) -> list[str]:
        """Name every tensor of the call: by its parameter, and by keys and positions inside of that."""
        leaves, _ = pytree.tree_flatten_with_path(self.arguments())
        keys = [
            "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
            for path, leaf in leaves
            if isinstance(leaf, Tensor)
        ]
        return [key if keys.count(key) == 1 else f"{key}_{number}" for number, key in enumerate(keys)]

    def shapes(self, free: Free) -> list[str]:
        """Format the shape of every input, ``batch×3×224×224``; with its name, if there are several."""
        leaves = [leaf for leaf in pytree.tree_leaves(self.arguments()) if isinstance(leaf, Tensor)]
        shapes = [self.dimensions.shape(leaf, free) for leaf in leaves]
        names = self.input_names() if len(leaves) > 1 else [""]
        return [f"{name} {shape}".strip() for name, shape in zip(names, shapes, strict=True)]

    def cases(self, free: Free) -> list[Case]:
        """List the calls that a file with these free dimensions is checked with."""
        batches = [Case(batch) for batch in (BATCHES if free.batch else (self.batch,))]
        batch = BATCHES[1] if free.batch else self.batch
        return batches + [case for case in self.calls if free.size and case.size and case.batch == batch]

    def check(self, run: Callable[..., Any], free: Free, tolerance: float) -> Iterator[FileCheck]:
        """Compare a file with the network; `Rejected` when it computes something else."""
        for case in self.cases(free):
            want = self.answers[case]
            size = self.sizes[case.size]
            at = f"batch {case.batch}" + (f", size {size}" if case.size else "")
            step(f"running what was exported at {at}")
            try:
                found = list(tensors(self.run(run, case)))
            except Exception as error:
                if not case.size:
                    raise
                raise Rejected(f"the file fails at {at}: {reason(error)}") from error
            check = FileCheck(case.batch, *difference(found, want), size)
            if not check.max_rel_error <= tolerance:
                if max(difference(tensors(self.run(self.model.eval(), case)), want)) > 0:
                    raise ExportError(
                        "the network's own output changes from call to call in eval mode",
                        hint="a file can't be compared with it: make it deterministic in eval mode",
                    )
                seen, allowed = f"{check.max_rel_error:.1e}", f"{tolerance:.0e}"
                raise Rejected(f"relative error {seen} at {at}, allowed {allowed}")
            yield check

    def _observe_all(self, example: Call) -> None:
        """Ask at every batch size and other spatial sizes, and find out at which the network doesn't run."""
        self.example = example
        self.dimensions = Dimensions(self.model, example)
        self.calls: dict[Case, Call] = {}
        self.answers: dict[Case, list[tuple[str, Tensor]]] = {}
        self.sizes = [_shown(self.dimensions.sizes)]
        found = self.dimensions.batch
        self.batch = found or 1
        self.skipped: list[str] = []
        with blocks_called(self.model, example, self.skipped):
            self._observe(Case(self.batch))
        self.fixed = None if found is not None else "no input has a batch dimension"
        for batch in BATCHES if found is not None else ():
            try:
                self._observe(Case(batch))
            except ExportError as error:
                self.fixed = f"the network itself fails at batch {batch}: {reason(error)}"
                break
        if self.dynamic_size:
            self._observe_sizes()

    def _observe_sizes(self) -> None:
        """Ask at two other spatial sizes, of those that the network takes.

        Raises:
            ExportError: it takes fewer, or no input has spatial dimensions.
        """
        failures = [] if self.dimensions.sizes else ["no input has spatial dimensions"]
        batches = {self.batch, BATCHES[1] if self.fixed is None else self.batch}
        for sizes in self.dimensions.other_sizes() if self.dimensions.sizes else ():
            try:
                for batch in batches:
                    self._observe(Case(batch, len(self.sizes)), sizes)
            except ExportError as error:
                failures.append(f"the network itself fails at {_shown(sizes.values())}: {error.seen}")
                continue
            self.sizes.append(_shown(sizes.values()))
            if len(self.sizes) > OTHER_SIZES:
                return
        raise ExportError(
            f"the size can't be left open: {failures[0] if failures else 'there are not two other sizes to check'}",
            seen=f"of {len(failures) + len(self.sizes) - 1} other sizes it takes {len(self.sizes) - 1}",
            hint="export at the size of the example inputs, without `dynamic_size`",
        )

    def _observe(self, case: Case, sizes: Mapping[tuple[int, ...], tuple[int, ...]] | None = None) -> None:
        if case in self.answers:
            return
        generator = torch.Generator().manual_seed(case.batch)
        dimensions = self.dimensions

        def resized(tensor: Tensor) -> Tensor:
            resized = _at_batch(tensor, case.batch, generator) if dimensions.has_batch(tensor) else tensor
            for dimension in dimensions.spatial(tensor) if sizes else ():
                size = sizes[tuple(tensor.shape[-dimensions.rank :])][dimension - tensor.dim()]  # type: ignore[index]
                index = torch.arange(size, device=resized.device) % resized.size(dimension)
                resized = resized.index_select(dimension, index)
            return self.conversion.tensor(resized)

        call = pytree.tree_map_only(Tensor, resized, self.example)
        try:
            self.calls[case] = call
            with untouched(self.model):
                answers = list(tensors(self.run(self.model.eval(), case)))
        except Exception as error:
            del self.calls[case]
            raise ExportError(
                "the network's own forward fails on the example inputs",
                seen=reason(error),
                hint="pass example inputs, of a shape and type that the network accepts",
            ) from error
        if not answers:
            raise ExportError("the network's output holds no tensor: there is nothing to compare a file with")
        self.answers[case] = answers


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


def _shown(sizes: Any) -> str:
    """Format spatial sizes: ``224×224``."""
    return " and ".join("×".join(map(str, size)) for size in sizes)


def _at_batch(tensor: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Make values of the same kind at another batch size: rows repeated, or drawn anew if in floating point."""
    rows = tensor[torch.arange(batch, device=tensor.device) % tensor.size(0)]
    if not tensor.is_floating_point() or not tensor.numel():
        return rows
    values = tensor.detach().flatten()
    if (values == values[0]).all():  # zeros or ones tell little
        return rows + torch.randn(rows.shape, generator=generator).to(rows)
    if batch == tensor.size(0):
        return tensor
    return values[torch.randint(len(values), rows.shape, generator=generator).to(tensor.device)]
