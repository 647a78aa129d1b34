"""Format plans as tables and lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from se_inject.errors import printable
from se_inject.tables import counted, table

if TYPE_CHECKING:
    from se_inject.plans.value import Plan
    from se_inject.surgery import Step


def plan_text(plan: Plan) -> str:
    """Format a plan as a table, one line for each block."""
    rows = [
        [
            step.stage if step.stage is not None else "–",
            printable(step.site),
            step.channels,
            step.block,
            printable(step.path),
        ]
        for step in plan.steps
    ]
    head = f"{counted(len(plan.steps), 'block')} for {printable(plan.model)}"
    notes = "".join(f"\nnote: {note}" for note in plan.notes)
    return f"{head}\n\n{table(('stage', 'site', 'channels', 'block', 'becomes'), rows)}{notes}"


def plan_lines(plan: Plan) -> list[str]:
    """Format a plan in a line for each kind of block: how many, where, with what options and start."""
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
    settings = [f"{'r' if key == 'reduction' else key} = {_plain(value)}" for key, value in options.items()]
    start = "identity start" if step.init == "identity" else "the paper's start"
    position = [f"position {step.position}"] if step.position != "standard" else []
    blocks = counted(len(steps), f"{step.block.upper() if step.block == 'se' else step.block} block")
    return f"{blocks} {where}: {', '.join([*position, *settings, start])}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def start_notes(factors: dict[str, tuple[float, float]]) -> list[str]:
    """Write a line for each block that doesn't start as x ↦ x."""
    return [
        f"at the start, block `{block}` scales its input by {span(factor)} (on random normal values)"
        for block, factor in factors.items()
    ]


def span(factor: tuple[float, float]) -> str:
    """Format a range: ``0.5``, or ``0.56 to 0.73``."""
    return " to ".join(dict.fromkeys(f"{value:.2g}" for value in factor))
