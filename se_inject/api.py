"""The public names, gathered. The package imports this when one of them is first used."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from se_inject.adapters import BackboneWarning, load_adapter, load_adapter_, save_adapter
from se_inject.loading.models import load, load_weights_
from se_inject.cost.counting import CostReport
from se_inject.errors import InjectError
from se_inject.exporting.exporter import Exported
from se_inject.exporting.exporter import export as _export
from se_inject.sites.finder import find_sites as _find_sites
from se_inject.plans.grid import CostGrid, cost_grid
from se_inject.tracing.inputs import example_of, observe_model
from se_inject.plans.planner import inject, plan, plan_of
from se_inject.plans.value import Plan
from se_inject.sites.selection import Site, Sites
from se_inject.surgery.swap import eject_
from se_inject.training import Trainable, add_to_optimizer, freeze_backbone_, injected_parameters, trainable
from se_inject.verification.checks import Verdict, verify


def find_sites(model: nn.Module, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None) -> Sites:
    """Every place of a network that a block could gate, by stage, and those refused. Nothing is changed.

    Args:
        model: the network.
        example_inputs: as for ``plan``.
        example_kwargs: as for ``plan``.

    Raises:
        TraceError: the network's own forward fails on the inputs.
    """
    return _find_sites(observe_model(model, example_inputs, example_kwargs))


def export(model: nn.Module, path: str | PathLike[str], example_inputs: Any = None, **options: Any) -> Exported:
    """Write a network to a file, in the format that the suffix names, and check the file in its own runtime.

    The network is not changed. Nothing is written if the file doesn't compute what the network does.

    Args:
        model: the network, injected or not.
        path: ``.onnx``, ``.torchscript`` or ``.ts``, ``.pt2``, ``.pt``.
        example_inputs: as for ``plan``.
        **options: ``device``, ``dtype``, ``memory_format``, ``force``, ``opset``, ``example_kwargs``.

    Raises:
        ExportError: the file can't be written, or is not right.
    """
    args, kwargs = example_of(model, example_inputs, options.pop("example_kwargs", None))
    return _export(model, path, args, example_kwargs=kwargs, **options)


__all__ = [
    "BackboneWarning",
    "CostGrid",
    "CostReport",
    "Exported",
    "InjectError",
    "Plan",
    "Site",
    "Sites",
    "Trainable",
    "Verdict",
    "add_to_optimizer",
    "cost_grid",
    "eject_",
    "export",
    "find_sites",
    "freeze_backbone_",
    "inject",
    "injected_parameters",
    "load",
    "load_adapter",
    "load_adapter_",
    "load_weights_",
    "plan",
    "plan_of",
    "save_adapter",
    "trainable",
    "verify",
]
