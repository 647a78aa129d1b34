"""What the package found out → text and data for people and machines. Nothing here computes or prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from se_inject.tables import counted, percent, short, table

if TYPE_CHECKING:
    from se_inject.cost.counting import Cost, CostReport, CostRow, Latency
    from se_inject.exporting.exporter import Exported
    from se_inject.plans.grid import BlockCost, CostGrid
    from se_inject.plans.value import Plan
    from se_inject.sites.selection import Sites
    from se_inject.surgery.step import Step
    from se_inject.training import Trainable
    from se_inject.verification.checks import Verdict

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
    head = f"{counted(len(plan.steps), 'block')} for {plan.model}"
    notes = "".join(f"\nnote: {note}" for note in plan.notes)
    return f"{head}\n\n{table(('stage', 'site', 'channels', 'block', 'becomes'), rows)}{notes}"


def plan_lines(plan: Plan) -> list[str]:
    """A plan in a line for each kind of block: how many, where, with what options and start."""
    kinds: dict[str, list[Step]] = {}
    for step in plan.steps:
        kinds.setdefault(repr((step.block, sorted(step.options.items()), step.init, step.position)), []).append(step)
    sites = Counter(step.site for step in plan.steps)
    chains = {
        " → ".join(step.block for step in plan.steps if step.site == site): None
        for site, count in sites.items()
        if count > 1
    }
    return [*map(_kind_line, kinds.values()), *(f"chained at one site: {chain}" for chain in chains)]


def _kind_line(steps: Sequence[Step]) -> str:
    stages = sorted({step.stage for step in steps if step.stage is not None})
    where = f"in stage{'s' * (len(stages) != 1)} {', '.join(map(str, stages))}" if stages else "outside of the stages"
    step = steps[0]
    options = {"reduction": 16, "bias": True} | step.options if step.block == "se" else dict(step.options)
    if options.get("width") is not None:
        options.pop("reduction", None)
    told = [f"{'r' if key == 'reduction' else key} = {_plain(value)}" for key, value in options.items()]
    start = "identity start" if step.init == "identity" else "the paper's start"
    position = [f"position {step.position}"] if step.position != "standard" else []
    blocks = counted(len(steps), f"{step.block.upper() if step.block == 'se' else step.block} block")
    return f"{blocks} {where}: {', '.join([*position, *told, start])}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def start_notes(factors: dict[str, tuple[float, float]]) -> list[str]:
    """A line for each block that doesn't start as x ↦ x."""
    return [
        f"at the start, block `{block}` scales its input by {_span(factor)} (on random normal values)"
        for block, factor in factors.items()
    ]


def _span(factor: tuple[float, float]) -> str:
    """``0.5``, or ``0.56 to 0.73``."""
    return " to ".join(dict.fromkeys(f"{value:.2g}" for value in factor))


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
        lines = [[row.site, row.block, row.stage, row.channels, row.width, *_figures(row.cost)] for row in report.rows]
        sites = table(("site", "block", "stage", "channels", "width", *headers[3:]), lines, style)
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


def trainable_line(count: Trainable) -> str:
    """How much of a network is trained."""
    share = f" ({100 * count.params / count.total:.1f} %)" if count.total else ""
    frozen = f", statistics of {count.frozen_norms} batch normalisations frozen" if count.frozen_norms else ""
    return f"trainable {_millions(count.params)} of {_millions(count.total)}{share}{frozen}"


def _millions(number: int) -> str:
    """With one decimal in millions, and in full below."""
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"


# -- costs side by side ------------------------------------------------------------------------------------

FIGURES = {"params": "parameters", "macs": "MACs", "elementwise": "element-wise operations", "bytes": "bytes"}
"""The fields of a cost, and what they are called."""


def grid_text(grid: CostGrid, style: str = "text") -> str:
    """A table of stages × ratios for each kind of cost; as CSV a line for each cell."""
    if style == "csv":
        rows = [[cell.stages, cell.reduction, cell.blocks, *_figures(cell.added)] for cell in grid.cells]
        return table(
            ("stages", "r", "blocks", *FIGURES), [["" if v is None else v for v in row] for row in rows], style
        )
    return "\n\n".join(
        f"{name} added to {getattr(grid.before, field):,}\n\n{_pivot(grid, field, style)}"
        for field, name in FIGURES.items()
    )


def _pivot(grid: CostGrid, field: str, style: str) -> str:
    whole = getattr(grid.before, field)
    ratios = ["added" if reduction is None else f"r = {reduction:g}" for reduction in grid.reductions]
    rows = []
    for stages in grid.stages:
        cells = [grid[stages, reduction] for reduction in grid.reductions]
        parts = [getattr(cell.added, field) for cell in cells]
        rows.append([stages, cells[0].blocks, *(f"{part:,} ({percent(part, whole)})" for part in parts)])
    return table(("stages", "blocks", *ratios), rows, style, right=range(2, len(ratios) + 2))


def grid_data(grid: CostGrid) -> dict[str, Any]:
    """A cost grid for ``--json``."""
    return {
        "model": grid.model,
        "block": grid.block,
        "notes": list(grid.notes),
        "before": _cost(grid.before),
        "cells": [
            {"stages": cell.stages, "r": cell.reduction, "blocks": cell.blocks, **_cost(cell.added)}
            for cell in grid.cells
        ],
        "uncounted": list(grid.uncounted),
    }


def block_costs_text(costs: Sequence[BlockCost], style: str = "text") -> str:
    """What each block adds to a network, and how it starts."""
    rows = [
        [item.block, *_figures(item.added), item.identity, _span(item.start)]
        if item.added is not None and item.start is not None
        else [item.block, *[None] * 5, item.refused]
        for item in costs
    ]
    return table(("block", "params", "MACs", "element-wise", "bytes", "identity start", "start factor"), rows, style)


def block_costs_data(costs: Sequence[BlockCost]) -> list[dict[str, Any]]:
    """The same for ``--json``."""
    return [
        {
            "block": item.block,
            "from": item.origin,
            "added": None if item.added is None else _cost(item.added),
            "identity_start": item.identity,
            "start_factor": item.start,
            "refused": item.refused,
        }
        for item in costs
    ]


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


# -- files -------------------------------------------------------------------------------------------------


def exported_lines(item: Exported) -> list[str]:
    """What was written, how, and what the comparison with the network gave."""
    lines = [f"wrote {item.path} ({short(item.size_bytes, 'B')}, {item.how})"]
    if item.checks:
        worst = max(item.checks, key=lambda check: check.max_rel_error)
        batches = ", ".join(str(check.batch) for check in item.checks)
        errors = f"max error {worst.max_abs_error:.2g}, relative {worst.max_rel_error:.2g} (limit {item.tolerance:.0e})"
        found = errors if item.tolerance else "outputs bit-equal"
        lines.append(f"      loaded back and run at batch {batches}: {found}")
    return lines + [f"      {note}" for note in item.notes]


def exported_data(item: Exported) -> dict[str, Any]:
    """A written file for ``--json``."""
    return {
        "path": str(item.path),
        "format": item.format,
        "bytes": item.size_bytes,
        "how": item.how,
        "checks": [check._asdict() for check in item.checks],
        "tolerance": item.tolerance,
        "notes": list(item.notes),
    }
