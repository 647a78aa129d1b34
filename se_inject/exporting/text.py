"""What was written to a file, as lines and data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from se_inject.tables import short

if TYPE_CHECKING:
    from se_inject.exporting.exporter import Exported


def exported_lines(item: Exported) -> list[str]:
    """What was written, how, and what the comparison with the network gave."""
    lines = [f"wrote {item.path} ({short(item.size_bytes, 'B')}, {item.how})"]
    if item.checks:
        worst = max(item.checks, key=lambda check: check.max_rel_error)
        batches = ", ".join(str(check.batch) for check in item.checks)
        errors = f"max error {worst.max_abs_error:.2g}, relative {worst.max_rel_error:.2g} (limit {item.tolerance:.0e})"
        found = errors if item.tolerance else "outputs bit-equal"
        lines.append(f"      loaded back and run at batch {batches}: {found}")
    return lines + [f"      {note}" for note in item.notes]


def exported_data(item: Exported) -> dict[str, Any]:
    """A written file for ``--json``."""
    return {
        "path": str(item.path),
        "format": item.format,
        "bytes": item.size_bytes,
        "how": item.how,
        "checks": [check._asdict() for check in item.checks],
        "tolerance": item.tolerance,
        "notes": list(item.notes),
    }
