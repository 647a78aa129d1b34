"""Model → files, each checked against the eager network in its own runtime.

A file is written under a temporary name, loaded back by what will run it (ONNX Runtime, `torch.jit.load`,
`torch.export.load`, `torch.load`), run at batch 1, 2 and 5 and compared; only then does it appear. A format
can have several roads (a dynamic batch or a fixed one, scripting or tracing). The first whose file computes
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from se_inject.atomic_files import atomic_all, check_all_writable, no_space
from se_inject.errors import ExportError
from se_inject.exporting.conversion import FORMATS, Conversion, format_of
from se_inject.exporting.onnx import write_onnx
from se_inject.exporting.reference import Network, Written, untouched
from se_inject.exporting.torch_formats import write_module, write_pt2, write_scripted, write_traced
from se_inject.forwards import Program
from se_inject.progress import step
from se_inject.tracing import describe, example_of
from se_inject.verification import Check, reason


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file that was written: how, what the comparison measured and allowed, and what to know about it."""

    path: Path
    format: str
    size_bytes: int
    how: str
    checks: tuple[Check, ...]
    tolerance: float
    notes: tuple[str, ...]


class Road(NamedTuple):
    """One way to write a format."""

    name: str
    write: Callable[[Network, Path, bool], Written]
    dynamic: bool
    """Whether the file's batch is left open."""


ROADS = {
    "onnx": [Road("dynamic batch", write_onnx, True), Road("fixed batch", write_onnx, False)],
    "torchscript": [
        Road("scripting", write_scripted, True),
        Road("tracing", write_traced, True),
        Road("tracing, fixed batch", write_traced, False),
    ],
    "pt2": [Road("dynamic batch", write_pt2, True), Road("fixed batch", write_pt2, False)],
    "pt": [Road("whole module", write_module, True)],
}
"""The ways to write each format, in the order in which they are tried."""


def export(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, **options: Any) -> Exported:
    """Write a network to a file, in the format that the suffix names, and check the file in its own runtime.

    Does not change the network. Nothing is written if the file doesn't compute what the network does.

    Args:
        model: the network, injected or not.
        path: ``.onnx``, ``.torchscript`` or ``.ts``, ``.pt2``, ``.pt``.
        example_inputs: as for ``plan``.
        **options: ``device``, ``dtype``, ``memory_format``, ``force``, ``opset``, ``example_kwargs``.

    Raises:
        ExportError: the file can't be written, or is not right.
    """
    kwargs = options.pop("example_kwargs", None) or {}
    args = example_inputs
    if not isinstance(args, tuple) or any(
        leaf.is_meta for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)
    ):
        args, kwargs = example_of(model, args, kwargs)
    (exported,) = export_all(model, [path], args, example_kwargs=kwargs, **options)
    return exported


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
        opset: the ONNX opset; None for the exporter's own choice.

    Raises:
        OptionError: an unknown suffix, device, dtype or memory format.
        ExportError: a file can't be written, or no road leads to one that computes what the network computes.
    """
    conversion: dict[str, Any] = {"device": device, "dtype": dtype, "memory_format": memory_format}
    check_targets(paths, **conversion, force=force)
    targets = [Path(path) for path in paths]
    with atomic_all(targets, force) as temporary:
        return write_networks(
            model, targets, temporary, example_inputs, example_kwargs=example_kwargs, opset=opset, **conversion
        )


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
) -> list[Exported]:
    """Write the network to files under other names, and check each; ``export_all`` then moves them.

    Args:
        model: as for ``export_all``, and so is the rest.
        targets: the files that are to appear.
        temporary: where each is written.

    Raises:
        OptionError: as for ``export_all``.
        ExportError: no road leads to a file that computes what the network computes.
    """
    conversion = Conversion.asked(device, dtype, memory_format)
    with _quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = conversion.model(model)

        @functools.cache
        def network(small: bool) -> Network:
            return Network(model, example_inputs, example_kwargs or {}, conversion, opset=opset, small=small)

        return [
            _export_one(network(small=format_of(target) == "pt"), target, path)  # a pickle holds no shapes
            for target, path in zip(targets, temporary, strict=True)
        ]


def check_targets(
    paths: Sequence[str | os.PathLike[str]],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: str | torch.memory_format | None = None,
    force: bool = False,
) -> None:
    """Whether these files could be written and these conversions made here, before anything else is done.

    Raises:
        OptionError: an unknown suffix, device, dtype or memory format, or a file named twice.
        ExportError: a file can't be written, or there is no such device.
    """
    for path in paths:
        format_of(Path(path))
    check_all_writable(paths, force)
    Conversion.asked(device, dtype, memory_format)


def _export_one(network: Network, target: Path, path: Path) -> Exported:
    format = format_of(target)
    exact = format == "pt" and network.conversion.device == torch.device("cpu")
    tolerance = 0.0 if exact else network.tolerance
    failures: list[str] = []
    for road in _roads(network, format):
        step(f"exporting {target.name} ({road.name})")
        try:
            with untouched(network.model):
                written = road.write(network, path, road.dynamic)
                checks = tuple(network.check(written.run, road.dynamic, tolerance)) if written.run else ()
        except ExportError:
            raise
        except Exception as error:
            if no_space(error):
                raise
            cause, why = error, reason(error)
            if not any(failure.endswith(why) for failure in failures):
                failures.append(f"{road.name} failed: {why}")
            for leftover in path.parent.iterdir():
                leftover.unlink()
            continue
        how, notes = _described(network, written, format, road.dynamic, failures)
        files = sorted(path.parent.iterdir())
        notes += [f"its weights are in `{file.name}`: keep the two together" for file in files if file != path]
        size = sum(file.stat().st_size for file in files)
        return Exported(target, format, size, how, checks, tolerance, tuple(notes))
    others = ", ".join(sorted({*FORMATS.values()} - {format}))
    raise ExportError(
        f"cannot export to `{target}`",
        seen="\n      ".join(failures),
        hint=f"another format may do: {others}",
    ) from cause


def _roads(network: Network, format: str) -> list[Road]:
    """The ways to try, in order; where the network's own batch is fixed, each once and with a fixed batch."""
    roads = ROADS[format]
    if any(isinstance(module, Program) for module in network.model.modules()):  # it has no source to be scripted
        roads = [road for road in roads if road.write is not write_scripted]
    if network.fixed is None:
        return roads
    with_fixed_twin = {road.write for road in roads if not road.dynamic}
    roads = [road for road in roads if not (road.dynamic and road.write in with_fixed_twin)]
    return [road._replace(dynamic=False) for road in roads]


def _described(
    network: Network, written: Written, format: str, dynamic: bool, failures: list[str]
) -> tuple[str, list[str]]:
    how, notes = written.how, [*written.notes]
    if format == "torchscript" and failures:
        how += f" ({failures[0]})"
    if network.cropped:
        notes.insert(0, f"compared on {describe(*network.example)}")
    if format != "pt":
        how += ", dynamic batch" if dynamic else f", batch fixed at {network.batch}"
        notes += [] if dynamic else [f"batch fixed at {network.batch}: {network.fixed or failures[-1]}"]
    for name, tensor in network.answers[network.batch]:
        if lost := tensor.numel() - int(tensor.isfinite().sum()):
            notes.append(f"{lost} of {tensor.numel()} numbers in the network's own `{name}` are not finite")
    return how, notes


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
