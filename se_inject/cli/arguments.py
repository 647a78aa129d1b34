"""Turn the options of a command into arguments of the package's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_inject.adapters import Adapter, read_adapter
from se_inject.cli.talk import note
from se_inject.errors import OptionError
from se_inject.loading import load
from se_inject.plans import Plan
from se_inject.tracing import float_like, parse_shape


def conversion(options: dict[str, Any], *more: str) -> dict[str, Any]:
    """Collect the conversion of written networks from the options, and more options by name."""
    return {key: options[key] for key in ("device", "dtype", "memory_format", *more)}


def check_inference(outputs: tuple[Path, ...], options: dict[str, Any]) -> None:
    """Refuse to write blocks alone, to go on with, from a copy for inference.

    Raises:
        OptionError: ``--for-inference`` beside an adapter.
    """
    adapters = [path for path in outputs if path.suffix.lower() == ".safetensors"]
    if options["for_inference"] and adapters:
        raise OptionError(
            f"`{adapters[0]}` holds blocks to be trained further, a copy for inference has none",
            hint="write it without --for-inference",
        )


def packages(trust: tuple[str, ...]) -> tuple[str, ...]:
    """Return the packages that may be imported for a pickle: blocks may come from a ``.py`` file as well."""
    return tuple(name for name in trust if not name.endswith(".py"))


def read_network(model: str, **options: Any) -> nn.Module:
    """Load the network that the options name, as ``load`` does, and say on stderr what there is to note about it."""
    notes: list[str] = []
    network = load(model, notes=notes, **options)
    for line in notes:
        note(f"note: {line}")
    return network


def network_of(given: dict[str, Any], **more: Any) -> nn.Module:
    """Load the network that a command's own options name; ``more`` is for ``load``."""
    named = {key: given[key] for key in ("arch", "weights", "entry")}
    return read_network(given["model"], **named, trust=packages(given["trust"]), **more)


def block_options(options: dict[str, Any]) -> dict[str, Any]:
    """Collect the block options that the command line has options for."""
    return {key: options[key] for key in ("reduction", "divisor", "bias") if options.get(key) is not None}


def stored_plan(options: dict[str, Any], trust: tuple[str, ...]) -> Plan | Adapter | None:
    """Read the plan or adapter that ``--plan`` or ``--adapter`` names, which leaves nothing to choose."""
    files = {key: options[key] for key in ("plan_file", "adapter") if options[key] is not None}
    if not files:
        return None
    names = {
        "plan_file": "--plan",
        "adapter": "--adapter",
        "blocks": "--block",
        "settings": "--set",
        "reduction": "--r",
    }
    choices = (
        "stages",
        "at",
        "attended",
        "budget",
        "blocks",
        "settings",
        "reduction",
        "divisor",
        "bias",
        "init",
        "name",
    )
    chosen = [key for key in choices if options.get(key) not in (None, ()) and (options[key] or key == "bias")]
    if options.get("position", "standard") != "standard":
        chosen.append("position")
    given = [*files, *chosen]
    if len(given) > 1:
        first, second = (names.get(key, f"--{key}") for key in given[:2])
        raise OptionError(f"`{first}` leaves nothing to choose, and `{second}` is given", hint=f"leave `{second}` out")
    if "adapter" in files:
        return read_adapter(files["adapter"], trust=trust)
    return Plan.load(files["plan_file"], trust=trust)


def example(inputs: tuple[str, ...], network: nn.Module) -> Any:
    """Return inputs of the given shapes, without numbers; None: infer them."""
    if not inputs:
        return None
    dtype = float_like(network).dtype
    return tuple(torch.empty(parse_shape(text), device="meta", dtype=dtype) for text in inputs)
