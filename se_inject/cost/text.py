"""Format costs and latency as tables, lines and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from se_inject.tables import percent, short, table

if TYPE_CHECKING:
    from se_inject.cost.counting import Cost, CostReport, CostRow, Latency


def cost_text(report: CostReport, style: str = "text", *, by_site: bool = False) -> str:
    """Write a table of what is added per stage (or per site), and before, added and after in total."""
    headers = ("stage", "blocks", "C → width", "params", "MACs", "element-wise", "bytes")
    rows: list[list[Any]] = []
    for stage, cost in report.stages.items():
        blocks = [row for row in report.rows if row.stage == stage]
        rows.append([stage if stage is not None else "–", len(blocks), _widths(blocks), *cost_figures(cost)])
    rows.append(["added", len(report.rows), None, *cost_figures(report.added)])
    rows.append(["before", None, None, *cost_figures(report.before)])
    rows.append(["after", None, None, *cost_figures(report.after)])
    text = table(headers, rows, style)
    if by_site or style == "csv":
        lines = [
            [row.site, row.block, row.stage, row.channels, row.width, *cost_figures(row.cost)] for row in report.rows
        ]
        sites = table(("site", "block", "stage", "channels", "width", *headers[3:]), lines, style)
        text = sites if style == "csv" else f"{sites}\n\n{text}"
    return text


def _widths(rows: Sequence[CostRow]) -> str:
    """List the channels of some blocks and the widths of their bottlenecks, as built."""
    pairs = dict.fromkeys((row.channels, row.width) for row in rows)
    widths = [f"{channels} → {width}" if width is not None else str(channels) for channels, width in pairs]
    return ", ".join(widths) if len(widths) <= 2 else f"{widths[0]}, …, {widths[-1]}"


def cost_lines(report: CostReport) -> list[str]:
    """Say the totals of a cost report in a few lines for people."""
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
    """Turn a cost report into data for ``--json``."""
    return {
        "before": cost_dict(report.before),
        "added": cost_dict(report.added),
        "after": cost_dict(report.after),
        "stages": [{"stage": stage, **cost_dict(cost)} for stage, cost in report.stages.items()],
        "sites": [
            {"site": row.site, "stage": row.stage, "block": row.block, "channels": row.channels, "width": row.width}
            | cost_dict(row.cost)
            for row in report.rows
        ],
        "uncounted": list(report.uncounted),
    }


def cost_figures(cost: Cost) -> list[int]:
    """List the four figures of a cost in the order of ``FIGURES``."""
    return [cost.params, cost.macs, cost.elementwise, cost.bytes]


def cost_dict(cost: Cost) -> dict[str, int]:
    """Turn a cost into data for ``--json``."""
    return {
        "params": cost.params,
        "macs": cost.macs,
        "flops": cost.flops,
        "elementwise": cost.elementwise,
        "bytes": cost.bytes,
    }


def latency_line(latency: Latency, what: str = "latency") -> str:
    """Say the measured ratio with its spread, in one line."""
    return (
        f"{what:<13} {latency.before_ms:.1f} ms → {latency.after_ms:.1f} ms, ratio {latency.ratio:.3f} "
        f"(quartiles {latency.low:.3f} to {latency.high:.3f}, {latency.rounds} rounds in turns)"
    )


FIGURES = {"params": "parameters", "macs": "MACs", "elementwise": "element-wise operations", "bytes": "bytes"}
"""The fields of a cost, and what they are called."""
