"""Count and measure what a network costs and what its blocks add.

In: a ``Trace`` and steps, or two networks. Out: parameters, MACs, element-wise operations, bytes, milliseconds.
Must not know: how a plan is made, or where its figures are printed.
"""

from se_inject.cost.counting import (
    Cost,
    CostReport,
    CostRow,
    Latency,
    cost_of_steps,
    graphed,
    measure_latency,
    rows_of_steps,
)
from se_inject.cost.modules import ModuleCosts, ModuleRow, module_costs
from se_inject.cost.text import FIGURES, cost_data, cost_dict, cost_figures, cost_lines, cost_text, latency_line

__all__ = [
    "FIGURES",
    "Cost",
    "CostReport",
    "CostRow",
    "Latency",
    "ModuleCosts",
    "ModuleRow",
    "cost_data",
    "cost_dict",
    "cost_figures",
    "cost_lines",
    "cost_of_steps",
    "cost_text",
    "graphed",
    "latency_line",
    "measure_latency",
    "module_costs",
    "rows_of_steps",
]
