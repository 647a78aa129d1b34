"""Write a plan and everything found out about it into one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from os import PathLike
from typing import Any

import torch
from torch import nn

from se_inject._version import __version__
from se_inject.atomic_files import atomic, check_writable
from se_inject.cost import CostReport, CostRow, Latency, latency_line
from se_inject.errors import OptionError
from se_inject.exporting import Exported, exported_lines
from se_inject.gates import Excitations
from se_inject.pictures import block_name, svg
from se_inject.plans import Plan, plan_lines
from se_inject.reports.gates import COLUMNS, first_to_drop, gates_section
from se_inject.reports.html import Column, Raw, bar, details, escaped, page, paragraph, section, table, tile
from se_inject.tables import counted, percent, short
from se_inject.tracing import batch_of, describe, float_like
from se_inject.verification import Verdict

FIGURES = (
    ("params", "parameters", "learnable numbers that the blocks add"),
    ("macs", "MACs", "multiply-adds for one example; other papers' FLOPs are two for each"),
    ("bytes", "bytes", "activations (not weights) read and written for one example: what blocks cost in time"),
)
VERIFY_HINT = (
    "In Python, pass si.verify(model, injected, inputs) as verdict=; the command se-inject MODEL verifies unless it has "
    "--dry-run."
)


def report(
    plan: Plan,
    path: str | PathLike[str],
    *,
    model: nn.Module | None = None,
    verdict: Verdict | None = None,
    exported: Sequence[Exported] = (),
    latency: Latency | None = None,
    gates: Excitations | None = None,
    notes: Iterable[str] = (),
    command: str | None = None,
    force: bool = False,
) -> None:
    """Write a report on a plan: a picture, the blocks, their cost, the checks, the files, in one HTML file.

    It opens offline and asks nothing of any server. What is not given is said to be not known; nothing is computed but the
    cost.

    Args:
        plan: with the observed call, as ``si.plan`` returns it.
        path: the file, ``report.html``.
        model: the network, if the plan was loaded from JSON.
        verdict: from ``si.verify``.
        exported: from ``si.export``.
        latency: if it was measured.
        gates: from ``si.excitations``: colours the picture and says which blocks depend least on the image.
        notes: what else the reader should know.
        command: what makes all this again.
        force: whether it may replace a file that exists.

    Raises:
        OptionError: another suffix than ``.html``; a stored plan without the network.
        ExportError: the file can't be written.
    """
    check_report(path, force=force)
    with atomic(path, force) as temporary:
        text = report_html(
            plan,
            model=model,
            verdict=verdict,
            exported=exported,
            latency=latency,
            gates=gates,
            notes=notes,
            command=command,
        )
        temporary.write_text(text, encoding="utf-8")


def check_report(path: str | PathLike[str], *, force: bool = False) -> None:
    """Ask whether a report may be written here. Nothing is written.

    Raises:
        OptionError: another suffix than ``.html``.
        ExportError: the file can't be written.
    """
    if not str(path).lower().endswith((".html", ".htm")):
        raise OptionError(f"can't write a report to `{path}`", seen="its suffix", hint="name it report.html")
    check_writable(path, force)


def report_html(
    plan: Plan,
    *,
    model: nn.Module | None = None,
    verdict: Verdict | None = None,
    exported: Sequence[Exported] = (),
    latency: Latency | None = None,
    gates: Excitations | None = None,
    notes: Iterable[str] = (),
    command: str | None = None,
) -> str:
    """Write the same report as HTML text."""
    cost = plan.cost(model)
    drawing = plan.draw(model, gates).drawing
    all_notes = list(dict.fromkeys((*plan.notes, *notes, *(gates.notes if gates is not None else ()))))
    title = f"{plan.model} with {counted(len(plan), 'block')}"
    dtype = _dtype(plan, model)
    parts = [
        _provenance(plan, command),
        _summary(plan, cost, verdict, latency, gates, dtype),
        section("The network", Raw(f'<div class="picture" tabindex="0">{svg(drawing, standalone=False)}</div>')),
        _cost(cost, dtype),
        _blocks(plan, cost, gates),
        _checks(verdict),
        _latency(latency),
        _files(exported),
        *([gates_section(plan, cost, gates)] if gates is not None else []),
        *(
            [section("Notes", Raw("<ul>"), *(Raw(f"<li>{escaped(line)}</li>") for line in all_notes), Raw("</ul>"))]
            if all_notes
            else []
        ),
        *([section("Make it again", Raw(f"<pre>{escaped(command)}</pre>"))] if command else []),
    ]
    return page(title, parts, f"Made by se-inject {__version__}.")


def _provenance(plan: Plan, command: str | None) -> Raw:
    """Say what was analysed, on what input, when, with which versions, and by what command."""
    if plan.trace is not None:
        batch = batch_of(plan.trace.inputs)
        read = describe(*plan.trace.inputs) + ("" if batch is None else f" (a batch of {batch})")
    elif plan.inputs is not None:
        read = "inputs of " + ", ".join(
            str(each[0] if isinstance(each, list | tuple) else each) for each in plan.inputs
        )
    else:
        read = "inputs that the plan does not say"
    versions = f"torch {torch.__version__}, se-inject {__version__}"
    source = f"Command: {command}" if command else "Made from Python: no command is known."
    day = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    return Raw(f'<p class="muted">{escaped(f"{plan.model}, observed on {read}. {day}, {versions}. {source}")}</p>')


def _dtype(plan: Plan, model: nn.Module | None) -> str:
    network = plan.trace.model if plan.trace is not None else model
    return "the network's dtype" if network is None else str(float_like(network).dtype).removeprefix("torch.")


def _where(plan: Plan) -> str:
    stages = sorted({step.stage for step in plan.steps if step.stage is not None})
    outside = sum(step.stage is None for step in plan.steps)
    inside = f"in stage{'s' * (len(stages) != 1)} {', '.join(map(str, stages))}" if stages else ""
    return " and ".join(part for part in (inside, f"{outside} outside of the stages" if outside else "") if part)


def _summary(
    plan: Plan,
    cost: CostReport,
    verdict: Verdict | None,
    latency: Latency | None,
    gates: Excitations | None,
    dtype: str,
) -> Raw:
    """Write the five answers: how many, where, at what cost, whether right, and which could go first."""
    added, before = cost.added, cost.before
    kinds = ", ".join(dict.fromkeys(block_name(step.block) for step in plan.steps))
    tiles = [
        tile("Blocks", f"{len(plan):,}", f"{kinds}, {_where(plan)}"),
        tile("Parameters", percent(added.params, before.params), f"{before.params:,} + {added.params:,}"),
        tile("MACs", percent(added.macs, before.macs), f"{short(before.macs)} + {short(added.macs)} for one example"),
        tile(
            "Bytes of activations",
            percent(added.bytes, before.bytes),
            f"{short(before.bytes, 'B')} + {short(added.bytes, 'B')} for one example, {dtype}",
        ),
        tile(
            "Latency",
            "not measured" if latency is None else f"{100 * (latency.ratio - 1):+.1f} %",
            "--latency measures it"
            if latency is None
            else f"quartiles {100 * (latency.low - 1):+.1f} to {100 * (latency.high - 1):+.1f} %",
        ),
        _right(verdict),
    ]
    first = first_to_drop(plan, cost, gates)
    lines = [*(paragraph(line) for line in plan_lines(plan)), paragraph(first, strong="Which to drop first: ")]
    return Raw(f'<div class="tiles">{"".join(tiles)}</div>{"".join(lines)}')


def _right(verdict: Verdict | None) -> str:
    if verdict is None:
        return tile("Checked", "no", "nothing was verified in this run; how to: under “Are they right?”")
    failed = [check for check in verdict.checks if check.passed is False]
    passed = sum(check.passed is True for check in verdict.checks)
    if failed:
        return tile("Checked", "FAILED", f"{len(failed)} of {len(verdict.checks)} checks", kind="bad")
    skipped = sum(check.passed is None for check in verdict.checks)
    more = f", {skipped} did not apply" if skipped else ""
    return tile("Checked", "all right", f"{counted(passed, 'check')} passed{more}", kind="good")


def _cost(cost: CostReport, dtype: str) -> Raw:
    """Write the cost of each stage, with bars, and the totals."""
    rows: list[list[Any]] = []
    for stage, added in cost.stages.items():
        sites = [row for row in cost.rows if row.stage == stage]
        rows.append(
            [
                stage if stage is not None else "–",
                len(sites),
                _range(sites),
                *(bar(getattr(added, f), getattr(cost.added, f)) for f, _, _ in FIGURES),
            ]
        )
    totals = [
        [name, "", "", *(f"{getattr(value, f):,}" for f, _, _ in FIGURES)]
        for name, value in (("before", cost.before), ("added", cost.added), ("after", cost.after))
    ]
    columns = [
        Column("stage"),
        Column("blocks", right=True),
        Column("channels"),
        *(Column(name, right=True, title=why) for _, name, why in FIGURES),
    ]
    uncounted = [paragraph(f"Not counted: {', '.join(cost.uncounted)}.")] if cost.uncounted else []
    return section(
        "What it costs",
        paragraph("By stage. A full bar is all that the blocks add. Click on a column to sort by it."),
        paragraph(
            f"Bytes are activations only, without weights: what one example in {dtype} has read and written. MACs are "
            "multiply-adds for one example."
        ),
        table("Cost by stage", columns, rows, footer=totals),
        *uncounted,
    )


def _range(rows: Sequence[CostRow]) -> str:
    few, many = min(row.channels for row in rows), max(row.channels for row in rows)
    return str(few) if few == many else f"{few} … {many}"


def _blocks(plan: Plan, cost: CostReport, gates: Excitations | None) -> Raw:
    """Write a line for each block: where it is, its width, its cost, what its gate does."""
    known = {} if gates is None else {block.path: block for block in reversed(gates.blocks)}
    tops = {f: max((getattr(row.cost, f) for row in cost.rows), default=0) for f, _, _ in FIGURES}
    rows = []
    for step, row in zip(plan.steps, cost.rows, strict=True):
        width = "" if row.width is None else str(row.width)
        cells: list[Any] = [
            step.stage if step.stage is not None else "–",
            step.site,
            step.path,
            block_name(step.block),
            step.channels,
            width,
            step.position,
        ]
        cells += [bar(getattr(row.cost, f), tops[f]) for f, _, _ in FIGURES]
        if gates is not None:
            gate = known.get(step.path)
            cells += ["–", "–"] if gate is None else [f"{gate.average:.3f}", f"{100 * gate.variation:.3g} %"]
        rows.append(cells)
    is_after = all(step.position == "standard" for step in plan.steps)
    columns = [
        Column("stage"), Column("after" if is_after else "site", title="the site"), Column("block name"), Column("block"), Column("channels", right=True),
        Column("width", right=True, title="of the bottleneck"), Column("position"),
        *(Column(name, right=True, title=why) for _, name, why in FIGURES),
    ]  # fmt: skip
    if gates is not None:
        columns += [
            Column("mean gate", right=True),
            Column("variation", right=True, title=dict(COLUMNS)["variation"]),
        ]
    body = table("Every block", columns, rows)
    bars = paragraph(
        "A full bar is the largest number of its column. Parameters, MACs and bytes are what the block adds."
    )
    folded = details(f"All {counted(len(rows), 'block')}", body, is_open=len(rows) <= 24)
    return section("Where the blocks are", bars, folded)


def _checks(verdict: Verdict | None) -> Raw:
    if verdict is None:
        return section("Are they right?", paragraph(f"Nothing was verified in this run. {VERIFY_HINT}"))
    words = {True: "passed", False: "FAILED", None: "does not apply"}
    rows = [
        [
            Raw(
                f'<span class="{ {True: "good", False: "bad", None: "muted"}[check.passed] }">{words[check.passed]}</span>'
            ),
            check.name,
            check.detail,
        ]
        for check in verdict.checks
    ]
    body = table("Checks", [Column("result"), Column("check"), Column("what was found")], rows, sortable=False)
    return section("Are they right?", body, *(paragraph(note) for note in verdict.notes))


def _latency(latency: Latency | None) -> Raw:
    if latency is None:
        return section("How fast is it?", paragraph("Latency was not measured: --latency does."))
    line = latency_line(latency).removeprefix("latency").strip()
    return section("How fast is it?", paragraph(line), Raw(_interval(latency)))


def _interval(latency: Latency) -> str:
    """Draw the ratio with its quartiles on a line."""
    low, high = min(0.98, latency.low - 0.02), max(1.1, latency.high + 0.02)

    def x(value: float) -> float:
        return 20 + 560 * (value - low) / (high - low)

    middle, left, right = x(latency.ratio), x(latency.low), x(latency.high)
    return (
        f'<svg viewBox="0 0 600 60" class="interval" role="img" aria-label="ratio {latency.ratio:.3f}, quartiles {latency.low:.3f} to '
        f'{latency.high:.3f}"><line x1="20" y1="30" x2="580" y2="30" class="axis"/><line x1="{x(1):.1f}" y1="14" x2="{x(1):.1f}" y2="46" '
        f'class="axis"/><text x="{x(1):.1f}" y="58" text-anchor="middle">1 (as before)</text><rect x="{left:.1f}" y="24" '
        f'width="{max(2, right - left):.1f}" height="12" rx="3" class="range"/><circle cx="{middle:.1f}" cy="30" r="6" class="middle"/>'
        f'<text x="{middle:.1f}" y="14" text-anchor="middle">{latency.ratio:.3f}</text></svg>'
    )


def _files(exported: Sequence[Exported]) -> Raw:
    if not exported:
        return section("Files", paragraph("No file but this report was written in this run."))
    lines = "\n".join(line for each in exported for line in exported_lines(each))
    return section("Files", Raw(f"<pre>{escaped(lines)}</pre>"))
