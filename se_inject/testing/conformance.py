"""Run all checks on a block, and say in one error which it fails.

::

    from se_inject.testing import check_block

    def test_my_gate():
        check_block(MyGate)
        check_block(MyGate, rank=3, kernel=5)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from se_inject.blocks import Factory, find_block
from se_inject.errors import InjectError, OptionError
from se_inject.random_numbers import seeded
from se_inject.testing.checks import CHECKS, SIZES, Broken, Subject, builds


class Failure(NamedTuple):
    """A check that a block failed: its name, what was seen, what to do."""

    check: str
    seen: str
    hint: str


class ConformanceError(InjectError, AssertionError):
    """A block breaks the contract; ``failures`` lists the checks that it fails."""

    def __init__(self, name: str, failures: Sequence[Failure], checks: int) -> None:
        self.failures = tuple(failures)
        self.checks = checks
        self.name = name
        lines = [f"{failure.check}: {failure.seen}\n        hint: {failure.hint}" for failure in failures]
        super().__init__(f"`{name}` fails {len(failures)} of {checks} checks", seen="\n      ".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:  # pytest-xdist sends it from one process to another
        return type(self), (self.name, self.failures, self.checks)


def check_block(
    factory: Factory | str,
    *,
    channels: int = 32,
    rank: int = 2,
    size: Sequence[int] | None = None,
    skip: Iterable[str] = (),
    **options: Any,
) -> None:
    """Check a block: what it returns, trains, keeps, leaves behind, and exports to. Takes some seconds.

    All checks of ``CHECKS`` run, whatever the earlier ones say. Nothing global is changed: the random generator is
    afterwards where it was.

    Args:
        factory: the block's class or function, or a block's name as in ``plan(block=...)``.
        channels: C of the values it is built for.
        rank: number of spatial dimensions of the values.
        size: their spatial size; None: one from ``SIZES``.
        skip: names of checks that are left out, for a limitation that the block's card tells.
        **options: of the block.

    Raises:
        ConformanceError: at least one check failed; it is an ``AssertionError`` and lists all that did.
        OptionError: no such block, rank or check.
    """
    if rank not in SIZES:
        raise OptionError("a block needs 1 to 3 spatial dimensions", seen=f"rank = {rank}")
    left_out = set(skip)
    if unknown := left_out - CHECKS.keys():
        raise OptionError(f"no check is called `{min(unknown)}`", seen=", ".join(CHECKS))
    if isinstance(factory, str):
        factory = find_block(factory)
    subject = Subject(factory, channels, rank, tuple(size or SIZES[rank]), options)
    name = getattr(factory, "__name__", type(factory).__name__)
    failures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with seeded(0):
            failure = _run("builds", builds, subject)
        if failure is not None:
            raise ConformanceError(name, [failure], 1)
        chosen = [check for check in CHECKS if check not in left_out]
        for check in chosen:
            with contextlib.nullcontext() if CHECKS[check].compiles else seeded(0):
                failure = _run(check, CHECKS[check].function, subject)
            if failure is not None:
                failures.append(failure)
    if failures:
        raise ConformanceError(name, failures, len(chosen))


def _run(name: str, function: Callable[[Subject], None], subject: Subject) -> Failure | None:
    hint = CHECKS[name].hint if name in CHECKS else "it is called with the number of channels, then keywords"
    try:
        function(subject)
    except Broken as broken:
        return Failure(name, str(broken), hint)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        detail = str(error) if isinstance(error, InjectError) else lines[0]
        return Failure(name, f"{type(error).__name__}: {detail}", hint)
    return None
