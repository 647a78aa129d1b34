"""Change the block or the ratio in a plan's steps without looking at the network again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from se_inject.blocks import block_options, build_block, check_block, check_options
from se_inject.errors import OptionError, either
from se_inject.plans.value import Plan
from se_inject.surgery import Step

PAPER_RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""The reduction ratios of the paper's Table 10."""


def ratios_of(
    block: str, reductions: Iterable[float] | None, options: dict[str, Any]
) -> tuple[float, ...] | tuple[None, ...]:
    """List the ratios to try, each once.

    Args:
        block: name of the block.
        reductions: the ratios asked for; None: the paper's for a block that has an option ``reduction``, else None alone.
        options: the block's other options.

    Raises:
        OptionError: the ratio is among the other options, an empty list, or a ratio that the block refuses.
    """
    if "reduction" in options:
        raise OptionError(
            "a grid has several ratios",
            seen="`reduction`",
            hint=f"say `{either('--r 4,8,16', 'reductions=[4, 8, 16]')}`",
        )
    if reductions is None:
        sized = options.get("width") is not None or "reduction" not in block_options(block)
        return (None,) if sized else PAPER_RATIOS
    ratios = tuple(dict.fromkeys(reductions))
    if not ratios:
        raise OptionError("an empty list of reduction ratios", hint="leave it out for 2, 4, 8, 16 and 32")
    check_options(block, {"reduction": ratios})
    return ratios


def steps_with(base: Plan, block: str, options: dict[str, Any], init: str | None = None) -> tuple[Step, ...]:
    """Return the steps of a plan with another block or other options, each tried at every size first.

    Raises:
        OptionError: an option that the block refuses.
        PluginError: the block fails.
    """
    assert base.trace is not None
    init = init or base.steps[0].init
    dtype = next((p.dtype for p in base.trace.model.parameters() if p.is_floating_point()), torch.float32)
    for channels, size in sorted({(step.channels, step.size) for step in base.steps}):
        with torch.device("meta"):
            check_block(block, build_block(block, channels, size, options, init), channels, size, dtype)
    return tuple(replace(step, block=block, options=options, init=init) for step in base.steps)
