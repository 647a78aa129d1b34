"""Put Squeeze-and-Excitation and other attention blocks into a CNN that you already have.

>>> import se_inject as si
>>> plan = si.plan(network, stages=[3, 4], reduction=16)   # looks; changes nothing
>>> injected = plan.apply(network)                         # a copy; plan.apply_(network) works in place
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from se_inject._version import __version__

if TYPE_CHECKING:
    from se_inject.api import (
        BackboneWarning,
        CostGrid,
        CostReport,
        Exported,
        InjectError,
        Plan,
        Site,
        Sites,
        Trainable,
        Verdict,
        add_to_optimizer,
        cost_grid,
        eject_,
        export,
        find_sites,
        freeze_backbone_,
        inject,
        injected_parameters,
        load,
        load_adapter,
        load_adapter_,
        load_weights_,
        plan,
        plan_of,
        save_adapter,
        trainable,
        verify,
    )

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
    "__version__",
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


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``--help`` doesn't wait for torch."""
    if name in __all__:
        from se_inject import api

        value = getattr(api, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module `se_inject` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__
