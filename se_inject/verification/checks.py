"""Whether an injected network is still the network it was made from: the checks, each a line for people."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.blocks import NoGate, build_block, is_fused
from se_inject.errors import VerificationError
from se_inject.forwards import original_class
from se_inject.guarding import under_guard
from se_inject.random_numbers import seeded
from se_inject.surgery import Step, injected_blocks, method_notes, steps_of
from se_inject.tables import Printed, counted
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
    run_awake,
)
from se_inject.verification.comparison import same_value, tensors_in
from se_inject.verification.coverage import units_with_blocks
from se_inject.verification.learning import DRAWS, Learning, redrawn

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
                hint="nothing was written; without the blocks the network is right: `se_inject.testing.check_block` tests one"
                if {check.name for check in failed} <= _OF_THE_BLOCKS
                else "nothing was written; please report the network, it should have been refused instead",
            )
        return self


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
    kept = [_kept_state(before, after, blocks), _kept_settings(before, after, blocks)]
    warnings_of_weights = weight_warnings(before)
    before, after = rehearsed(before), rehearsed(after)  # what is called: others may be using the networks
    blocks = {path: after.get_submodule(path) for path in blocks}
    inputs, in_eval = observed_in_eval(before, trace)
    checks = [
        *kept,
        *_outputs({"eval": in_eval, "train": observed_in_training(before, inputs)}, after, blocks, inputs, fresh),
        Check("blocks where units are", *units_with_blocks(trace, after)),
        _gradients(after, blocks, inputs),
    ]
    notes = [f"numeric checks on {describe(*inputs)}", *_overflow(in_eval), *warnings_of_weights]
    notes += method_notes(after, [step for step in steps_of(after) if step.path in blocks])
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
    if all(tensor.sum().isfinite() or tensor.isfinite().all() for tensor in tensors):  # a sum is soon made
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
    with _without(after, blocks):
        without = {mode: _compared(seen, after, inputs, mode, {}) for mode, seen in expected.items()}
    names = ("same output as before", "same output without the blocks")
    first, second = (
        Check(name, *_answer(results)) for name, results in zip(names, (as_they_start, without), strict=True)
    )
    if not _starts_as_identity(after, blocks, fresh):
        first = Check(names[0], None, "the blocks are not at their identity start: outputs are meant to differ")
    elif first.passed is False and (name := _no_identity(after, blocks)) is not None:
        first = Check(names[0], False, f"{first.detail}: {name} does not start as x ↦ x")
    return [first, second]


def _compared(expected: Seen | str, after: nn.Module, inputs: Any, mode: str, blocks: dict[str, nn.Module]) -> str:
    """Return an empty text if the injected network does the same bit for bit, else what differs or why it was not run."""
    if isinstance(expected, str):
        return f"not run: {expected}"
    with _watched(blocks) as running:
        try:
            with torch.no_grad():
                seen = run(after, inputs, mode)
        except Exception as error:
            return _failure(after, error, running)
    unlike = [name for name, value in expected.buffers.items() if not same_value(value, seen.buffers.get(name))]
    return difference(expected.output, seen.output) or (f"`{unlike[0]}` is updated otherwise" if unlike else "")


def _failure(after: nn.Module, error: Exception, running: list[str]) -> str:
    """Name what failed: the block that was running, or else the network."""
    what = _named(after, running[-1]) if running else "the injected network"
    return f"{what} fails: {type(error).__name__}: {first_line(error)}"


def _named(after: nn.Module, path: str) -> str:
    """Name the block with this path."""
    return next(f"block `{step.block}` in `{path}`" for step in steps_of(after) if step.path == path)


@contextlib.contextmanager
def _watched(blocks: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Record the paths of the blocks that have been called and have not returned."""
    running: list[str] = []

    def returned(*_: Any) -> None:
        running.pop()

    hooks = []
    for path, block in blocks.items():
        hooks.append(block.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        hooks.append(block.register_forward_hook(returned))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def _answer(results: dict[str, str]) -> tuple[bool | None, str]:
    ran = [result for result in results.values() if not result.startswith("not run")]
    words = [f"{mode}: {result or 'bit-equal'}" for mode, result in results.items()]
    text = "; ".join(words) if any(results.values()) else "bit-equal in eval and in train"
    return (not any(ran) if ran else None), text


def _starts_as_identity(after: nn.Module, blocks: dict[str, nn.Module], fresh: bool) -> bool:
    """Return whether the blocks are meant to be identities: they start so, and nobody has trained them."""
    steps = {step.path: step for step in steps_of(after)}
    if any(steps[path].init != "identity" for path in blocks):
        return False
    try:
        return fresh or all(_is_identity(block, steps[path]) for path, block in blocks.items())
    except Exception:
        return True  # a block that fails wasn't trained: let the checks report it


def _no_identity(after: nn.Module, blocks: dict[str, nn.Module]) -> str | None:
    """Name the first block that isn't an identity; None if all are, or fail."""
    with contextlib.suppress(Exception):
        return next(
            (
                _named(after, step.path)
                for step in steps_of(after)
                if step.path in blocks and not _is_identity(blocks[step.path], step)
            ),
            None,
        )
    return None


def _is_identity(block: nn.Module, step: Step) -> bool:
    near = next(iter(block.parameters()), torch.zeros(()))
    x = torch.randn(2, step.channels, *[8] * step.rank, generator=torch.Generator().manual_seed(0)).to(near)
    mode = block.training
    try:
        with torch.no_grad():
            block.eval()
            return bool(torch.equal(block(x, None, "none") if is_fused(block) else block(x), x))
    finally:
        block.train(mode)


@contextlib.contextmanager
def _without(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[None]:
    """Replace every block in a model by an identity, which still adds and activates where a fused block did."""
    places = []
    for path in blocks:
        parent, _, name = path.rpartition(".")
        places.append((model.get_submodule(parent), name))
    try:
        for owner, name in places:
            owner._modules[name] = NoGate()
        yield
    finally:
        for (owner, name), block in zip(places, blocks.values(), strict=True):
            owner._modules[name] = block


def _kept_state(before: nn.Module, after: nn.Module, blocks: dict[str, nn.Module]) -> Check:
    old, new = before.state_dict(), after.state_dict()
    kept = [key for key, value in old.items() if key in new and same_value(value, new[key])]
    added = [key for key in new if key not in old]
    ours = {id(tensor) for block in blocks.values() for tensor in block.state_dict(keep_vars=True).values()}
    kept_vars = after.state_dict(keep_vars=True)
    foreign = [key for key in added if id(kept_vars[key]) not in ours]
    lost = [key for key in old if key not in kept]
    replaced = [
        step.path
        for step in steps_of(after)
        if step.path in blocks and not _planned_entries(step) <= blocks[step.path].state_dict().keys()
    ]
    text = f"{len(kept)}/{len(old)} entries of the state dict kept, bit-equal; {len(added)} new"
    if lost:
        text += f"; changed or lost: {', '.join(lost[:3])}"
    if foreign:
        text += f"; new and not a block's: {', '.join(foreign[:3])}"
    if replaced:
        text += f"; not the block that was put there: {', '.join(replaced[:3])}"
    return Check("weights kept", not (lost or foreign or replaced), text)


def _planned_entries(step: Step) -> set[str]:
    """Return the names in the state of a new block of this step; none where it can't be built anew."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return set(build_block(step.block, step.channels, step.size, step.options, step.init).state_dict())
    return set()


def _class_of(module: nn.Module) -> type:
    """Return a module's class as its author wrote it; a copy of a scripted module is scripted, and has another class than the original."""
    return torch.jit.ScriptModule if isinstance(module, torch.jit.ScriptModule) else original_class(module)


def _kept_settings(before: nn.Module, after: nn.Module, blocks: dict[str, nn.Module]) -> Check:
    old, new = dict(before.named_modules()), dict(after.named_modules())
    ours = {id(module) for block in blocks.values() for module in block.modules()}
    changed = [f"{path}: a new module" for path, module in new.items() if path not in old and id(module) not in ours]
    for path, module in old.items():
        twin = new.get(path)
        if twin is None or _class_of(twin) is not _class_of(module):
            changed.append(f"{path or '(the network)'}: class")
            continue
        changed += [f"{path}: {name}" for name in _SETTINGS if _setting(module, name) != _setting(twin, name)]
    parameters = dict(after.named_parameters())
    changed += [
        f"{name}: requires_grad, dtype or device"
        for name, parameter in before.named_parameters()
        if name not in parameters or _traits(parameters[name]) != _traits(parameter)
    ]
    text = f"classes, modes, hooks, requires_grad, dtype and device of {counted(len(old), 'module')} as before"
    return Check("settings kept", not changed, "; ".join(changed[:3]) if changed else text)


_SETTINGS = ("training", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _traits(parameter: nn.Parameter) -> tuple[Any, ...]:
    return parameter.requires_grad, parameter.dtype, parameter.device


def _setting(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return len(value) if name != "training" else value


def _awakened(model: nn.Module, new: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Make random numbers for the old weights that are all zero (a residual branch's last scale, as many start it).

    What they multiply would get no gradient, which says nothing about the new blocks.
    """
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, parameter in model.named_parameters()
        if name not in new and parameter.is_floating_point() and _all_zero(parameter)
    }


def _all_zero(tensor: Tensor) -> bool:
    return not tensor.flatten()[:1].any() and not tensor.any()  # of most, one number tells it


def _gradients(after: nn.Module, blocks: dict[str, nn.Module], inputs: Any) -> Check:
    """Ask for gradients of the new parameters, and of every unit in the blocks, over several inputs if need be."""
    name = "blocks trainable"
    learning = Learning(blocks)
    woken = {**_awakened(after, learning.parameters), **learning.woken()}
    ever: set[str] = set()
    for draw in range(DRAWS):
        with _calls_of(after, blocks) as calls, torch.enable_grad():

            def backward(output: Any, draw: int = draw) -> tuple[Counter[str], bool]:
                made = calls.copy()  # before anything is called again in backward
                learning.ask(output, woken, draw)
                return made, after.training

            with _watched(blocks) as running:
                try:
                    made, trained = run_awake(after, redrawn(inputs, draw), woken, backward, draw + 1)
                except Exception as error:
                    return Check(name, False, _failure(after, error, running))
        ever.update(path for path in blocks if made[path])
        if repeated := sorted(path for path in blocks if 0 < made[path.rpartition(".")[0]] < made[path]):
            return Check(name, False, f"called more often than their owners: {', '.join(repeated[:3])}")
        silent = sorted(set(blocks) - ever)  # stochastic depth may have dropped the unit
        if not (silent or learning.missing() or learning.off() or learning.partly_off()):
            break
    if silent:
        return Check(name, False, f"not called: {', '.join(silent[:3])}")
    steps = {step.path: step for step in steps_of(after)}
    off = learning.off()
    unreached = learning.missing() or [path for path in off if _is_identity(blocks[path], steps[path])]
    if not unreached:
        reached = f"gradients reach all {counted(len(learning.parameters), 'new parameter')} of {counted(len(blocks), 'block')}"
        frozen = [
            key for path, block in blocks.items() for key, p in block.named_parameters(path) if not p.requires_grad
        ]
        found = {"off for every input tried": off, "partly off": learning.partly_off(), "frozen": frozen}
        details = [f"; {what}: {', '.join(some[:3])}{', …' * (len(some) > 3)}" for what, some in found.items() if some]
        return Check(name, True, reached + "".join(details))
    if any("quantized" in type(module).__module__ for module in after.modules()):
        return Check(name, None, "not checked: no gradient passes its quantised modules")
    if not trained:  # a detector's best boxes need not come from everywhere
        seen = f"in eval mode no gradient reached {unreached[0]}"
        return Check(name, None, f"not checked: the network can't be trained on these inputs alone; {seen}")
    owner = next(path for path in blocks if f"{unreached[0]}.".startswith(f"{path}."))
    return Check(name, False, f"no gradient reaches {', '.join(unreached[:3])}: {_named(after, owner)}")


@contextlib.contextmanager
def _calls_of(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[Counter[str]]:
    """Count the calls of the blocks and their owners meanwhile."""
    calls: Counter[str] = Counter()
    watched = {path: model.get_submodule(path) for block in blocks for path in (block, block.rpartition(".")[0])}
    hooks = [
        module.register_forward_hook(lambda *_, path=path: calls.update([path])) for path, module in watched.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
