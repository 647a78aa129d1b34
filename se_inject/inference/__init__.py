"""Make a copy of a network that only infers: norms folded, gates precomputed where they can be, blocks fused.

In: a network, injected or not. Out: a copy that computes the same in eval mode, checked against it.
Must not know: plans, files, or the command line.
"""

from se_inject.inference.network import for_inference

__all__ = [
    "for_inference",
]
