"""Write an injected network into files of every kind that the suffixes ask for: networks, adapters and plans."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from se_inject.adapters import write_adapter
from se_inject.atomic_files import atomic_all, check_all_writable
from se_inject.exporting.exporter import Exported, check_targets, write_networks
from se_inject.plans import Plan


def check_outputs(paths: Sequence[str | os.PathLike[str]], *, force: bool = False, **options: Any) -> None:
    """Check that these files could be written, before anything else is done.

    Args:
        paths: the files; ``.json`` is a plan, ``.safetensors`` an adapter, the rest as for ``export_all``.
        force: replace files that exist.
        **options: ``device``, ``dtype``, ``memory_format`` and ``opset``.

    Raises:
        OptionError: an unknown suffix, device, dtype, memory format or opset.
        ExportError: a file can't be written.
    """
    check_targets([path for path in paths if _writer(path) is None], force=force, **options)
    check_all_writable(paths, force)


def write_all(
    model: nn.Module,
    plan: Plan,
    paths: Sequence[str | os.PathLike[str]],
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    force: bool = False,
    **options: Any,
) -> list[Exported]:
    """Write an injected model to several files and check each; either all of them appear or none.

    Args:
        model: an injected network; it is not changed.
        plan: what was injected.
        paths: the files; ``.json`` is a plan, ``.safetensors`` an adapter, the rest as for ``export_all``.
        example_inputs: positional arguments of one call.
        example_kwargs: keyword arguments of that call.
        force: replace files that exist.
        **options: as for ``export_all``; an adapter and a plan are written as they are.

    Raises:
        OptionError: an unknown suffix, device, dtype, memory format or opset.
        ExportError: a file can't be written, or is not right.
    """
    targets = [Path(path) for path in paths]
    written: dict[Path, Exported] = {}
    with atomic_all(targets, force) as temporary:
        places = dict(zip(targets, temporary, strict=True))
        for target, path in places.items():
            if (write := _writer(target)) is not None:
                written[target] = dataclasses.replace(write(model, plan, path), path=target)
        others = [target for target in targets if target not in written]
        if others:
            exported = write_networks(
                model, others, [places[target] for target in others], example_inputs,
                example_kwargs=example_kwargs, **options,
            )  # fmt: skip
            written |= dict(zip(others, exported, strict=True))
    return [written[target] for target in targets]


def _adapter(model: nn.Module, plan: Plan, path: Path) -> Exported:
    write_adapter(model, plan, path)
    note = "without the backbone: `--adapter FILE` or `si.load_adapter` puts it onto the same one"
    return _exported(path, "adapter", "the blocks alone, read back bit-equal", note)


def _plan(model: nn.Module, plan: Plan, path: Path) -> Exported:
    plan.save(path)
    return _exported(path, "plan", f"{len(plan)} steps", "without weights: `--plan FILE` replays it")


def _exported(path: Path, format: str, how: str, note: str) -> Exported:
    return Exported(path, format, path.stat().st_size, how, (), 0.0, (note,))


_Writer = Callable[[nn.Module, Plan, Path], Exported]
_WRITERS: dict[str, _Writer] = {".json": _plan, ".safetensors": _adapter}


def _writer(path: str | os.PathLike[str]) -> _Writer | None:
    """Choose the function that writes an adapter or a plan; None for a network's file."""
    return _WRITERS.get(Path(path).suffix.lower())
