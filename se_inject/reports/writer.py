"""A plan and what was found out about it → one HTML file without a request to anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

from torch import nn

from se_inject._version import __version__
from se_inject.atomic_files import atomic, check_writable
from se_inject.cost import CostReport, CostRow, Latency, latency_line
from se_inject.errors import OptionError
from se_inject.exporting import Exported, exported_lines
from se_inject.gates import Excitations, figures
from se_inject.pictures import block_name, svg
from se_inject.plans import Plan, plan_lines
from se_inject.reports.html import Column, Raw, bar, details, escaped, page, paragraph, section, table, tile
from se_inject.tables import counted, percent, short
from se_inject.verification import Verdict

FIGURES = (
    ("params", "parameters", "learnable numbers that the blocks add"),
    ("macs", "MACs", "multiply-adds for one example; other papers' FLOPs are two for each"),
    ("bytes", "bytes", "activations read and written for one example: what blocks cost in time"),
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
    parts = [
        _summary(plan, cost, verdict, latency, gates),
        section("The network", Raw(f'<div class="picture" tabindex="0">{svg(drawing, standalone=False)}</div>')),
        _cost(plan, cost),
        _blocks(plan, cost, gates),
        _checks(verdict),
        _latency(latency),
        _files(exported),
        *([_gates(gates, cost)] if gates is not None else []),
        *(
            [section("Notes", Raw("<ul>"), *(Raw(f"<li>{escaped(line)}</li>") for line in all_notes), Raw("</ul>"))]
            if all_notes
            else []
        ),
        *([section("Make it again", Raw(f"<pre>{escaped(command)}</pre>"))] if command else []),
    ]
    return page(title, parts, f"Made by se-inject {__version__}.")


def _where(plan: Plan) -> str:
    stages = sorted({step.stage for step in plan.steps if step.stage is not None})
    outside = sum(step.stage is None for step in plan.steps)
    inside = f"in stage{'s' * (len(stages) != 1)} {', '.join(map(str, stages))}" if stages else ""
    return " and ".join(part for part in (inside, f"{outside} outside of the stages" if outside else "") if part)


def _summary(
    plan: Plan, cost: CostReport, verdict: Verdict | None, latency: Latency | None, gates: Excitations | None
) -> Raw:
    """Write the five answers: how many, where, at what cost, whether right, and which could go first."""
    added, before = cost.added, cost.before
    kinds = ", ".join(dict.fromkeys(block_name(step.block) for step in plan.steps))
    tiles = [
        tile("Blocks", f"{len(plan):,}", f"{kinds}, {_where(plan)}"),
        tile("Parameters", percent(added.params, before.params), f"{before.params:,} + {added.params:,}"),
        tile("MACs", percent(added.macs, before.macs), f"{short(before.macs)} + {short(added.macs)} for one example"),
        tile(
            "Bytes moved", percent(added.bytes, before.bytes), f"{short(before.bytes, 'B')} + {short(added.bytes, 'B')}"
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
    first = _first_to_drop(plan, cost, gates)
    lines = [*(paragraph(line) for line in plan_lines(plan)), paragraph(first, strong="Which to drop first: ")]
    return Raw(f'<div class="tiles">{"".join(tiles)}</div>{"".join(lines)}')


def _right(verdict: Verdict | None) -> str:
    if verdict is None:
        return tile("Checked", "no", "nothing was verified in this run")
    failed = [check for check in verdict.checks if check.passed is False]
    passed = sum(check.passed is True for check in verdict.checks)
    if failed:
        return tile("Checked", "FAILED", f"{len(failed)} of {len(verdict.checks)} checks", kind="bad")
    skipped = sum(check.passed is None for check in verdict.checks)
    more = f", {skipped} did not apply" if skipped else ""
    return tile("Checked", "all right", f"{counted(passed, 'check')} passed{more}", kind="good")


def _first_to_drop(plan: Plan, cost: CostReport, gates: Excitations | None) -> str:
    """Choose the first block to drop by its gates, if these are known; else by what the paper found and by cost."""
    if gates is not None and gates.blocks:
        least = min(gates.blocks, key=lambda block: block.variation)
        row = next((row for row in cost.rows if row.site == least.site), None)
        saves = "" if row is None else f", and it costs {row.cost.params:,} parameters"
        return (
            f"{least.path} (stage {least.stage}): its gate varies least from image to image, by {100 * least.variation:.3g} % "
            f"of its size{saves}. se-inject prune measures what dropping it changes."
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


def _cost(plan: Plan, cost: CostReport) -> Raw:
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
        paragraph("By stage; the bars are shares of what is added. Click on a column to sort by it."),
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
    columns = [
        Column("stage"), Column("site"), Column("becomes"), Column("block"), Column("channels", right=True),
        Column("width", right=True, title="of the bottleneck"), Column("position"),
        *(Column(name, right=True, title=why) for _, name, why in FIGURES),
    ]  # fmt: skip
    if gates is not None:
        columns += [
            Column("mean gate", right=True),
            Column("varies by", right=True, title="from image to image, as a share of its size"),
        ]
    body = table("Every block", columns, rows)
    return section("Where the blocks are", details(f"All {counted(len(rows), 'block')}", body, is_open=len(rows) <= 24))


def _checks(verdict: Verdict | None) -> Raw:
    if verdict is None:
        return section("Are they right?", paragraph("Nothing was verified in this run."))
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
        return section("Files", paragraph("No file was written in this run."))
    lines = "\n".join(line for each in exported for line in exported_lines(each))
    return section("Files", Raw(f"<pre>{escaped(lines)}</pre>"))


def _gates(gates: Excitations, cost: CostReport) -> Raw:
    """Write what the gates do on data, the blocks that depend least on the image first."""
    saved = {row.site: row.cost.params for row in cost.rows}
    ranked = sorted(gates.blocks, key=lambda block: block.variation)
    top = max((block.variation for block in ranked), default=0)
    rows = [
        [
            block.name,
            block.stage if block.stage is not None else "–",
            bar(block.variation, top, f"{100 * block.variation:.3g} %"),
            *figures(block),
            f"{saved.get(block.site, 0):,}",
        ]
        for block in ranked
    ]
    names = ("mean", "spread", "varies", "of that by class", "saturated", "always on", "always off")
    columns = [
        Column("block"),
        Column("stage"),
        Column("varies by", right=True),
        *(Column(name, right=True) for name in names),
        Column("parameters", right=True),
    ]
    body = table("Gates", columns, rows)
    return section(
        "What the gates do",
        paragraph(
            f"Over {counted(gates.examples, 'example')}; first those whose gate depends least on the image, which cost least to drop."
        ),
        body,
    )
