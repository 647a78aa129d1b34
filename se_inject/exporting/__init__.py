"""Write a network to files, each checked against eager in the runtime that opens it.

In: a network, paths and example inputs. Out: ``Exported`` for each file; all files appear or none.
Must not know: sites, how plans are made, or the command line.
"""

from se_inject.exporting.exporter import Exported, check_targets, export, export_all
from se_inject.exporting.outputs import check_outputs, write_all
from se_inject.exporting.reference import BATCHES
from se_inject.exporting.scripting import scripted
from se_inject.exporting.text import exported_data, exported_lines

__all__ = [
    "BATCHES",
    "Exported",
    "check_outputs",
    "check_targets",
    "export",
    "export_all",
    "exported_data",
    "exported_lines",
    "scripted",
    "write_all",
]
