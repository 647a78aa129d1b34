"""Data → text, Markdown, CSV, JSON. Nothing here computes, and nothing here prints."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

if TYPE_CHECKING:
    from se_inject.cost import Cost, CostReport, CostRow, Latency
    from se_inject.plans import Plan
    from se_inject.sites import Sites
    from se_inject.verification import Verdict

FORMATS = ("text", "markdown", "csv")


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], style: str = "text") -> str:
    """Rows under headers, as aligned text, a Markdown table or CSV."""
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([headers, *rows])
        return buffer.getvalue().rstrip("\n")
    kinds = [
        "left" if all(not isinstance(row[i], int | float) for row in rows) else "right" for i in range(len(headers))
    ]
    shown = [[_cell(value) for value in row] for row in rows]
    return tabulate(
        shown,
        headers,
        tablefmt="github" if style == "markdown" else "simple",
        colalign=kinds if rows else None,
        disable_numparse=True,
    )


def as_json(data: Any) -> str:
    """Data as indented JSON."""
    return json.dumps(data, indent=2)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def short(number: float, unit: str = "") -> str:
    """A number with three significant digits and k, M, G or T."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def percent(part: float, whole: float) -> str:
    """A share with its sign."""
    return f"{100 * part / whole:+.2f} %" if whole else "–"


# -- sites -------------------------------------------------------------------------------------------------


def stages_text(sites: Sites, style: str = "text") -> str:
    """The stage table."""
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
    """Every site, and every refusal with its reason."""
    rows = [
        [
            site.stage if site.stage is not None else "–",
            site.address,
            site.kind,
            site.channels,
            "×".join(map(str, site.size)),
            site.held_back or "free",
        ]
        for site in sites.all_sites
    ]
    text = table(("stage", "site", "kind", "channels", "size", "state"), rows, style)
    if sites.refused:
        text += "\n\n" + table(("refused", "reason"), [[item.address, item.reason] for item in sites.refused], style)
    return text


def sites_data(sites: Sites) -> dict[str, Any]:
    """Stages, sites and refusals for ``--json``."""
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
                "held_back": site.held_back,
            }
            for site in sites.all_sites
        ],
        "refused": [{"address": item.address, "reason": item.reason} for item in sites.refused],
    }


def _strides(strides: tuple[tuple[float, ...], ...]) -> str:
    told = [_stride(stride) for stride in strides]
    return told[0] if len(told) == 1 else f"{told[0]} … {told[-1]}"


def _stride(stride: tuple[float, ...]) -> str:
    values = [str(round(value)) for value in stride]
    return values[0] if len(set(values)) == 1 else "×".join(values) or "–"


def _range(channels: tuple[int, ...]) -> str:
    return str(channels[0]) if len(channels) == 1 else f"{min(channels)} … {max(channels)}"


# -- plans and costs ---------------------------------------------------------------------------------------


def plan_text(plan: Plan) -> str:
    """A plan as a table, one line for each block."""
    rows = [
        [step.stage if step.stage is not None else "–", step.site, step.channels, step.block, step.path]
        for step in plan.steps
    ]
    head = f"{len(plan.steps)} blocks for {plan.model}"
    notes = "".join(f"\nnote: {note}" for note in plan.notes)
    return f"{head}\n\n{table(('stage', 'site', 'channels', 'block', 'becomes'), rows)}{notes}"


def cost_text(report: CostReport, style: str = "text", *, by_site: bool = False) -> str:
    """What is added per stage (or per site), and before, added and after in total."""
    headers = ("stage", "blocks", "C → width", "params", "MACs", "element-wise", "bytes")
    rows: list[list[Any]] = []
    for stage, cost in report.stages.items():
        blocks = [row for row in report.rows if row.stage == stage]
        rows.append([stage if stage is not None else "–", len(blocks), _widths(blocks), *_figures(cost)])
    rows.append(["added", len(report.rows), None, *_figures(report.added)])
    rows.append(["before", None, None, *_figures(report.before)])
    rows.append(["after", None, None, *_figures(report.after)])
    text = table(headers, rows, style)
    if by_site or style == "csv":
        lines = [[row.site, row.stage, row.channels, row.width, *_figures(row.cost)] for row in report.rows]
        sites = table(("site", "stage", "channels", "width", *headers[3:]), lines, style)
        text = sites if style == "csv" else f"{sites}\n\n{text}"
    return text


def _widths(rows: Sequence[CostRow]) -> str:
    """The channels of some blocks and the widths of their bottlenecks, as built."""
    pairs = dict.fromkeys((row.channels, row.width) for row in rows)
    told = [f"{channels} → {width}" if width is not None else str(channels) for channels, width in pairs]
    return ", ".join(told) if len(told) <= 2 else f"{told[0]}, …, {told[-1]}"


def cost_lines(report: CostReport) -> list[str]:
    """The same in a few lines for people."""
    added, before = report.added, report.before
    lines = [
        f"parameters    {before.params:,} → {report.after.params:,} ({percent(added.params, before.params)})",
        f"MACs          {short(before.macs)} → {short(report.after.macs)} ({percent(added.macs, before.macs)}; "
        f"1 MAC = 2 FLOPs: {short(report.after.flops)}FLOPs)",
        f"element-wise  {short(before.elementwise)} → {short(report.after.elementwise)} operations "
        f"({percent(added.elementwise, before.elementwise)})",
        f"activations   {short(before.bytes, 'B')} → {short(report.after.bytes, 'B')} read and written "
        f"({percent(added.bytes, before.bytes)})",
    ]
    if report.uncounted:
        lines.append(f"not counted   {', '.join(report.uncounted)}")
    return lines


def cost_data(report: CostReport) -> dict[str, Any]:
    """A cost report for ``--json``."""
    return {
        "before": _cost(report.before),
        "added": _cost(report.added),
        "after": _cost(report.after),
        "stages": [{"stage": stage, **_cost(cost)} for stage, cost in report.stages.items()],
        "sites": [
            {"site": row.site, "stage": row.stage, "block": row.block, "channels": row.channels, "width": row.width}
            | _cost(row.cost)
            for row in report.rows
        ],
        "uncounted": list(report.uncounted),
    }


def _figures(cost: Cost) -> list[int]:
    return [cost.params, cost.macs, cost.elementwise, cost.bytes]


def _cost(cost: Cost) -> dict[str, int]:
    return {
        "params": cost.params,
        "macs": cost.macs,
        "flops": cost.flops,
        "elementwise": cost.elementwise,
        "bytes": cost.bytes,
    }


def latency_line(latency: Latency) -> str:
    """The measured ratio with its spread."""
    return (
        f"latency       {latency.before_ms:.1f} ms → {latency.after_ms:.1f} ms, ratio {latency.ratio:.3f} "
        f"(quartiles {latency.low:.3f} to {latency.high:.3f}, {latency.rounds} rounds in turns)"
    )


# -- verdicts ----------------------------------------------------------------------------------------------


def verdict_lines(verdict: Verdict) -> list[str]:
    """One line for each check."""
    marks = {True: "ok  ", False: "FAIL", None: "–   "}
    width = max(len(check.name) for check in verdict.checks)
    return [f"{marks[check.passed]} {check.name:<{width}}  {check.detail}" for check in verdict.checks] + [
        f"     {note}" for note in verdict.notes
    ]


def verdict_data(verdict: Verdict) -> dict[str, Any]:
    """A verdict for ``--json``."""
    return {
        "passed": verdict.passed,
        "checks": [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in verdict.checks],
        "notes": list(verdict.notes),
    }
