"""List the strategies to write each format, in the order in which they are tried, and the notes about the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from se_inject.exporting.dimensions import FIXED, Free
from se_inject.exporting.onnx_files import write_onnx, write_onnx_by_tracing
from se_inject.exporting.reference import Reference, Written
from se_inject.exporting.torch_formats import write_module, write_pt2, write_scripted, write_traced
from se_inject.forwards import Program
from se_inject.tracing import describe

FIRST_OF_DYNAMO = 18
"""The lowest opset that the dynamo exporter writes; below, torch's older exporter does."""

LAST_OF_TRACING = 20
"""The highest opset that torch's older exporter writes."""

_BATCH = Free(True)


class Strategy(NamedTuple):
    """One strategy to write a format."""

    name: str
    write: Callable[[Reference, Path, Free], Written]
    free: Free
    """The dimensions that the file leaves open; the spatial ones as well where they are asked for."""


_DYNAMO = [Strategy("dynamic batch", write_onnx, _BATCH), Strategy("fixed batch", write_onnx, FIXED)]
_TRACING = [
    Strategy("tracing, dynamic batch", write_onnx_by_tracing, _BATCH),
    Strategy("tracing, fixed batch", write_onnx_by_tracing, FIXED),
]
STRATEGIES = {
    "onnx": [*_DYNAMO, *_TRACING],
    "torchscript": [
        Strategy("scripting", write_scripted, _BATCH),
        Strategy("tracing", write_traced, _BATCH),
        Strategy("tracing, fixed batch", write_traced, FIXED),
    ],
    "pt2": [Strategy("dynamic batch", write_pt2, _BATCH), Strategy("fixed batch", write_pt2, FIXED)],
    "pt": [Strategy("whole module", write_module, _BATCH)],
}
"""The strategies to write each format, in the order in which they are tried."""


def strategies(reference: Reference, format: str) -> list[Strategy]:
    """List the strategies to try; where the network's own batch is fixed, each once and with a fixed batch."""
    found = STRATEGIES[format]
    if format == "onnx" and reference.opset is not None:
        found = [
            *(_DYNAMO if reference.opset >= FIRST_OF_DYNAMO else ()),
            *(_TRACING if reference.opset <= LAST_OF_TRACING else ()),
        ]
    if any(isinstance(module, Program) for module in reference.model.modules()):  # it has no source to be scripted
        found = [strategy for strategy in found if strategy.write is not write_scripted]
    if reference.fixed is not None:
        with_fixed_twin = {strategy.write for strategy in found if not strategy.free.batch}
        found = [strategy for strategy in found if not (strategy.free.batch and strategy.write in with_fixed_twin)]
        found = [strategy._replace(free=FIXED) for strategy in found]
    return [strategy._replace(free=Free(strategy.free.batch, reference.dynamic_size)) for strategy in found]


def described(
    reference: Reference, written: Written, format: str, free: Free, failures: list[str]
) -> tuple[str, list[str]]:
    """Say how a file was written, with notes.

    Args:
        reference: the network.
        written: the file.
        format: its format.
        free: the dimensions that it leaves open.
        failures: why the strategies before this one were not taken.
    """
    how, notes = written.how, [*written.notes]
    if failures and (format == "torchscript" or how.startswith("tracing")):
        how += f" ({failures[0]})"
    if reference.cropped:
        notes.insert(0, f"compared on {describe(*reference.example)}")
    if format != "pt":
        how += ", dynamic batch" if free.batch else f", batch fixed at {reference.batch}"
        why = reference.fixed or (failures[-1] if failures else "")
        notes += [] if free.batch else [f"batch fixed at {reference.batch}: {why}"]
    for name, tensor in reference.answers[reference.cases(free)[0]]:
        if lost := tensor.numel() - int(tensor.isfinite().sum()):
            notes.append(f"{lost} of {tensor.numel()} numbers in the network's own `{name}` are not finite")
        if not tensor.numel():
            notes.append(f"`{name}` is empty on the example inputs: nothing of it was compared")
    if reference.skipped:
        places = ", ".join(f"`{path}`" for path in reference.skipped[:3]) + ", …" * (len(reference.skipped) > 3)
        notes.append(f"the network decides by the data what it calls, and these inputs reach no {places}")
    return how, notes
