"""Store injected blocks alone in a file, and put them onto the backbone they were trained on; several by name on one backbone.

In: an injected network, or a backbone and an adapter's file. Out: a file, or the backbone with the blocks in it.
Must not know: how sites are found, other formats of files, or the command line.
"""

from se_inject.adapters.files import (
    Adapter,
    BackboneWarning,
    fingerprint,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from se_inject.adapters.named import active_adapter, adapters_of, load_adapter_, remove_adapter_, set_adapter_

__all__ = [
    "Adapter",
    "BackboneWarning",
    "active_adapter",
    "adapters_of",
    "fingerprint",
    "load_adapter",
    "load_adapter_",
    "read_adapter",
    "remove_adapter_",
    "save_adapter",
    "set_adapter_",
    "write_adapter",
]
