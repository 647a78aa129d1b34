"""Gates on data: statistics of every gate, blocks that can be dropped, and two networks compared.

In: an injected network and batches. Out: statistics of every gate, a network with fewer blocks, differences with errors.
Must not know: the command line, how plans are made, or how files are exported.
"""

from se_inject.gates.compare import Compared, compare
from se_inject.gates.data import Data, open_data, preprocessing_for
from se_inject.gates.excitations import excitations
from se_inject.gates.plot import plot_gates
from se_inject.gates.prune import Pruned, latency_beside, prune_blocks_
from se_inject.gates.statistics import BlockGates, Excitations
from se_inject.gates.text import (
    comparison_data,
    comparison_text,
    excitations_data,
    excitations_text,
    figures,
    pruned_data,
    pruned_text,
)

__all__ = [
    "BlockGates",
    "Compared",
    "Data",
    "Excitations",
    "Pruned",
    "compare",
    "comparison_data",
    "comparison_text",
    "excitations",
    "excitations_data",
    "excitations_text",
    "figures",
    "latency_beside",
    "open_data",
    "plot_gates",
    "preprocessing_for",
    "prune_blocks_",
    "pruned_data",
    "pruned_text",
]
