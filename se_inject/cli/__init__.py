"""The command line, the only room that prints.

In: arguments. Out: text for people on stdout (or JSON for machines), talk on stderr, an exit code.
Must not know: anything that Python's callers would want too; that belongs to a room below.
"""

from se_inject.cli.entry import main

__all__ = [
    "main",
]
