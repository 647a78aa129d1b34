"""Cost many plans from one observed call: ratios × stages of one block, and every block side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from se_inject.blocks import (
    block_names,
    build_block,
    has_identity_start,
)
from se_inject.cost import Cost, CostRow, cost_of_steps, rows_of_steps
from se_inject.errors import InjectError, NoSites, SiteNotFound, either
from se_inject.plans.candidates import ratios_of, steps_with
from se_inject.plans.planner import plan
from se_inject.plans.starts import start_factors
from se_inject.plans.value import Plan
from se_inject.sites import ALL, ALL_BUT_LAST, Sites, sites_in
from se_inject.tables import Printed, counted

EACH = "each"
"""The choice that stands for: every stage alone, all, and all but the last (the paper's Table 13, and its advice)."""


@dataclass(frozen=True)
class CostCell:
    """What blocks with one reduction ratio in some stages add.

    Args:
        stages: the stages as they were asked for: ``3``, ``3,4``, ``all``, ``all-but-last``.
        reduction: r; None if the block has none.
        blocks: how many.
        added: what they cost together.
    """

    stages: str
    reduction: float | None
    blocks: int
    added: Cost


@dataclass(frozen=True, repr=False)
class CostGrid(Printed):
    """What a block would add, for each choice of stages and each reduction ratio: ``grid["all", 16].added``.

    Args:
        model: class name of the network.
        block: name of the block.
        before: the network as it is.
        cells: choice by choice, and in each ratio by ratio.
        notes: what the user should know about it.
        uncounted: operations that torch's counter doesn't know and that may hide MACs.
    """

    model: str
    block: str
    before: Cost
    cells: tuple[CostCell, ...]
    notes: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()

    def text(self) -> str:
        """Format one table for each kind of cost."""
        from se_inject.plans.grid_text import grid_text

        return grid_text(self)

    def summary(self) -> str:
        """Name the block, and the number of cells."""
        return f"{self.block} on {self.model}, {counted(len(self.cells), 'cell')}"

    def __getitem__(self, key: tuple[str, float | None]) -> CostCell:
        """Return the cell for the stages, written as they were requested, and r (None for a block without)."""
        return {(cell.stages, cell.reduction): cell for cell in self.cells}[key]

    @property
    def stages(self) -> tuple[str, ...]:
        """The choices of stages, in order."""
        return tuple(dict.fromkeys(cell.stages for cell in self.cells))

    @property
    def reductions(self) -> tuple[float | None, ...]:
        """The ratios, in order."""
        return tuple(dict.fromkeys(cell.reduction for cell in self.cells))


def cost_grid(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    reductions: Iterable[float] | None = None,
    stages: Iterable[Any] | int | str = EACH,
    attended: bool = False,
    block: str = "se",
    position: str = "standard",
    init: str | None = None,
    **block_options: Any,
) -> CostGrid:
    """Count what a block would add, for every ratio and every choice of stages. Computes and changes nothing.

    Every cell is what ``plan(..., stages=…, reduction=…).cost().added`` says, from one observed call for all.

    Args:
        model: the network.
        example_inputs: as for ``plan``.
        example_kwargs: as for ``plan``.
        reductions: the ratios; None: 2, 4, 8, 16 and 32 for a block that has an option ``reduction``.
        stages: choices of stages, each as for ``plan``, or ``each`` for every stage alone, all, and all but the last.
        attended: as for ``plan``.
        block: as for ``plan``.
        position: as for ``plan``.
        init: as for ``plan``.
        **block_options: the block's other options.

    Raises:
        InjectError: as ``plan`` does, for any of the cells.
    """
    ratios = ratios_of(block, reductions, block_options)
    widest = {} if ratios[-1] is None else {"reduction": max(ratios)}  # type: ignore[type-var]
    base = plan(
        model,
        example_inputs,
        example_kwargs=example_kwargs,
        attended=attended,
        block=block,
        position=position,
        init=init,
        **block_options | widest,
    )
    assert base.trace is not None
    choices = _choices(sites_in(base.trace), base, stages, attended)
    steps = [
        step
        for ratio in ratios
        for step in steps_with(base, block, block_options | ({} if ratio is None else {"reduction": ratio}))
    ]
    report = cost_of_steps(model, base.trace, steps)
    cells = tuple(
        _cell(label, ratio, [row for row in report.rows[number * len(base) :][: len(base)] if row.site in addresses])
        for label, addresses in choices.items()
        for number, ratio in enumerate(ratios)
    )
    return CostGrid(base.model, block, report.before, cells, base.notes, report.uncounted)


def _cell(stages: str, reduction: float | None, rows: Sequence[CostRow]) -> CostCell:
    return CostCell(stages, reduction, len(rows), sum((row.cost for row in rows), Cost()))


def _choices(sites: Sites, base: Plan, stages: Iterable[Any] | int | str, attended: bool) -> dict[str, set[str]]:
    """List every choice of stages under its name: the addresses of those sites where there would be a block."""
    planned = {step.site for step in base.steps}
    choices: dict[str, set[str]] = {}
    for choice in [stages] if isinstance(stages, int | str) else stages:
        for names in _each(sites, base) if choice == EACH else [_names(choice)]:
            found = {site.address for site in sites.stages(*names, attended=attended)} & planned
            if not found:
                raise NoSites(
                    f"no block can go into the stages `{','.join(names)}`",
                    seen="; ".join(
                        filter(
                            None,
                            ("their sites hold blocks of ours already, or have no such position", sites.shortfall()),
                        )
                    ),
                    hint=f"{either('`se-inject sites MODEL -v`', 'print(si.find_sites(model))')} lists them",
                )
            choices[",".join(names)] = found
    if not choices:
        raise SiteNotFound("an empty choice of stages matches nothing", hint="leave it out to choose each stage")
    return choices


def _each(sites: Sites, base: Plan) -> list[list[str]]:
    numbers = sorted({step.stage for step in base.steps if step.stage is not None})
    names = [*map(str, numbers), ALL] + (
        [ALL_BUT_LAST] if any(number != sites.last_stage for number in numbers) else []
    )
    return [[name] for name in names]


def _names(choice: Any) -> list[str]:
    names = str(choice).split(",") if isinstance(choice, int | str) else [str(name) for name in choice]
    if not names:
        raise SiteNotFound("an empty choice of stages matches nothing", hint="leave it out to choose each stage")
    return [name.strip() for name in names]


@dataclass(frozen=True)
class BlockCost:
    """What one block with its defaults adds at all sites of a network, and how it starts.

    Args:
        block: its name.
        origin: the package it comes from.
        added: its cost; None if it can't be used there.
        start: smallest and largest factor by which it scales its input at first; (1, 1) for an identity.
        identity: whether it starts as x ↦ x.
        refused: why it can't be used there.
    """

    block: str
    origin: str
    added: Cost | None = None
    start: tuple[float, float] | None = None
    identity: bool | None = None
    refused: str | None = None


def block_costs(
    model: nn.Module, example_inputs: Any = None, names: Iterable[str] | None = None
) -> tuple[BlockCost, ...]:
    """Count what blocks would add at all sites of a network. Computes and changes nothing of the network.

    Args:
        model: the network.
        example_inputs: as for ``plan``.
        names: of the blocks; None: all that are known, by name.

    Raises:
        InjectError: as ``plan`` does, for the network. A block that fails is listed as refused.
    """
    base = plan(model, example_inputs)
    origins = block_names()
    return tuple(_block_cost(base, name, origins.get(name, name)) for name in names or sorted(origins))


def _block_cost(base: Plan, name: str, origin: str) -> BlockCost:
    assert base.trace is not None
    first = base.steps[0]
    try:
        with torch.device("meta"):
            identity = has_identity_start(build_block(name, first.channels, first.size, {}, "paper"))
        steps = steps_with(base, name, {}, "identity" if identity else "paper")
        added = sum((row.cost for row in rows_of_steps(base.trace, steps)), Cost())
        start = (1.0, 1.0) if identity else start_factors(steps)[name]
    except InjectError as error:
        return BlockCost(name, origin, refused=error.message)
    return BlockCost(name, origin, added, start, identity)
