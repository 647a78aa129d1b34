"""The one address that stored files name: everything of ``se_inject`` that a pickle refers to is here, and stays here.

``torch.save`` and ``pickle`` write classes and functions by module and name. These are defined in rooms that may be
rearranged; what a file says is ``se_inject.generated.edited`` and the like. Nothing here may be renamed or removed, nor
may what it takes change: files name it.
"""

from se_inject.blocks import SqueezeExcitation
from se_inject.blocks import rebuild_fused as fused
from se_inject.forwards import FixedBatchNorm, edited, edited_graph, program, program_class
from se_inject.surgery import frozen

__all__ = [
    "FixedBatchNorm",
    "SqueezeExcitation",
    "edited",
    "edited_graph",
    "frozen",
    "fused",
    "program",
    "program_class",
]
