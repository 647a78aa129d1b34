"""Import matplotlib, an extra, when something is drawn."""

from __future__ import annotations

import importlib
import os
import tempfile
from typing import Any


def figure_class() -> Any:
    """Import matplotlib's ``Figure``, also where the current folder may not be read.

    matplotlib looks there for a file of settings first. A confined process sees that there is one, and may not open it.
    """
    here = None
    try:
        open("matplotlibrc", "rb").close()
    except PermissionError:
        here = os.getcwd()
        os.chdir(tempfile.gettempdir())
    except OSError:
        pass
    try:
        return importlib.import_module("matplotlib.figure").Figure
    finally:
        if here is not None:
            os.chdir(here)
