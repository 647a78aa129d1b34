"""List and run the checks that an injected network is still the network it was made from."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.guarding import under_guard
from se_inject.random_numbers import seeded
from se_inject.surgery import injected_blocks, method_notes, steps_of
from se_inject.tracing import (
    Trace,
    check_has_numbers,
    copied,
    describe,
    float_like,
    observe_model,
    real_inputs,
    rehearsed,
)
from se_inject.verification.calls import (
    Seen,
    difference,
    first_line,
    observed_in_eval,
    observed_in_training,
    run,
)
from se_inject.verification.comparison import is_finite, same_value, tensors_in
from se_inject.verification.coverage import units_with_blocks
from se_inject.verification.gradients import gradients
from se_inject.verification.identity import no_identity, starts_as_identity, without_blocks
from se_inject.verification.keeping import kept_settings, kept_state
from se_inject.verification.methods import methods_with_blocks
from se_inject.verification.verdicts import Check, Verdict
from se_inject.verification.watching import failure, watched


@under_guard
def verify(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    trace: Trace | None = None,
    fresh: bool = False,
) -> Verdict:
    """Compare an injected network with the one it was made from. Neither is changed.

    Random numbers of torch come from generators of this thread. If a forward draws from Python's or NumPy's own generators, these are
    seeded and put back: they are the process's, so another thread that draws from them meanwhile sees that.

    Args:
        before: the network without blocks, or with fewer.
        after: the injected one.
        example_inputs: as for ``plan``.
        example_kwargs: as for ``plan``.
        trace: an observed call of ``before``, if there is one already.
        fresh: the blocks have just been put in: if they have an identity start they must be identities. Otherwise
            blocks that have left their start are taken for trained ones, whose output is meant to differ.

    Raises:
        TraceError: the network's forward fails on the inputs.
        UnsupportedModel: it is on the meta device.
    """
    check_has_numbers(before)
    trace = trace or observe_model(before, example_inputs, example_kwargs)
    steps = {step.path for step in steps_of(after)} - {step.path for step in steps_of(before)}
    blocks = {path: block for path, block in injected_blocks(after) if path in steps}
    kept = [kept_state(before, after, blocks), kept_settings(before, after, blocks)]
    warnings_of_weights = weight_warnings(before)
    before, after = rehearsed(before), rehearsed(after)  # what is called: others may be using the networks
    blocks = {path: after.get_submodule(path) for path in blocks}
    inputs, in_eval = observed_in_eval(before, trace)
    checks = [
        *kept,
        *_outputs({"eval": in_eval, "train": observed_in_training(before, inputs)}, after, blocks, inputs, fresh),
        Check("blocks where units are", *units_with_blocks(trace, after)),
        gradients(after, blocks, inputs, trace.may_skip),
        *methods_with_blocks(after, blocks, inputs),
    ]
    notes = [f"numeric checks on {describe(*inputs)}", *_overflow(in_eval), *warnings_of_weights]
    notes += method_notes(trace, after, [step for step in steps_of(after) if step.path in blocks])
    return Verdict(tuple(checks), tuple(notes))


def check_against_file(network: nn.Module, program: Any, trace: Trace) -> Check:
    """Compare a network that was made of a program with the program itself, run by torch.

    Args:
        network: what ``load`` gave.
        program: what ``load_program`` gave for the same file.
        trace: an observed call of the network.
    """
    from se_inject.loading import arguments_of

    name = "same output as the file"
    is_exported = isinstance(program, torch.export.ExportedProgram)
    theirs = program.module() if is_exported else program.eval()
    parameter = float_like(network)
    why = ""
    for batch in (3, None):
        args, kwargs = real_inputs(trace.inputs, batch=batch, device=parameter.device, dtype=parameter.dtype)
        given, named = arguments_of(program, args) if is_exported else (args, {})
        try:
            with torch.no_grad(), warnings.catch_warnings(), seeded(1):
                warnings.simplefilter("ignore")
                expected = theirs(*copied(given), **copied({**named, **kwargs}))
        except Exception as error:
            why = first_line(error)
            continue
        with torch.no_grad():
            seen = run(rehearsed(network), (args, kwargs), "eval").output
        leaves, others = (tensors_in(each) for each in (expected, seen))
        different = difference(leaves, others)
        return Check(name, not different, different or f"bit-equal on {describe(args)}")
    return Check(name, None, f"torch can't run the file on these inputs: {why}")


def weight_warnings(model: nn.Module) -> list[str]:
    """Describe what is wrong with a network's weights before anything is done to it."""
    tensors = [
        t for t in model.state_dict().values() if isinstance(t, Tensor) and t.is_floating_point() and not t.is_meta
    ]
    if all(map(is_finite, tensors)):
        return []
    return ["warning: the network's weights hold NaN or infinite values"]


def _overflow(seen: Seen) -> list[str]:
    numbers = [leaf for leaf in tensors_in(seen.output) if leaf.is_floating_point()]
    if any(bool(leaf.isfinite().any()) for leaf in numbers) or not any(leaf.numel() for leaf in numbers):
        return []
    return ["warning: no number in the network's own output is finite: equal outputs tell nothing"]


def _outputs(
    expected: dict[str, Seen | str], after: nn.Module, blocks: dict[str, nn.Module], inputs: Any, fresh: bool
) -> list[Check]:
    """Compute the outputs with the blocks as they start, and with every block replaced by an identity."""
    as_they_start = {mode: _compared(seen, after, inputs, mode, blocks) for mode, seen in expected.items()}
    with without_blocks(after, blocks):
        without = {mode: _compared(seen, after, inputs, mode, {}) for mode, seen in expected.items()}
    names = ("same output as before", "same output without the blocks")
    first, second = (
        Check(name, *_answer(results)) for name, results in zip(names, (as_they_start, without), strict=True)
    )
    if not starts_as_identity(after, blocks, fresh):
        first = Check(names[0], None, "the blocks are not at their identity start: outputs are meant to differ")
    elif first.passed is False and (name := no_identity(after, blocks)) is not None:
        first = Check(names[0], False, f"{first.detail}: {name} does not start as x ↦ x")
    return [first, second]


def _compared(expected: Seen | str, after: nn.Module, inputs: Any, mode: str, blocks: dict[str, nn.Module]) -> str:
    """Return an empty text if the injected network does the same bit for bit, else what differs or why it was not run."""
    if isinstance(expected, str):
        return f"not run: {expected}"
    with watched(blocks) as running:
        try:
            with torch.no_grad():
                seen = run(after, inputs, mode)
        except Exception as error:
            return failure(after, error, running)
    unlike = [name for name, value in expected.buffers.items() if not same_value(value, seen.buffers.get(name))]
    return difference(expected.output, seen.output) or (f"`{unlike[0]}` is updated otherwise" if unlike else "")


def _answer(results: dict[str, str]) -> tuple[bool | None, str]:
    ran = [result for result in results.values() if not result.startswith("not run")]
    words = [f"{mode}: {result or 'bit-equal'}" for mode, result in results.items()]
    text = "; ".join(words) if any(results.values()) else "bit-equal in eval and in train"
    return (not any(ran) if ran else None), text
