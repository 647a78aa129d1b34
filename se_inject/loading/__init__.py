"""Read networks and weights from files and names without running what a file brings along.

In: a path or a name such as ``timm:resnet50``. Out: a network of ordinary modules, or a refusal with its reason.
Must not know: sites, plans, blocks to be put in, or the command line.
"""

from se_inject.loading.exported.network import arguments_of
from se_inject.loading.formats import described, form_of
from se_inject.loading.inspection import Inspection, Named, inspect_file
from se_inject.loading.models import describe, is_program, load, load_program
from se_inject.loading.opened import opened
from se_inject.loading.weight_files import load_weights_
from se_inject.loading.weights import WeightsWarning

__all__ = [
    "Inspection",
    "Named",
    "WeightsWarning",
    "arguments_of",
    "describe",
    "described",
    "form_of",
    "inspect_file",
    "is_program",
    "load",
    "load_program",
    "load_weights_",
    "opened",
]
