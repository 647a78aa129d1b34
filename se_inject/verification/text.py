"""Format a verdict as lines and data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from se_inject.verification.verdicts import Verdict


def verdict_lines(verdict: Verdict) -> list[str]:
    """Write one line for each check."""
    marks = {True: "ok  ", False: "FAIL", None: "–   "}
    width = max(len(check.name) for check in verdict.checks)
    return [f"{marks[check.passed]} {check.name:<{width}}  {check.detail}" for check in verdict.checks] + [
        f"     {note}" for note in verdict.notes
    ]


def verdict_data(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as data for ``--json``."""
    return {
        "passed": verdict.passed,
        "checks": [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in verdict.checks],
        "notes": list(verdict.notes),
    }
