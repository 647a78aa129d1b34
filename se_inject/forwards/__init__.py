"""Stored forwards: a module's ``forward`` as data that can be checked, pickled and written as Python.

In: fx graphs of one module, or program lines out of a file. Out: JSON-able rows, source, and generated classes.
Must not know: how a call is observed, what a site is, or what a file looks like.
"""

from se_inject.forwards.edited import check_targets, generated_class, graph_data, graph_from, original_class, rebuild
from se_inject.forwards.programs import (
    ATTRIBUTES,
    FixedBatchNorm,
    Program,
    check_program,
    class_of,
    function_called,
    is_name,
    is_of_training,
    program_module,
    recorded_inputs,
    without_unused,
)
from se_inject.forwards.vocabulary import (
    Form,
    checked_path,
    decoded,
    encoded,
    function_name,
    function_named,
    is_plain_name,
)

__all__ = [
    "ATTRIBUTES",
    "FixedBatchNorm",
    "Form",
    "Program",
    "check_program",
    "check_targets",
    "checked_path",
    "class_of",
    "decoded",
    "encoded",
    "function_called",
    "function_name",
    "function_named",
    "generated_class",
    "graph_data",
    "graph_from",
    "is_name",
    "is_of_training",
    "is_plain_name",
    "original_class",
    "program_module",
    "rebuild",
    "recorded_inputs",
    "without_unused",
]
