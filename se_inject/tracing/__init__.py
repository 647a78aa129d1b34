"""Observe one call of a network and write down every module's forward as a one-level graph.

In: a network and example inputs. Out: a ``Trace``: calls, shapes, graphs, and the reasons where there is no graph.
Must not know: what a site or a block is, or anything about files. Leaves the network as it was.
"""

from se_inject.tracing.buffers import inputs_of, is_buffer, numbers_of, writes_into
from se_inject.tracing.failures import describe
from se_inject.tracing.inputs import (
    LARGEST_INPUTS,
    SMALL_SIDE,
    batch_of,
    check_has_numbers,
    check_supported,
    copied,
    cropped,
    example_of,
    inputs_from,
    observe_model,
    parse_shape,
    real_inputs,
    shapes_of,
)
from se_inject.tracing.method_calls import MethodCall, Packed
from se_inject.tracing.names import function_name_of
from se_inject.tracing.nodes import (
    CONVOLUTIONS,
    ancestors,
    einsum_terms,
    gate_and_gated,
    is_attention,
    is_gating,
    sources,
)
from se_inject.tracing.operations import is_data, is_leaf, kind
from se_inject.tracing.proxy import Untraceable, holds_tensor
from se_inject.tracing.snapshots import draws_in_python, preserved, python_state, set_python_state
from se_inject.tracing.substitutes import duplicate, rehearsed, standing_in
from se_inject.tracing.trace import Counts, Guards, OwnerGraph, Trace, float_like
from se_inject.tracing.training_mode import returns_alike, training_graph, training_settings
from se_inject.tracing.twin import twin_of

__all__ = [
    "CONVOLUTIONS",
    "LARGEST_INPUTS",
    "SMALL_SIDE",
    "Counts",
    "Guards",
    "MethodCall",
    "OwnerGraph",
    "Packed",
    "Trace",
    "Untraceable",
    "ancestors",
    "batch_of",
    "check_has_numbers",
    "check_supported",
    "copied",
    "cropped",
    "describe",
    "draws_in_python",
    "duplicate",
    "einsum_terms",
    "example_of",
    "float_like",
    "function_name_of",
    "gate_and_gated",
    "holds_tensor",
    "inputs_from",
    "inputs_of",
    "is_attention",
    "is_buffer",
    "is_data",
    "is_gating",
    "is_leaf",
    "kind",
    "numbers_of",
    "observe_model",
    "parse_shape",
    "preserved",
    "python_state",
    "real_inputs",
    "rehearsed",
    "returns_alike",
    "set_python_state",
    "shapes_of",
    "sources",
    "standing_in",
    "training_graph",
    "training_settings",
    "twin_of",
    "writes_into",
]
