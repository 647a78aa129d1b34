"""Check that an injected network is still the network it was made from.

In: a network before and after. Out: a ``Verdict``, a line for each check; comparisons of outputs for others to use.
Must not know: how a plan was made, or which file the network goes to.
"""

from se_inject.verification.checks import check_against_file, verify, weight_warnings
from se_inject.verification.comparison import TOLERANCES, FileCheck, Rejected, difference, reason, same_value, tensors
from se_inject.verification.text import verdict_data, verdict_lines
from se_inject.verification.verdicts import Verdict

__all__ = [
    "TOLERANCES",
    "FileCheck",
    "Rejected",
    "Verdict",
    "check_against_file",
    "difference",
    "reason",
    "same_value",
    "tensors",
    "verdict_data",
    "verdict_lines",
    "verify",
    "weight_warnings",
]
