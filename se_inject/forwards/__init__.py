"""Stored forwards: a module's ``forward`` as data that can be checked, pickled and written as Python.

In: fx graphs of one module, or program lines out of a file. Out: JSON-able lines, source, and generated classes.
Must not know: how a call is observed, what a site is, or what a file looks like.
"""

from se_inject.forwards.checks import check_forward, stored_lines
from se_inject.forwards.classes import addressed, made, reduction, shared
from se_inject.forwards.constants import Form, decoded, encoded
from se_inject.forwards.edited import check_lines, checked_class, edited, edited_graph, generated_class
from se_inject.forwards.graphs import expectations, graph_of, lines_of
from se_inject.forwards.lasting import give_back_forward_
from se_inject.forwards.lines import all_lines, in_modes, is_at_output, without_unused
from se_inject.forwards.marks import (
    ALWAYS_ON,
    THAWED,
    UNFUSED,
    body_of,
    class_when_on,
    class_when_thawed,
    class_when_unfused,
    has_changed_class,
    is_edited,
    is_frozen,
    is_fused,
    made_from,
    original_class,
    steps_data,
)
from se_inject.forwards.named_classes import Unlike, field, is_container
from se_inject.forwards.own_methods import OwnMethod, bodies_in, calls_own_method, with_bodies
from se_inject.forwards.programs import (
    ATTRIBUTES,
    FixedBatchNorm,
    Program,
    class_of,
    is_of_training,
    program,
    program_class,
    program_module,
    recorded_inputs,
)
from se_inject.forwards.python import function_called, is_name
from se_inject.forwards.steps import check_blocks, is_block_name, is_code, is_possible, is_trusted
from se_inject.forwards.vocabulary import (
    checked_path,
    function_name,
    function_named,
    is_plain_name,
)

__all__ = [
    "ALWAYS_ON",
    "ATTRIBUTES",
    "THAWED",
    "UNFUSED",
    "FixedBatchNorm",
    "Form",
    "OwnMethod",
    "Program",
    "Unlike",
    "addressed",
    "all_lines",
    "bodies_in",
    "body_of",
    "calls_own_method",
    "check_blocks",
    "check_forward",
    "check_lines",
    "checked_class",
    "checked_path",
    "class_of",
    "class_when_on",
    "class_when_thawed",
    "class_when_unfused",
    "decoded",
    "edited",
    "edited_graph",
    "encoded",
    "expectations",
    "field",
    "function_called",
    "function_name",
    "function_named",
    "generated_class",
    "give_back_forward_",
    "graph_of",
    "has_changed_class",
    "in_modes",
    "is_at_output",
    "is_block_name",
    "is_code",
    "is_container",
    "is_edited",
    "is_frozen",
    "is_fused",
    "is_name",
    "is_of_training",
    "is_plain_name",
    "is_possible",
    "is_trusted",
    "lines_of",
    "made",
    "made_from",
    "original_class",
    "program",
    "program_class",
    "program_module",
    "recorded_inputs",
    "reduction",
    "shared",
    "steps_data",
    "stored_lines",
    "with_bodies",
    "without_unused",
]
