"""Blocks that can be put in: Squeeze-and-Excitation, the registry of plug-ins, and layers to build blocks from.

In: a name, a number of channels and options. Out: a module that gates a value, and checks of what plug-ins offer.
Must not know: networks, traces, sites or plans.
"""

from se_inject.blocks.building import (
    block_numbers,
    build_block,
    check_block,
    has_gate,
    has_identity_start,
    is_ours,
    start_as_identity_,
)
from se_inject.blocks.fusion import (
    NoGate,
    can_fuse,
    fuse_block_,
    how_computed,
    rebuild_fused,
    unfuse_block_,
    ungated,
)
from se_inject.blocks.layers import LEAST_WIDTH
from se_inject.blocks.registry import (
    Factory,
    block_names,
    block_options,
    check_options,
    check_values,
    find_block,
    has_class_at,
    is_at_hand,
    parsed_options,
    register_block,
)
from se_inject.blocks.squeeze_excitation import SqueezeExcitation
from se_inject.forwards import is_fused

__all__ = [
    "LEAST_WIDTH",
    "Factory",
    "NoGate",
    "SqueezeExcitation",
    "block_names",
    "block_numbers",
    "block_options",
    "build_block",
    "can_fuse",
    "check_block",
    "check_options",
    "check_values",
    "find_block",
    "fuse_block_",
    "has_class_at",
    "has_gate",
    "has_identity_start",
    "how_computed",
    "is_at_hand",
    "is_fused",
    "is_ours",
    "parsed_options",
    "rebuild_fused",
    "register_block",
    "start_as_identity_",
    "unfuse_block_",
    "ungated",
]
