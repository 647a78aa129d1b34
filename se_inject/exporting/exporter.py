"""Export a network to files, and check each against the network in the runtime that opens it.

A file is written under a temporary name, loaded back by what will run it (ONNX Runtime, `torch.jit.load`,
`torch.export.load`, `torch.load`), run at batch 1, 2 and 5 and compared; only then does it appear. A format
can have several strategies (a dynamic batch or a fixed one, scripting or tracing). The first whose file computes
what the network computes is taken; the result says which it was, and why not the one before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from se_inject.atomic_files import atomic_all, check_all_writable, no_space
from se_inject.errors import ExportError
from se_inject.exporting.conversion import FORMATS, Conversion, format_of
from se_inject.exporting.onnx_files import check_opset, depends_on_data
from se_inject.exporting.reference import Reference, untouched
from se_inject.exporting.strategies import described, strategies
from se_inject.exporting.torch_formats import unpicklable_within
from se_inject.guarding import under_guard
from se_inject.progress import step
from se_inject.tables import Printed, short
from se_inject.tracing import check_supported, describe, example_of
from se_inject.verification import FileCheck, reason


@dataclasses.dataclass(frozen=True, repr=False)
class Exported(Printed):
    """A file that was written: the way, the errors measured and allowed in the comparison, and notes."""

    path: Path
    format: str
    size_bytes: int
    how: str
    checks: tuple[FileCheck, ...]
    tolerance: float
    notes: tuple[str, ...]
    shapes: tuple[str, ...] = ()
    """The shape of every input, with the dimensions that are free by name: ``batch×3×224×224``."""

    def text(self) -> str:
        """Describe what was written, how, and the result of the comparison."""
        from se_inject.exporting.text import exported_lines

        return "\n".join(exported_lines(self))

    def summary(self) -> str:
        """Describe the file, its size and how it was made."""
        return f"{self.path}, {short(self.size_bytes, 'B')}, {self.how}"


_CHECKED = ("device", "dtype", "memory_format", "force", "opset")


def export(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, **options: Any) -> Exported:
    """Write a network to a file, in the format that the suffix names, and check the file in its own runtime.

    Does not change the network. Nothing is written if the file doesn't compute what the network does.

    Args:
        model: the network, injected or not.
        path: ``.onnx``, ``.torchscript`` or ``.ts``, ``.pt2``, ``.pt``.
        example_inputs: as for ``plan``.
        **options: ``device``, ``dtype``, ``memory_format``, ``force``, ``opset``, ``dynamic_size``,
            ``example_kwargs``; see ``export_all``.

    Returns:
        what was written: the free dimensions, the measured errors, notes.

    Raises:
        OptionError: an unknown suffix, device, dtype, memory format or opset.
        ExportError: the file can't be written, or is not right.
    """
    check_targets([path], **{key: options[key] for key in _CHECKED if key in options})
    args, kwargs = _example(model, example_inputs, options.pop("example_kwargs", None))
    (exported,) = export_all(model, [path], args, example_kwargs=kwargs, **options)
    if example_inputs is None and not kwargs:
        note = f"no example inputs were given: {describe(args, kwargs)} was assumed"
        exported = dataclasses.replace(exported, notes=(note, *exported.notes))
    return exported


def _example(model: nn.Module, given: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call that a user gave, if it has numbers in it; else one like it, or one that is inferred."""
    check_supported(model)
    args = given if isinstance(given, tuple) else (given,)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if given is not None and not any(leaf.is_meta for leaf in leaves):
        return args, dict(kwargs or {})
    return example_of(model, given, kwargs)


@under_guard
def export_all(
    model: nn.Module,
    paths: Sequence[str | os.PathLike[str]],
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: str | torch.memory_format | None = None,
    force: bool = False,
    opset: int | None = None,
    dynamic_size: bool = False,
) -> list[Exported]:
    """Write the network to several files and check each; either all of them appear or none.

    Does not change the model: conversions are done on a copy, and what an exporter leaves behind is put back.
    `.onnx`, `.torchscript` and `.pt2` hold the network in eval mode, `.pt` the module with the modes it has.

    Args:
        model: an eager network.
        paths: the files; the suffix (see `FORMATS`) chooses the format.
        example_inputs: positional arguments of one call: tensors, or lists, tuples and dicts of them. The
            first dimension of the first tensor is the batch, and so is an equal one of any other tensor.
        example_kwargs: keyword arguments of that call.
        device: "cpu" or "cuda", if the file is for another one than the model is on.
        dtype: "float32", "float16" or "bfloat16", for the weights and for inputs in floating point.
        memory_format: "channels_last" or "contiguous", for weights and inputs of four dimensions.
        force: replace files that exist.
        opset: the ONNX opset, 11 or higher; None for the exporter's own choice. Below 18 torch's older exporter
            writes the file.
        dynamic_size: leave the spatial dimensions of the inputs open too (height and width of images), and check
            each file at two more sizes.

    Raises:
        OptionError: an unknown suffix, device, dtype, memory format or opset.
        ExportError: a file can't be written, or no strategy leads to one that computes what the network computes.
    """
    conversion: dict[str, Any] = {"device": device, "dtype": dtype, "memory_format": memory_format}
    check_targets(paths, **conversion, force=force, opset=opset)
    targets = [Path(path) for path in paths]
    with atomic_all(targets, force) as temporary:
        return write_networks(
            model, targets, temporary, example_inputs,
            example_kwargs=example_kwargs, opset=opset, dynamic_size=dynamic_size, **conversion,
        )  # fmt: skip


def write_networks(
    model: nn.Module,
    targets: Sequence[Path],
    temporary: Sequence[Path],
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: str | torch.memory_format | None = None,
    opset: int | None = None,
    dynamic_size: bool = False,
) -> list[Exported]:
    """Write the network to files under other names, and check each; ``export_all`` then moves them.

    Args:
        model: as for ``export_all``, and so is the rest.
        targets: the files that are to appear.
        temporary: where each is written.

    Raises:
        OptionError: as for ``export_all``.
        ExportError: no strategy leads to a file that computes what the network computes.
    """
    conversion = Conversion.asked(device, dtype, memory_format)
    with _quiet(), torch.no_grad():
        model = conversion.model(model)

        @functools.cache
        def reference(small: bool) -> Reference:
            return Reference(
                model, example_inputs, example_kwargs or {}, conversion,
                opset=opset, small=small, dynamic_size=dynamic_size and not small,
            )  # fmt: skip

        return [
            _export_one(reference(small=format_of(target) == "pt"), target, path)  # a pickle holds no shapes
            for target, path in zip(targets, temporary, strict=True)
        ]


def check_targets(
    paths: Sequence[str | os.PathLike[str]],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: str | torch.memory_format | None = None,
    force: bool = False,
    opset: int | None = None,
) -> None:
    """Check that these files can be written and these conversions made here, before anything else is done.

    Raises:
        OptionError: an unknown suffix, device, dtype, memory format or opset, or a file named twice.
        ExportError: a file can't be written, or there is no such device.
    """
    for path in paths:
        format_of(Path(path))
    check_all_writable(paths, force)
    converted = Conversion.asked(device, dtype, memory_format)
    if any(format_of(Path(path)) == "onnx" for path in paths):
        check_opset(opset, converted.dtype)


def _export_one(reference: Reference, target: Path, path: Path) -> Exported:
    format = format_of(target)
    exact = format == "pt" and reference.conversion.device == torch.device("cpu")
    tolerance = 0.0 if exact else reference.tolerance
    failures: list[str] = []
    refused: set[Any] = set()
    for strategy in strategies(reference, format):
        if strategy.write in refused:
            continue
        step(f"exporting {target.name} ({strategy.name})")
        try:
            with untouched(reference.model):
                written = strategy.write(reference, path, strategy.free)
                checks = tuple(reference.check(written.run, strategy.free, tolerance)) if written.run else ()
        except ExportError:
            raise
        except Exception as error:
            if no_space(error):
                raise
            cause, why = error, reason(error)
            if depends_on_data(error):  # with a fixed batch as well
                refused.add(strategy.write)
                why = "what it computes depends on the data"
            if not any(failure.endswith(why) for failure in failures):
                failures.append(f"{strategy.name} failed: {why}")
            for leftover in path.parent.iterdir():
                leftover.unlink()
            continue
        how, notes = described(reference, written, format, strategy.free, failures)
        files = sorted(path.parent.iterdir())
        notes += [f"its weights are in `{file.name}`: keep the two together" for file in files if file != path]
        size = sum(file.stat().st_size for file in files)
        shapes = () if format == "pt" else tuple(reference.shapes(strategy.free))
        return Exported(target, format, size, how, checks, tolerance, tuple(notes), shapes)
    open_size = " with its size left open" if reference.dynamic_size else ""
    others = ", ".join(sorted({*FORMATS.values()} - {format}))
    hint = "leave `dynamic_size` out: a block or a network may bake its size in (`ge` does)" if open_size else None
    if format == "pt" and (inner := unpicklable_within(reference.model)) is not None:
        hint = f"it holds {inner}: `.torchscript` can hold that"
    elif (inner := unpicklable_within(reference.model)) is not None:
        hint = f"it holds {inner}, which torch may not be able to write in this format; another may do: {others}"
    raise ExportError(
        f"cannot export to `{target}`{open_size}",
        seen="\n      ".join(failures),
        hint=hint or f"another format may do: {others}",
    ) from cause


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings, log lines and prints from the user; their errors come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
