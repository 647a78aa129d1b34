"""Put Squeeze-and-Excitation and other attention blocks into a CNN that you already have.

>>> import se_inject as si
>>> plan = si.plan(network, stages=[3, 4], reduction=16)   # looks; changes nothing
>>> injected = plan.apply(network)                         # a copy; plan.apply_(network) works in place
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from se_inject._version import __version__ as __version__

if TYPE_CHECKING:
    from se_inject.adapters import BackboneWarning as BackboneWarning
    from se_inject.adapters import active_adapter as active_adapter
    from se_inject.adapters import adapters_of as adapters_of
    from se_inject.adapters import load_adapter as load_adapter
    from se_inject.adapters import load_adapter_ as load_adapter_
    from se_inject.adapters import remove_adapter_ as remove_adapter_
    from se_inject.adapters import save_adapter as save_adapter
    from se_inject.adapters import set_adapter_ as set_adapter_
    from se_inject.cost import CostReport as CostReport
    from se_inject.errors import InjectError as InjectError
    from se_inject.exporting import Exported as Exported
    from se_inject.exporting import export as export
    from se_inject.gates import Compared as Compared
    from se_inject.gates import Excitations as Excitations
    from se_inject.gates import Pruned as Pruned
    from se_inject.gates import compare as compare
    from se_inject.gates import excitations as excitations
    from se_inject.gates import prune_blocks_ as prune_blocks_
    from se_inject.inference import for_inference as for_inference
    from se_inject.loading import WeightsWarning as WeightsWarning
    from se_inject.loading import load as load
    from se_inject.loading import load_weights_ as load_weights_
    from se_inject.plans import CostGrid as CostGrid
    from se_inject.plans import Plan as Plan
    from se_inject.plans import cost_grid as cost_grid
    from se_inject.plans import inject as inject
    from se_inject.plans import plan as plan
    from se_inject.plans import plan_of as plan_of
    from se_inject.reports import report as report
    from se_inject.sites import Site as Site
    from se_inject.sites import Sites as Sites
    from se_inject.sites import find_sites as find_sites
    from se_inject.surgery import Fused as Fused
    from se_inject.surgery import eject_ as eject_
    from se_inject.surgery import fuse_ as fuse_
    from se_inject.surgery import fused as fused
    from se_inject.surgery import unfuse_ as unfuse_
    from se_inject.training import Trainable as Trainable
    from se_inject.training import add_to_optimizer as add_to_optimizer
    from se_inject.training import disabled as disabled
    from se_inject.training import freeze_backbone_ as freeze_backbone_
    from se_inject.training import injected_parameters as injected_parameters
    from se_inject.training import trainable as trainable
    from se_inject.training import unfreeze_backbone_ as unfreeze_backbone_
    from se_inject.verification import Verdict as Verdict
    from se_inject.verification import verify as verify

_HOME = {
    "BackboneWarning": "adapters",
    "Compared": "gates",
    "CostGrid": "plans",
    "CostReport": "cost",
    "Excitations": "gates",
    "Exported": "exporting",
    "Fused": "surgery",
    "InjectError": "errors",
    "Plan": "plans",
    "Pruned": "gates",
    "Site": "sites",
    "Sites": "sites",
    "Trainable": "training",
    "Verdict": "verification",
    "WeightsWarning": "loading",
    "active_adapter": "adapters",
    "adapters_of": "adapters",
    "add_to_optimizer": "training",
    "compare": "gates",
    "cost_grid": "plans",
    "disabled": "training",
    "eject_": "surgery",
    "excitations": "gates",
    "export": "exporting",
    "find_sites": "sites",
    "for_inference": "inference",
    "freeze_backbone_": "training",
    "fuse_": "surgery",
    "fused": "surgery",
    "inject": "plans",
    "injected_parameters": "training",
    "load": "loading",
    "load_adapter": "adapters",
    "load_adapter_": "adapters",
    "load_weights_": "loading",
    "plan": "plans",
    "plan_of": "plans",
    "prune_blocks_": "gates",
    "report": "reports",
    "remove_adapter_": "adapters",
    "save_adapter": "adapters",
    "set_adapter_": "adapters",
    "trainable": "training",
    "unfreeze_backbone_": "training",
    "unfuse_": "surgery",
    "verify": "verification",
}
"""The public names, and the room (or module) of each. The only list of them: see ``__getattr__``."""

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``--help`` doesn't wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module `se_inject` has no attribute `{name}`")
    value = globals()[name] = getattr(importlib.import_module(f"se_inject.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
