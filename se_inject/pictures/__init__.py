"""Draw networks: stages, units from the inside, and blocks where they sit.

In: a ``Trace``, its ``Sites`` and steps. Out: a ``Drawing`` of shapes, written as SVG, or as PNG with matplotlib.
Must not know: how a plan is made, what a report holds, or the command line.
"""

from se_inject.pictures.boxes import block_name
from se_inject.pictures.network import draw_network
from se_inject.pictures.picture import Picture, check_picture, picture
from se_inject.pictures.shapes import DARK, LIGHT, Drawing, Theme, svg

__all__ = [
    "DARK",
    "LIGHT",
    "Drawing",
    "Picture",
    "Theme",
    "block_name",
    "check_picture",
    "draw_network",
    "picture",
    "svg",
]
