"""Name the attribute that the block of each site gets on its owner."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from torch import nn

from se_inject.forwards import steps_data
from se_inject.sites.operations import child_path
from se_inject.sites.site import HeldBack, Site
from se_inject.tracing import Trace


def named(trace: Trace, sites: list[Site]) -> list[Site]:
    """Give each site a block name that depends on the network alone, not on what is selected.

    Sites that hold blocks already get the paths of these.
    """
    owners = Counter(site.owner for site in sites)
    injected: dict[str, list[str]] = {}
    for path, module in trace.model.named_modules():
        for step in steps_data(module):
            address = path + step["site"] if step["site"].startswith(".") else step["site"]
            injected.setdefault(address.lstrip("."), []).append(child_path(path, step["block_name"]))
    result: list[Site] = []
    taken: dict[str, set[str]] = {}
    for site in sites:
        label = re.sub(r"\W+", "_", site.value or "out")
        name = "se" if owners[site.owner] == 1 else f"se_{label}"
        owner = trace.model.get_submodule(site.owner)
        blocks = tuple(injected.get(site.address, ()))
        if name in taken.setdefault(site.owner, set()) or (not blocks and _is_taken(owner, name, site.value)):
            name = f"{name}_block"
        taken[site.owner].add(name)
        held = HeldBack.INJECTED if blocks else site.held_back
        result.append(replace(site, block_name=name, blocks=blocks, held_back=held))
    return result


def _is_taken(owner: nn.Module, name: str, value: str | None) -> bool:
    """Return whether an attribute is there already.

    One that is None is free, unless the author's own forward goes on reading it.
    """
    return (
        hasattr(type(owner), name) or (value is None and hasattr(owner, name)) or getattr(owner, name, None) is not None
    )
