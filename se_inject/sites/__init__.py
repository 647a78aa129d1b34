"""Find and select the places where a block could go.

In: a ``Trace``. Out: ``Sites``: a frozen selection of sites in stages, and the refused places with their reasons.
Must not know: which block will be put in, how a forward is edited, or what anything costs.
"""

from se_inject.sites.dataflow import last_write
from se_inject.sites.finder import find_sites, sites_in
from se_inject.sites.operations import labels, returned
from se_inject.sites.parts import Operation, Parts, parts_of
from se_inject.sites.positions import POSITIONS, Place, place_of
from se_inject.sites.selection import ALL, ALL_BUT_LAST, Sites, commonest
from se_inject.sites.site import HeldBack, Refusal, Site, Stage
from se_inject.sites.text import sites_data, sites_text, stages_text

__all__ = [
    "ALL",
    "ALL_BUT_LAST",
    "POSITIONS",
    "HeldBack",
    "Operation",
    "Parts",
    "Place",
    "Refusal",
    "Site",
    "Sites",
    "Stage",
    "commonest",
    "find_sites",
    "labels",
    "last_write",
    "parts_of",
    "place_of",
    "returned",
    "sites_data",
    "sites_in",
    "sites_text",
    "stages_text",
]
