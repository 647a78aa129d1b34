"""Print data to stdout, and everything else where it can't be mistaken for data: stdout beside tables, stderr beside JSON and CSV."""

from __future__ import annotations

from typing import Any

import click

from se_inject.tables import as_json


class Talk:
    """Messages for people, left out with ``--quiet``.

    Args:
        for_machines: whether stdout holds data for machines, so that talk goes to stderr.
    """

    def __init__(self, for_machines: bool = False) -> None:
        self.err = for_machines

    def __call__(self, text: str) -> None:
        """Say this, where tables are or beside data."""
        if not is_quiet():
            click.echo(text, err=self.err)


def note(text: str) -> None:
    """Say this on stderr, if not ``--quiet``."""
    if not is_quiet():
        click.echo(text, err=True)


def print_json(data: Any) -> None:
    """Print the one JSON document of a command."""
    click.echo(as_json(data))


def is_quiet() -> bool:
    """Return whether the command line has ``--quiet``."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


QUIET = "se_inject.quiet"
"""The key of the context's ``meta``."""
