"""Format rows and numbers as text: tables in three formats, short numbers, shares, plurals."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

FORMATS = ("text", "markdown", "csv")


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[Any]],
    style: str = "text",
    *,
    right: Sequence[int] = (),
    indented: bool = False,
) -> str:
    """Format rows under headers as aligned text, a Markdown table or CSV. Columns of numbers, and those named, go right.

    Args:
        headers: of the columns.
        rows: their cells.
        style: ``text``, ``markdown`` or ``csv``.
        right: columns that go right whatever is in them.
        indented: keep blanks at the beginning of cells.
    """
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([headers, *rows])
        return buffer.getvalue().rstrip("\n")
    kinds = [
        "right" if i in right or any(isinstance(row[i], int | float) for row in rows) else "left"
        for i in range(len(headers))
    ]
    shown = [[_cell(value) for value in row] for row in rows]
    return tabulate(
        shown,
        headers,
        tablefmt="github" if style == "markdown" else "simple",
        colalign=kinds if rows else None,
        disable_numparse=True,
        preserve_whitespace=indented,
    )


def as_json(data: Any) -> str:
    """Format data as indented JSON."""
    return json.dumps(data, indent=2)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def short(number: float, unit: str = "") -> str:
    """Format a number with three significant digits and k, M, G or T."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def percent(part: float, whole: float) -> str:
    """Format a share with its sign and at least two significant digits."""
    if not whole:
        return "–"
    share = 100 * part / whole
    decimals = max(0, 1 - math.floor(math.log10(abs(share)))) if share else 0
    return f"{share:+.{decimals}f} %"


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: ``1 block``, ``2 blocks``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


class Printed:
    """A value that prints as the command line prints it: ``str`` is that text, ``repr`` one short line."""

    def text(self) -> str:
        """Return the text that the command line prints."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return a summary of the text in a few words."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
