"""Decide which block goes where, as a value that can be printed, added up and stored.

In: a network, a choice of sites, a block and its options. Out: a ``Plan``, or a grid of what many plans would add.
Must not know: the command line, exported files, or how checkpoints are read.
"""

from se_inject.plans.grid import EACH, CostGrid, block_costs, cost_grid
from se_inject.plans.grid_text import block_costs_data, block_costs_text, grid_data, grid_text
from se_inject.plans.planner import inject, plan, plan_of
from se_inject.plans.plot import check_plot, plot_grid
from se_inject.plans.starts import start_factors
from se_inject.plans.text import plan_lines, start_notes
from se_inject.plans.value import Plan

__all__ = [
    "EACH",
    "CostGrid",
    "Plan",
    "block_costs",
    "block_costs_data",
    "block_costs_text",
    "check_plot",
    "cost_grid",
    "grid_data",
    "grid_text",
    "inject",
    "plan",
    "plan_lines",
    "plan_of",
    "plot_grid",
    "start_factors",
    "start_notes",
]
