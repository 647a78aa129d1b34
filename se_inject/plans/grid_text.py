"""Format cost grids and costs of single blocks as tables and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from se_inject.cost import FIGURES, cost_dict, cost_figures
from se_inject.plans.text import span
from se_inject.tables import percent, table

if TYPE_CHECKING:
    from se_inject.plans.grid import BlockCost, CostGrid


def grid_text(grid: CostGrid, style: str = "text") -> str:
    """Write a table of stages × ratios for each kind of cost; as CSV a line for each cell."""
    if style == "csv":
        rows = [[cell.stages, cell.reduction, cell.blocks, *cost_figures(cell.added)] for cell in grid.cells]
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
    """Turn a cost grid into data for ``--json``."""
    return {
        "model": grid.model,
        "block": grid.block,
        "notes": list(grid.notes),
        "before": cost_dict(grid.before),
        "cells": [
            {"stages": cell.stages, "r": cell.reduction, "blocks": cell.blocks, **cost_dict(cell.added)}
            for cell in grid.cells
        ],
        "uncounted": list(grid.uncounted),
    }


def block_costs_text(costs: Sequence[BlockCost], style: str = "text") -> str:
    """Write a table of what each block adds to a network, and how it starts."""
    rows = [
        [item.block, *cost_figures(item.added), item.identity, span(item.start)]
        if item.added is not None and item.start is not None
        else [item.block, *[None] * 5, item.refused]
        for item in costs
    ]
    return table(("block", "params", "MACs", "element-wise", "bytes", "identity start", "start factor"), rows, style)


def block_costs_data(costs: Sequence[BlockCost]) -> list[dict[str, Any]]:
    """Turn the costs of single blocks into data for ``--json``."""
    return [
        {
            "block": item.block,
            "from": item.origin,
            "added": None if item.added is None else cost_dict(item.added),
            "identity_start": item.identity,
            "start_factor": item.start,
            "refused": item.refused,
        }
        for item in costs
    ]
