"""Read a network in a confined process; only tensors and plain data of allowed classes come back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from se_inject.errors import OptionError, printable
from se_inject.isolation import call_isolated, default_memory

_LARGEST_NETWORK = 1 << 30
"""Of the file that comes back, what eight times the files that were read may be exceeded by: this process reads it whole."""


def load_isolated(
    load: Callable[..., nn.Module],
    source: str | os.PathLike[str],
    *,
    arch: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    entry: str | None = None,
    say: Callable[[str], None],
) -> nn.Module:
    """Get a network from files that only a confined process opens.

    That process writes the network as this package's own kind of file, and that is read here, with the checks of
    every file: so whatever the original makes torch's readers do, it does there.

    Args:
        load: the function of that name.
        source: a file, or the name of a network of torchvision or timm.
        arch: as for ``load``.
        weights: as for ``load``.
        entry: as for ``load``.
        say: called with each note about what was read.

    Raises:
        OptionError: the source is code of your own, which runs here.
        LoadError: as for ``load``.
        WorkerError: the process died: of a fault in native code, of a limit, or of memory.
    """
    for text in (os.fspath(source), arch or ""):
        if not os.path.exists(text) and ":" in text and not text.startswith(("torchvision:", "timm:")):
            raise OptionError(f"`{text}` is code of yours, and isolated=True is for files", hint="leave it out")
    if ":" not in os.fspath(source) and not os.path.exists(source):
        return load(source)  # says that there is no such file
    files = [Path(path).resolve() for path in (source, weights) if path is not None and os.path.exists(path)]
    sizes = [path.stat().st_size for path in files if path.is_file()]
    with tempfile.TemporaryDirectory(prefix="se-inject-") as folder:
        output = Path(folder).resolve() / "network.pt"
        printed = call_isolated(
            "se_inject.loading.models:write_network",
            {
                "source": os.fspath(source),
                "arch": arch,
                "weights": None if weights is None else os.fspath(weights),
                "entry": entry,
            },
            output,
            readable=files,
            memory=default_memory(sizes),
            seconds=3600 * (os.cpu_count() or 1),
            file_size=_LARGEST_NETWORK + 8 * sum(sizes) if sizes else None,
        )
        for note in _notes(printed):
            say(printable(note, 1000))
        return load(output)


def _notes(printed: str) -> list[str]:
    """Read the notes in the last line that a process printed; what else a hostile file made it print is left out."""
    try:
        found = json.loads(printed.splitlines()[-1])
    except (ValueError, LookupError, RecursionError):
        return []
    return [note for note in found if isinstance(note, str)] if isinstance(found, list) else []
