"""Write the pieces of a page: sections, tables that can be sorted, bars; styles for light, dark, small screens and print."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from se_inject.pictures import DARK, LIGHT, Theme


class Raw(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    name: str
    right: bool = False
    title: str = ""


@dataclass(frozen=True)
class Bar:
    """A number with a bar."""

    value: float
    share: float
    text: str


def bar(value: float, whole: float, text: str | None = None) -> Bar:
    """Write a number with a bar as long as its share of a whole."""
    return Bar(value, value / whole if whole else 0.0, f"{value:,}" if text is None else text)


def escaped(value: Any) -> str:
    """Escape any value as text of a page."""
    return value if isinstance(value, Raw) else html.escape(f"{value:,}" if isinstance(value, int) else str(value))


def paragraph(text: str, *, strong: str = "") -> Raw:
    """Write a paragraph, with some words in bold before it."""
    return Raw(f"<p>{f'<strong>{html.escape(strong)}</strong>' if strong else ''}{html.escape(text)}</p>")


def section(title: str, *parts: Raw) -> Raw:
    """Write a section with its heading."""
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")
    return Raw(f'<section aria-labelledby="{name}"><h2 id="{name}">{html.escape(title)}</h2>{"".join(parts)}</section>')


def details(summary: str, body: Raw, *, is_open: bool) -> Raw:
    """Write a part that can be folded."""
    return Raw(f"<details{' open' if is_open else ''}><summary>{html.escape(summary)}</summary>{body}</details>")


def tile(name: str, value: str, more: str, *, kind: str = "") -> str:
    """Write one figure of the summary."""
    return (
        f'<div class="tile"><div class="name">{html.escape(name)}</div><div class="value {kind}">{html.escape(value)}</div>'
        f'<div class="more">{html.escape(more)}</div></div>'
    )


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Any]],
    *,
    footer: Sequence[Sequence[Any]] = (),
    sortable: bool = True,
) -> Raw:
    """Write a table with a caption and headers that sort it."""
    heads = "".join(_head(column, sortable) for column in columns)
    body = "".join(
        f"<tr>{''.join(_cell(value, column) for value, column in zip(row, columns, strict=True))}</tr>" for row in rows
    )
    foot = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(_cell(v, c) for v, c in zip(row[1:], columns[1:], strict=True))}</tr>'
        for row in footer
    )
    return Raw(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table{" data-sort" if sortable else ""}>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
        f"{f'<tfoot>{foot}</tfoot>' if foot else ''}</table></div>"
    )


def _head(column: Column, sortable: bool) -> str:
    name = html.escape(column.name)
    title = f' title="{html.escape(column.title)}"' if column.title else ""
    shown = f'<button type="button"{title}>{name}</button>' if sortable else name
    return f'<th scope="col"{" class=r" if column.right else ""}>{shown}</th>'


def _cell(value: Any, column: Column) -> str:
    kind = ' class="r"' if column.right else ""
    if isinstance(value, Bar):
        width = max(0.0, min(100.0, 100 * value.share))
        return f'<td{kind} data-v="{value.value:.6g}"><span class="bar" style="--w:{width:.1f}%">{html.escape(value.text)}</span></td>'
    return f"<td{kind}>{escaped(value)}</td>"


def page(title: str, parts: Sequence[Raw], footer: str) -> str:
    """Write a whole page, which requests nothing from any server."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n'
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + f"\n<footer>{html.escape(footer)}</footer>\n</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _style() -> str:
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    return f":root{{{_variables(LIGHT)}}}{dark}{_RULES}"


def _variables(theme: Theme) -> str:
    good, bad = ("#15803d", "#b3261e") if theme is LIGHT else ("#6fdc8c", "#ff8a80")
    return (
        f"--ground:{theme.ground};--ink:{theme.ink};--muted:{theme.muted};--line:{theme.line};--band:{theme.band};"
        f"--unit:{theme.unit};--accent:{theme.blocks[0]};--good:{good};--bad:{bad};"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:1.7rem;margin:0 0 16px;line-height:1.2;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:36px 0 10px}
p{margin:6px 0;max-width:80ch;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-bottom:14px}
.tile{background:var(--band);border-radius:10px;padding:12px 14px}
.tile .name{color:var(--muted);font-size:.85rem}
.tile .value{font-size:1.45rem;font-weight:650;line-height:1.3}
.tile .more{color:var(--muted);font-size:.82rem;overflow-wrap:anywhere}
.good{color:var(--good)}.bad{color:var(--bad);font-weight:700}.muted{color:var(--muted)}
.picture,.scroll{overflow-x:auto}
.picture svg{min-width:760px;width:100%;height:auto;display:block}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:100%}
caption{text-align:left;color:var(--muted);font-size:.85rem;padding:2px 0 6px}
th,td{padding:5px 8px;text-align:left;border-bottom:1px solid color-mix(in srgb,var(--line) 35%,transparent);vertical-align:top}
thead th{border-bottom:1px solid var(--line);white-space:nowrap}
tfoot tr:first-child th,tfoot tr:first-child td{border-top:1px solid var(--line)}
.r{text-align:right}
th button{all:unset;cursor:pointer;font-weight:650}
th button:focus-visible,summary:focus-visible,.scroll:focus-visible,.picture:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
th button::after{content:"";display:inline-block;width:1em;text-align:center;color:var(--muted)}
th[aria-sort=ascending] button::after{content:"↑"}
th[aria-sort=descending] button::after{content:"↓"}
.bar{display:inline-block;min-width:6.5em;padding:0 4px;background:linear-gradient(to left,var(--unit) var(--w),transparent var(--w));border-radius:3px}
pre{background:var(--band);border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
ul{padding-left:1.2em}
summary{cursor:pointer;color:var(--muted);margin:4px 0}
.interval{max-width:600px;width:100%}
.interval .axis{stroke:var(--line)}.interval .range{fill:var(--unit);stroke:var(--line)}.interval .middle{fill:var(--accent)}
.interval text{fill:var(--ink);font-size:12px}
footer{margin-top:40px;color:var(--muted);font-size:.85rem}
@media (max-width:640px){main{padding:16px 12px}h1{font-size:1.35rem}.tiles{grid-template-columns:repeat(2,1fr)}th,td{padding:4px 7px}}
@media print{:root{--ground:#fff;--ink:#000;--muted:#333;--band:#f2f2f2}main{max-width:none;padding:0}.picture svg{min-width:0}.picture,.scroll{overflow:visible}
table{font-size:7.5pt}th,td{padding:2px 4px;overflow-wrap:anywhere}.bar{min-width:0}section{break-inside:auto}h2{break-after:avoid}tr{break-inside:avoid}thead{display:table-header-group}}
"""
_SCRIPT = """
document.querySelectorAll("table[data-sort] thead th").forEach(function (head, column) {
  head.querySelector("button").addEventListener("click", function () {
    var table = head.closest("table"), body = table.tBodies[0];
    var index = Array.prototype.indexOf.call(head.parentNode.children, head);
    var up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(function (each) { each.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    var value = function (row) {
      var cell = row.cells[index], text = cell.dataset.v || cell.textContent.trim();
      var number = parseFloat(text.replace(/,/g, ""));
      return /^[-+]?[\\d.,]+(e[-+]?\\d+)?( %)?$/.test(text) && !isNaN(number) ? number : text;
    };
    Array.from(body.rows).map(function (row, i) { return [value(row), i, row]; }).sort(function (a, b) {
      var order = typeof a[0] === typeof b[0] ? (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0) : (typeof a[0] === "number" ? -1 : 1);
      return (up ? order : -order) || a[1] - b[1];
    }).forEach(function (each) { body.appendChild(each[2]); });
  });
});
window.addEventListener("beforeprint", function () {
  document.querySelectorAll("details").forEach(function (each) { each.open = true; });
});
"""
