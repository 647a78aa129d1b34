"""Format sites as tables and data: stages, single sites, and refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from se_inject.tables import table

if TYPE_CHECKING:
    from se_inject.sites.selection import Sites


def stages_text(sites: Sites, style: str = "text") -> str:
    """Format the stage table."""
    rows = [
        [
            stage.number,
            stage.path or "(the network)",
            _strides(stage.strides),
            _range(stage.channels),
            len(stage.sites),
            sum(site.held_back is None for site in stage.sites),
            ", ".join(stage.aliases) or "–",
        ]
        for stage in sites.table
    ]
    return table(("stage", "path", "stride", "channels", "sites", "free", "alias"), rows, style)


def sites_text(sites: Sites, style: str = "text") -> str:
    """Format every site, and every refusal with its reason."""
    rows = [
        [
            site.stage if site.stage is not None else "–",
            site.address,
            site.kind,
            site.channels,
            "×".join(map(str, site.size)),
            site.held_back.reason if site.held_back else "free",
        ]
        for site in sites.all_sites
    ]
    text = table(("stage", "site", "kind", "channels", "size", "state"), rows, style)
    if sites.refused:
        text += "\n\n" + table(("refused", "reason"), [[item.address, item.reason] for item in sites.refused], style)
    return text


def sites_data(sites: Sites) -> dict[str, Any]:
    """Return stages, sites and refusals as data for ``--json``."""
    return {
        "stages": [
            {
                "stage": stage.number,
                "path": stage.path,
                "strides": [list(stride) for stride in stage.strides],
                "channels": list(stage.channels),
                "sites": [site.address for site in stage.sites],
                "aliases": list(stage.aliases),
            }
            for stage in sites.table
        ],
        "sites": [
            {
                "address": site.address,
                "owner": site.owner,
                "kind": site.kind,
                "stage": site.stage,
                "channels": site.channels,
                "size": list(site.size),
                "held_back": site.held_back.value if site.held_back else None,
            }
            for site in sites.all_sites
        ],
        "refused": [
            {"address": item.address, "reason": item.reason, "unit": item in sites.missed} for item in sites.refused
        ],
    }


def _strides(strides: tuple[tuple[float, ...], ...]) -> str:
    texts = [_stride(stride) for stride in strides]
    return texts[0] if len(texts) == 1 else f"{texts[0]} … {texts[-1]}"


def _stride(stride: tuple[float, ...]) -> str:
    values = [str(round(value)) for value in stride]
    return values[0] if len(set(values)) == 1 else "×".join(values) or "–"


def _range(channels: tuple[int, ...]) -> str:
    return str(channels[0]) if len(channels) == 1 else f"{min(channels)} … {max(channels)}"
