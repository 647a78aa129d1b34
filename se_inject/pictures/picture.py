"""A picture as a value, shown in notebooks and saved as SVG or PNG."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from se_inject.atomic_files import atomic, check_writable
from se_inject.errors import ExportError, OptionError
from se_inject.pictures.network import draw_network
from se_inject.pictures.raster import write_png
from se_inject.pictures.shapes import Drawing, svg
from se_inject.sites import Sites
from se_inject.surgery import Step
from se_inject.tracing import Trace

SUFFIXES = (".svg", ".png")


@dataclass(frozen=True, eq=False)
class Picture:
    """A drawing of a network. A notebook shows it; ``save`` writes it; ``str`` says what is in it."""

    drawing: Drawing

    def __str__(self) -> str:
        return f"{self.drawing.title}\n{self.drawing.description}"

    def svg(self) -> str:
        """Return the picture as SVG text, which follows the reader's light or dark mode."""
        return svg(self.drawing)

    def _repr_svg_(self) -> str:
        return self.svg()

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write the picture to a file.

        Args:
            path: ``.svg``, or ``.png`` (needs matplotlib; in the light colours).
            force: whether it may replace a file that exists.

        Raises:
            OptionError: another suffix.
            ExportError: the file can't be written, or there is no matplotlib.
        """
        check_picture(path, force=force)
        with atomic(path, force) as temporary:
            if temporary.suffix.lower() == ".svg":
                temporary.write_text(self.svg(), encoding="utf-8")
            else:
                write_png(self.drawing, temporary)


def picture(
    trace: Trace,
    sites: Sites,
    steps: Sequence[Step],
    *,
    figures: Mapping[str, float] | None = None,
    figure: str = "",
) -> Picture:
    """Draw a network with blocks in it; see ``draw_network``."""
    return Picture(draw_network(trace, sites, steps, figures=figures, figure=figure))


def check_picture(path: str | PathLike[str], *, force: bool = False) -> None:
    """Ask whether a picture may be written here, and can be drawn. Nothing is written.

    Raises:
        OptionError: a suffix of no picture.
        ExportError: the file can't be written, or there is no matplotlib for a PNG.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(f"can't draw to `{path}`", seen="its suffix", hint=f"one of {', '.join(SUFFIXES)}")
    check_writable(path, force)
    if suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ExportError(
            f"can't draw `{path}`",
            seen="matplotlib is not installed",
            hint="pip install 'se-inject[plot]', or write an .svg",
        )
