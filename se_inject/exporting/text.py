"""Format what was written to a file, as lines and data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from se_inject.tables import short

if TYPE_CHECKING:
    from se_inject.exporting.exporter import Exported


def exported_lines(item: Exported) -> list[str]:
    """Format the file's name, the way it was written, and the result of its comparison with the network."""
    shapes = f", input{'s' * (len(item.shapes) > 1)} {', '.join(item.shapes)}" if item.shapes else ""
    lines = [f"wrote {item.path} ({short(item.size_bytes, 'B')}, {item.how}{shapes})"]
    if item.checks:
        worst = max(item.checks, key=lambda check: check.max_rel_error)
        errors = f"max error {worst.max_abs_error:.2g}, relative {worst.max_rel_error:.2g} (limit {item.tolerance:.0e})"
        found = errors if item.tolerance else "outputs bit-equal"
        lines.append(f"      loaded back and run at {_cases(item)}: {found}")
    return lines + [f"      {note}" for note in item.notes]


def _cases(item: Exported) -> str:
    """Describe the batches and, if there are several, the sizes that a file was run at."""
    size = item.checks[0].size
    batches = ", ".join(str(check.batch) for check in item.checks if check.size == size)
    others = list(dict.fromkeys(check.size for check in item.checks if check.size != size))
    return f"batch {batches}" + (f", and at {' and '.join(others)}" if others else "")


def exported_data(item: Exported) -> dict[str, Any]:
    """Give a written file as data for ``--json``."""
    return {
        "path": str(item.path),
        "format": item.format,
        "bytes": item.size_bytes,
        "how": item.how,
        "shapes": list(item.shapes),
        "checks": [check._asdict() for check in item.checks],
        "tolerance": item.tolerance,
        "notes": list(item.notes),
    }
