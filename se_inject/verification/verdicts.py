"""A verdict as a value: the checks of one injected network, and what each found."""

from __future__ import annotations

from dataclasses import dataclass

from se_inject.errors import VerificationError, either
from se_inject.tables import Printed

_OF_THE_BLOCKS = {"same output as before", "blocks trainable"}
"""Checks that a block can fail by its own fault."""


@dataclass(frozen=True)
class Check:
    """One question and its answer; ``passed`` is None where the question doesn't apply."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, repr=False)
class Verdict(Printed):
    """All checks of one injected network."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Format a line for each check, and the notes."""
        from se_inject.verification.text import verdict_lines

        return "\n".join(verdict_lines(self))

    def summary(self) -> str:
        """Say how many checks passed, and which failed."""
        failed = [check.name for check in self.checks if check.passed is False]
        passed = sum(check.passed is True for check in self.checks)
        return f"{passed} of {len(self.checks)} checks passed" + (f"; FAILED: {', '.join(failed)}" if failed else "")

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def expect_passed(self) -> Verdict:
        """Return this verdict if nothing failed, else raise.

        Raises:
            VerificationError: names the checks that did.
        """
        failed = [check for check in self.checks if check.passed is False]
        if failed:
            raise VerificationError(
                f"the injected network failed {len(failed)} of {len(self.checks)} checks",
                seen="; ".join(f"{check.name}: {check.detail}" for check in failed),
                hint=either("nothing was written; ", "")
                + (
                    "without the blocks the network is right: `se_inject.testing.check_block` tests one"
                    if {check.name for check in failed} <= _OF_THE_BLOCKS
                    else "please report the network, it should have been refused instead"
                ),
            )
        return self
