"""Compute the tail of a gated branch (scale, addition, activation) and whole SE blocks in a few kernels, or in plain torch.

In: tensors, and the names of activation and gate. Out: a tensor, with gradients. Triton is imported when a kernel is first
needed, and is needed by nothing else. Must not know: blocks, networks, or that anything is ever fused.
"""

from se_inject.kernels.dispatch import excite, excite_from, has_kernel, prepare, tail, why_not
from se_inject.kernels.plain import ACTIVATIONS, activated, overwriting_tail, plain_tail

__all__ = [
    "ACTIVATIONS",
    "activated",
    "excite",
    "excite_from",
    "has_kernel",
    "overwriting_tail",
    "plain_tail",
    "prepare",
    "tail",
    "why_not",
]
