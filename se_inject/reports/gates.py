"""Write the section about gates, with every column explained, and which block to drop first."""

from __future__ import annotations

import math

from se_inject.cost import CostReport
from se_inject.gates import BlockGates, Excitations, figures
from se_inject.plans import Plan
from se_inject.reports.html import Column, Raw, bar, escaped, paragraph, section, table
from se_inject.tables import counted

COLUMNS = (
    ("variation", "the spread as a share of the gates' size: the error that a constant gate would make"),
    ("mean", "of all gates, over examples and channels"),
    ("spread", "how far a channel's gate is from its own mean, from image to image (root mean square)"),
    ("between images", "the share of the gates' variance that is between images; the rest is between channels"),
    ("of that by class", "the share of the variance between images that is between their classes; – without labels"),
    ("saturated", "gates within 5 % of an end of their range"),
    ("always on", "channels whose gate is near the upper end for every image"),
    ("always off", "channels whose gate is near 0 for every image"),
    ("parameters", "of the block: what dropping it saves"),
)


def first_to_drop(plan: Plan, cost: CostReport, gates: Excitations | None) -> str:
    """Choose the first block to drop by its gates, if these are known; else by what the paper found and by cost."""
    if gates is not None and gates.blocks:
        least = min(gates.blocks, key=lambda block: block.variation)
        where = "outside of the stages" if least.stage is None else f"stage {least.stage}"
        return (
            f"{least.path} ({where}): its gate varies least from image to image, by {100 * least.variation:.3g} % of its "
            f"size.{_saving(plan, cost, least)} Likely costs least; not measured: `se-inject prune` measures it."
        )
    stages = cost.stages
    last = max((stage for stage in stages if stage is not None), default=None)
    if last is None or len(stages) < 2:
        return "not known: what the gates do on data was not measured (se-inject excitations MODEL --data DATA)."
    share = stages[last].params / cost.added.params if cost.added.params else 0
    return (
        f"the blocks of stage {last}, the last: they have {100 * share:.0f} % of the added parameters, and in the paper's "
        "networks dropping the last stage cost least (section 4: under 0.1 % of the top-5 error). A guess from the paper: for "
        "your data, se-inject excitations MODEL --data DATA measures it."
    )


def _saving(plan: Plan, cost: CostReport, block: BlockGates) -> str:
    row = next((row for step, row in zip(plan.steps, cost.rows, strict=True) if step.path == block.path), None)
    if row is None:
        return ""
    shares = []
    for name, value, whole in (
        ("bytes of activations for one example", row.cost.bytes, cost.added.bytes),
        ("parameters", row.cost.params, cost.added.params),
    ):
        part = f" ({100 * value / whole:.3g} % of what all blocks add)" if whole else ""
        shares.append(f"{value:,} {name}{part}")
    return f" Dropping it saves {' and '.join(shares)}."


def gates_section(plan: Plan, cost: CostReport, gates: Excitations) -> Raw:
    """Write what the gates do on data, the blocks that depend least on the image first."""
    saved = {step.path: row.cost.params for step, row in zip(plan.steps, cost.rows, strict=True)}
    ranked = sorted(gates.blocks, key=lambda block: block.variation)
    top = max((block.variation for block in ranked), default=0)
    rows = [
        [
            block.name,
            block.stage if block.stage is not None else "–",
            bar(block.variation, top, f"{100 * block.variation:.3g} %"),
            *figures(block),
            f"{saved.get(block.path, 0):,}",
        ]
        for block in ranked
    ]
    columns = [Column("block"), Column("stage"), *(Column(name, right=True, title=why) for name, why in COLUMNS)]
    legend = " ".join(f"<strong>{escaped(name)}</strong>: {escaped(why)}." for name, why in COLUMNS)
    return section(
        "What the gates do",
        paragraph(
            f"Over {counted(gates.examples, 'example')}; first the blocks whose gate depends least on the image, which likely "
            "cost least to drop. A full bar is the largest variation."
        ),
        paragraph(_meaning(plan, gates)),
        table("Gates", columns, rows),
        Raw(f"<p>{legend}</p>"),
    )


def _meaning(plan: Plan, gates: Excitations) -> str:
    """Say what a gate is, between which ends these lie, and where they began."""
    ranges = sorted({block.ends for block in gates.blocks if block.ends is not None})
    words = [f"from {low:g} up" if math.isinf(high) else f"between {low:g} and {high:g}" for low, high in ranges]
    unknown = any(block.ends is None for block in gates.blocks)
    sentences = [
        "A gate is what a block multiplies a channel by: 1 leaves the channel unchanged, 0 silences it.",
        *([f"The gates lie {' or '.join(words)}."] if words else []),
        *(["Where no range is known, nothing is said of saturation."] if unknown else []),
    ]
    if plan.steps and all(step.init == "identity" for step in plan.steps):
        sentences.append("With the identity start, all began at 1.")
    return " ".join(sentences)
