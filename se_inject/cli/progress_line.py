"""Show on one line of the terminal what is being done, and for how long already."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from typing import TextIO

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PLAIN_FRAMES = "|/-\\"
_PATIENCE = 0.4


class ProgressLine:
    """A spinner with the step of the work; it appears when the work takes more than a moment.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.step = "starting"
        self.began = time.monotonic()
        self.shown = False
        self.frames = itertools.cycle(_FRAMES if "utf" in (stream.encoding or "").lower() else _PLAIN_FRAMES)

    @classmethod
    def if_wanted(cls, quiet: bool = False) -> ProgressLine | None:
        """Make a progress line on stderr, if that is a terminal that can move its cursor and ``--quiet`` is not given."""
        if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            return None
        return cls(sys.stderr)

    def show(self, step: str) -> None:
        """Show that a step begins."""
        self.step, self.began = step, time.monotonic()

    def tick(self) -> None:
        """Draw the line again."""
        seconds = time.monotonic() - self.began
        if not self.shown and seconds < _PATIENCE:
            return
        width = shutil.get_terminal_size().columns - 12
        self.stream.write(f"\r\x1b[K{next(self.frames)} {self.step[:width]} {seconds:.0f} s")
        self.stream.flush()
        self.shown = True

    def clear(self) -> None:
        """Take the line away."""
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.shown = False
