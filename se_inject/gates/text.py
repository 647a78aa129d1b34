"""Format statistics of gates, dropped blocks and comparisons as tables and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from se_inject.cost import cost_dict
from se_inject.tables import counted, short, table

if TYPE_CHECKING:
    from torch import Tensor

    from se_inject.gates.compare import Compared
    from se_inject.gates.prune import Pruned
    from se_inject.gates.statistics import BlockGates, Excitations

HEADERS = ("mean", "spread", "between images", "of that by class", "saturated", "always on", "always off")
_LEGEND = (
    "mean: of all gates. spread: how far a channel's gate is from its own mean, from image to image. between\n"
    "images: the share of the variance that is between images; the rest is between channels. saturated: gates within 5 %\n"
    "of an end of their range. always on, off: channels whose gate is near the upper end, or near 0, for every image."
)


def excitations_text(found: Excitations, style: str = "text", *, by_class: bool = False) -> str:
    """Format excitations as a table, a line for each block; by class a second one; then the correlation with depth."""
    rows = [[_stage(block), block.name, block.block, block.channels, *figures(block)] for block in found.blocks]
    blocks = table(("stage", "block", "kind", "channels", *HEADERS), rows, style, right=range(3, 11))
    if style == "csv":
        return class_text(found, style) if by_class else blocks
    parts = [f"Gates of {found.model} over {counted(found.examples, 'example')}", blocks]
    if by_class:
        parts.append(class_text(found, style))
    correlations = [f"{name} {value:+.2f}" for name, value in _correlations(found).items()]
    if correlations:
        parts.append("correlation with depth: " + ", ".join(correlations))
    parts += ["\n".join(f"note: {note}" for note in found.notes)] if found.notes else []
    return "\n\n".join([*parts, _LEGEND] if style == "text" else parts)


def _correlations(found: Excitations) -> dict[str, float]:
    names = {
        "average": "mean",
        "between_images": "between images",
        "class_share": "of that by class",
        "saturation": "saturated",
    }
    return {
        names.get(name, name): value
        for name, value in found.depth_correlation.items()
        if value is not None and name != "variation"
    }


def figures(block: BlockGates) -> list[str]:
    """Format the figures of a block, in the order of the headers."""
    return [
        f"{block.average:.3f}",
        f"{block.spread:.3g}",
        share(block.between_images),
        share(block.class_share),
        share(block.saturation),
        share(block.always_on),
        share(block.always_off),
    ]


def share(value: float | None) -> str:
    """Format a share in per cent; a dash if it is not known."""
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if 0 < value < 0.1 else f"{100 * value:.0f} %"


def class_text(found: Excitations, style: str = "text") -> str:
    """Format, for each block and class, the mean of the gates, and their spread within the class."""
    rows = [
        [block.name, name, count, f"{float(mean.mean()):.4f}", f"{float(std.square().mean().sqrt()):.3g}"]
        for block in found.blocks
        if block.class_mean is not None and block.class_std is not None
        for name, count, mean, std in zip(
            found.classes, found.class_counts, block.class_mean, block.class_std, strict=True
        )
        if count
    ]
    if not rows:
        return "no labels: nothing is known by class"
    return table(("block", "class", "examples", "mean", "spread within"), rows, style, right=(2, 3, 4))


def _stage(block: BlockGates) -> Any:
    return block.stage if block.stage is not None else "–"


def excitations_data(found: Excitations, *, by_class: bool = False) -> dict[str, Any]:
    """Convert excitations to data for ``--json``: by class means and spreads of every channel, if asked for."""
    return {
        "model": found.model,
        "examples": found.examples,
        "classes": [
            {"class": name, "examples": count} for name, count in zip(found.classes, found.class_counts, strict=True)
        ],
        "blocks": [_block_data(block, by_class) for block in found.blocks],
        "depth_correlation": found.depth_correlation,
        "without_gate": list(found.without_gate),
        "notes": list(found.notes),
    }


def _block_data(block: BlockGates, by_class: bool) -> dict[str, Any]:
    data = {
        "path": block.path,
        "call": block.call,
        "block": block.block,
        "site": block.site,
        "stage": block.stage,
        "channels": block.channels,
        "examples": block.examples,
        "positions": block.positions,
        "range": None if block.ends is None else [_finite(end) for end in block.ends],
        "mean": block.average,
        "spread": block.spread,
        "variation": _finite(block.variation),
        "between_images": block.between_images,
        "between_classes": block.class_share,
        "saturated": block.saturation,
        "always_on": block.always_on,
        "always_off": block.always_off,
        "channel_mean": rounded(block.mean),
        "channel_std": rounded(block.std),
    }
    if by_class and block.class_mean is not None and block.class_std is not None:
        data["class_mean"] = [rounded(row) for row in block.class_mean]
        data["class_std"] = [rounded(row) for row in block.class_std]
    return data


def rounded(values: Tensor) -> Sequence[float | None]:
    """Round numbers to seven significant digits; None for those that are not finite."""
    return [_finite(float(f"{value:.7g}")) for value in values.tolist()]


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def pruned_text(pruned: Pruned, style: str = "text") -> str:
    """Describe which block was folded into which module, the saving, and the blocks that stayed, with the reasons."""
    saved = pruned.saved
    whole = len(pruned.dropped) + len(pruned.kept)
    head = (
        f"{len(pruned.dropped)} of {counted(whole, 'block')} of {pruned.model} folded away: {saved.params:,} parameters, "
        f"{short(saved.macs)} MACs and {short(saved.bytes, 'B')} of activations saved for each example\n"
        f"{pruned.measure}: {pruned.change:.3g}, at most {pruned.tolerance:g} allowed; "
        f"the data was gone through {counted(pruned.passes, 'time')}"
    )
    rows = [
        [each.path, ", ".join(each.into), f"{each.variation:.3g}", f"{each.change:.3g}", each.saved.params]
        for each in pruned.dropped
    ]
    dropped = table(
        ("dropped", "folded into", "variation", "change so far", "parameters"), rows, style, right=(2, 3, 4)
    )
    if style == "csv":
        return dropped
    parts = [head, *([dropped] if rows else [])]
    if pruned.kept:
        parts.append(table(("kept", "why"), [[path, why] for path, why in pruned.kept.items()], style))
    return "\n\n".join(parts) + "".join(f"\nnote: {note}" for note in pruned.notes)


def pruned_data(pruned: Pruned) -> dict[str, Any]:
    """Return the same as data for ``--json``."""
    return {
        "model": pruned.model,
        "dropped": [
            {
                "path": each.path,
                "into": list(each.into),
                "variation": _finite(each.variation),
                "change": each.change,
                "saved": cost_dict(each.saved),
            }
            for each in pruned.dropped
        ],
        "kept": pruned.kept,
        "measure": pruned.measure,
        "change": pruned.change,
        "tolerance": pruned.tolerance,
        "passes": pruned.passes,
        "saved": cost_dict(pruned.saved),
        "notes": list(pruned.notes),
    }


def comparison_text(compared: Compared) -> str:
    """Compare two networks in a few lines."""
    lines = [
        f"{letter}  {name}: {params:,} parameters, {counted(blocks, 'block') if blocks else 'no blocks'}"
        for letter, name, params, blocks in zip("AB", compared.models, compared.params, compared.blocks, strict=True)
    ]
    lines.append(
        f"outputs      differ by {compared.change:.3g} of their size, over {counted(compared.examples, 'example')}"
    )
    if compared.agreement is not None:
        lines.append(f"predictions  agree on {100 * compared.agreement:.1f} %")
    if compared.right is not None and compared.difference is not None and compared.error is not None and compared.only:
        (a, b), (only_a, only_b) = compared.right, compared.only
        lines.append(
            f"accuracy     A {100 * a:.2f} %, B {100 * b:.2f} %; {only_a:,} only A has right, {only_b:,} only B"
        )
        lines.append(
            f"difference   {100 * compared.difference:+.2f} ± {100 * compared.error:.2f} percentage points (standard error): "
            + ("within two standard errors, which is noise" if compared.is_noise else "more than noise")
        )
    if compared.latency is not None:
        time = compared.latency
        lines.append(
            f"latency      A {time.before_ms:.1f} ms, B {time.after_ms:.1f} ms, ratio {time.ratio:.3f} "
            f"(quartiles {time.low:.3f} to {time.high:.3f}, {time.rounds} rounds in turns)"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in compared.notes)])


def comparison_data(compared: Compared) -> dict[str, Any]:
    """Return the same as data for ``--json``."""
    return {
        "models": list(compared.models),
        "params": list(compared.params),
        "blocks": list(compared.blocks),
        "examples": compared.examples,
        "change": _finite(compared.change),
        "agreement": compared.agreement,
        "accuracy": None if compared.right is None else list(compared.right),
        "difference": compared.difference,
        "standard_error": compared.error,
        "only": None if compared.only is None else list(compared.only),
        "noise": compared.is_noise,
        "latency": None if compared.latency is None else vars(compared.latency),
        "notes": list(compared.notes),
    }
