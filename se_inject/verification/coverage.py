"""Whether the blocks are where the network's units are."""

from __future__ import annotations

from collections import Counter

from torch import nn

from se_inject.sites import HeldBack, Site, sites_in
from se_inject.surgery import steps_of
from se_inject.tables import counted
from se_inject.tracing import Trace

_NOUNS = {"residual": "residual units", "conv": "runs of convolutions"}


def units_with_blocks(trace: Trace, after: nn.Module) -> tuple[bool | None, str]:
    """Count the units of a network that have a block, and say why others have none.

    Args:
        trace: an observed call of the network before injection.
        after: the injected network.

    Returns:
        True, or None if no unit has a block or more were refused than have one; and a line such as ``16 of 16 residual units``.
    """
    found = sites_in(trace)
    inside = [site for site in found.all_sites if site.stage is not None and site.held_back is not HeldBack.NECK]
    units = [site for site in inside if site.kind != "conv"] or inside
    gated = {step.site for step in steps_of(after)}
    without = [site for site in units if site.address not in gated and not site.blocks]
    gets = len(units) - len(without)
    total = len(units) + len(found.missed)
    kinds = {site.kind for site in units}
    noun = _NOUNS.get(next(iter(kinds)), "units") if len(kinds) == 1 else "units"
    text = f"{gets} of {total} {noun}"
    reasons = [*_reasons(without)]
    if found.missed:
        reasons.append(f"{len(found.missed)} can take none, most often: {found.commonest_reason()}")
    elsewhere = len(gated - {site.address for site in units})
    if elsewhere:
        reasons.append(f"{counted(elsewhere, 'block')} elsewhere")
    return None if gets < len(found.missed) or not gets else True, "; ".join([text, *reasons])


def _reasons(without: list[Site]) -> list[str]:
    """Return why units have no block: attention of their own, or nobody chose them."""
    counts = Counter(site.held_back is HeldBack.ATTENTION for site in without)
    return [
        f"{counts[attended]} {text}"
        for attended, text in ((True, "with attention already"), (False, "not chosen"))
        if counts[attended]
    ]
