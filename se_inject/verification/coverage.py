"""Check that the blocks are where the network's units are."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from se_inject.sites import HeldBack, Sites, sites_in
from se_inject.surgery import steps_of
from se_inject.tables import counted
from se_inject.tracing import Trace

_NOUNS = {"residual": "residual units", "conv": "runs of convolutions"}


class Coverage(NamedTuple):
    """How many of a network's units have a block.

    Args:
        gated: the units that have one.
        unchosen: those that could have one and have none.
        attended: of ``unchosen`` those with attention of their own.
        missed: those that can take none.
        elsewhere: blocks that are not at a unit.
        noun: the units in words.
        reason: the commonest reason why units can take none.
    """

    gated: int
    unchosen: int
    attended: int
    missed: int
    elsewhere: int
    noun: str
    reason: str

    def text(self) -> str:
        """Format it as a line: ``16 of 16 residual units``."""
        parts = [f"{self.gated} of {self.gated + self.unchosen + self.missed} {self.noun}"]
        parts += [f"{self.attended} with attention already"] * bool(self.attended)
        parts += [f"{self.unchosen - self.attended} not chosen"] * (self.unchosen > self.attended)
        parts += [f"{self.missed} can take none, most often: {self.reason}"] * bool(self.missed)
        parts += [f"{counted(self.elsewhere, 'block')} elsewhere"] * bool(self.elsewhere)
        return "; ".join(parts)


def coverage(trace: Trace, after: nn.Module) -> Coverage:
    """Count the units of a network that have a block, and those that have none.

    Args:
        trace: an observed call of the network before injection.
        after: the injected network.
    """
    return coverage_of(sites_in(trace), {step.site for step in steps_of(after)})


def coverage_of(found: Sites, gated: Collection[str]) -> Coverage:
    """Count the units that have a block, of sites and the addresses of those that have one."""
    inside = [site for site in found.all_sites if site.stage is not None and site.held_back is not HeldBack.NECK]
    units = [site for site in inside if site.kind != "conv"] or inside
    without = [site for site in units if site.address not in gated and not site.blocks]
    kinds = {site.kind for site in units}
    return Coverage(
        gated=len(units) - len(without),
        unchosen=len(without),
        attended=sum(site.held_back is HeldBack.ATTENTION for site in without),
        missed=len(found.missed),
        elsewhere=len(set(gated) - {site.address for site in units}),
        noun=_NOUNS.get(next(iter(kinds)), "units") if len(kinds) == 1 else "units",
        reason=found.commonest_reason(),
    )


def units_with_blocks(trace: Trace, after: nn.Module) -> tuple[bool | None, str]:
    """Say how many units of a network have a block, and why others have none.

    Args:
        trace: an observed call of the network before injection.
        after: the injected network.

    Returns:
        True, or None if no unit has a block or more were refused than have one; and a line such as ``16 of 16 residual units``.
    """
    seen = coverage(trace, after)
    return None if seen.gated < seen.missed or not seen.gated else True, seen.text()
