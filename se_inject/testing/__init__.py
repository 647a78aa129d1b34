"""Check a block against everything that this package will ask of it, in one call, for authors of blocks.

In: a block's class or name, and its options. Out: nothing, or an ``AssertionError`` that lists the checks it fails.
Must not know: networks, sites, plans, or the command line.
"""

from se_inject.testing.checks import CHECKS, SIZES
from se_inject.testing.conformance import ConformanceError, Failure, check_block

__all__ = ["CHECKS", "SIZES", "ConformanceError", "Failure", "check_block"]
