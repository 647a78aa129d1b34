"""Put blocks into a network and take them out again. Nothing else in the package changes a model.

In: a network and steps (site, block, options). Out: the same network, its edited owners of a generated class.
Must not know: how sites are found or chosen, or how anything is printed.
"""

from se_inject.surgery.edit import edited_bodies
from se_inject.surgery.freeze import freeze_statistics_, frozen, thaw_statistics_
from se_inject.surgery.fuse import Fused, FusedBlock, fuse_, fused, unfuse_
from se_inject.surgery.methods import method_notes
from se_inject.surgery.remove import put_back_, remove_
from se_inject.surgery.schema import first_problem, with_integers
from se_inject.surgery.step import Step
from se_inject.surgery.swap import (
    check_sizes,
    check_unfused,
    eject_,
    inject_,
    injected_blocks,
    own_steps,
    set_class,
    steps_of,
)
from se_inject.surgery.tails import may_change

__all__ = [
    "Fused",
    "FusedBlock",
    "Step",
    "check_sizes",
    "check_unfused",
    "edited_bodies",
    "eject_",
    "first_problem",
    "freeze_statistics_",
    "frozen",
    "fuse_",
    "fused",
    "inject_",
    "injected_blocks",
    "may_change",
    "method_notes",
    "own_steps",
    "put_back_",
    "remove_",
    "set_class",
    "steps_of",
    "thaw_statistics_",
    "unfuse_",
    "with_integers",
]
