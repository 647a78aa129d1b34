"""Whether an injected network is still the network it was made from: the checks, each a line for people."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves

from se_inject._tracer import random_state, set_random_state
from se_inject.bodies import original_class
from se_inject.errors import VerificationError
from se_inject.inputs import observe_model, real_inputs
from se_inject.steps import Step
from se_inject.surgery import injected_blocks, steps_of
from se_inject.tables import counted
from se_inject.tracing import Trace, describe, preserved

SMALL_SIDE = 64
LARGE = 500_000_000
"""MACs of convolutions in the observed call from which on the numeric checks use a smaller input."""


_OF_THE_BLOCKS = {"same output as before", "blocks trainable"}
"""Checks that a block can fail by its own fault."""


@dataclass(frozen=True)
class Check:
    """One question and its answer; ``passed`` is None where the question doesn't apply."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verdict:
    """All checks of one injected network."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def expect_passed(self) -> Verdict:
        """This verdict, if nothing failed.

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
    """
    trace = trace or observe_model(before, example_inputs, example_kwargs)
    steps = {step.path for step in steps_of(after)} - {step.path for step in steps_of(before)}
    blocks = {path: block for path, block in injected_blocks(after) if path in steps}
    inputs, notes = _numeric_inputs(before, trace)
    checks = [
        _kept_state(before, after, blocks),
        _kept_settings(before, after),
        *_outputs(before, after, blocks, inputs, fresh),
        _gradients(after, blocks, inputs),
    ]
    notes += weight_warnings(before)
    return Verdict(tuple(checks), tuple(notes))


def weight_warnings(model: nn.Module) -> list[str]:
    """What is wrong with a network's weights before anything is done to it."""
    tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor) and t.is_floating_point()]
    if all(torch.isfinite(tensor).all() for tensor in tensors):
        return []
    return ["warning: the network's weights hold NaN or infinite values"]


def _numeric_inputs(model: nn.Module, trace: Trace) -> tuple[Any, list[str]]:
    """Inputs for the numeric checks: of another batch size than the observed ones, and small if they are large."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    sides: list[int | None] = [SMALL_SIDE, None] if trace.macs > LARGE else [None]
    for side in sides:
        inputs = real_inputs(trace.inputs, batch=3, device=parameter.device, dtype=parameter.dtype, side=side)
        try:
            _run(model, inputs, training=False, seed=0)
        except Exception:
            if side is None:
                raise
            continue
        return inputs, [f"numeric checks on {describe(*inputs)}"]
    raise AssertionError("unreachable")  # pragma: no cover


def _run(
    model: nn.Module, inputs: Any, *, training: bool, seed: int, parameters: dict[str, Tensor] | None = None
) -> Any:
    """One call with nothing left behind: modes, buffers, attributes and the random generator as before."""
    args, kwargs = inputs
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = random_state()
    try:
        with preserved(model):
            for module in model.modules():
                module.training = training
            torch.manual_seed(seed)
            random.seed(seed)
            return functional_call(model, {**buffers, **(parameters or {})}, tuple(_copied(args)), _copied(kwargs))
    finally:
        set_random_state(state)


def _copied(value: Any) -> Any:
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, torch.clone, value)


def _outputs(
    before: nn.Module, after: nn.Module, blocks: dict[str, nn.Module], inputs: Any, fresh: bool
) -> list[Check]:
    """Outputs with the blocks as they start, and with every block replaced by an identity."""
    results: dict[tuple[str, str], str] = {}
    modes = ("eval", "train")
    for mode in modes:
        with torch.no_grad():
            try:
                expected = _run(before, inputs, training=mode == "train", seed=1)
            except Exception as error:  # the network's own: batch norm on one value, say
                results["fresh", mode] = results["without", mode] = f"not run: {str(error).splitlines()[0][:80]}"
                continue
            results["fresh", mode] = _compared(expected, after, inputs, mode, blocks)
            with _without(after, blocks):
                results["without", mode] = _compared(expected, after, inputs, mode, {})
    if _starts_as_identity(after, blocks, fresh):
        text, passed = _answer([results["fresh", mode] for mode in modes], modes)
        if passed is False and (name := _no_identity(after, blocks)) is not None:
            text += f": {name} does not start as x ↦ x"
        first = Check("same output as before", passed, text)
    else:
        first = Check(
            "same output as before", None, "the blocks are not at their identity start: outputs are meant to differ"
        )
    text, passed = _answer([results["without", mode] for mode in modes], modes)
    return [first, Check("same output without the blocks", passed, text)]


def _compared(expected: Any, after: nn.Module, inputs: Any, mode: str, blocks: dict[str, nn.Module]) -> str:
    with _watched(blocks) as running:
        try:
            return _difference(expected, _run(after, inputs, training=mode == "train", seed=1))
        except Exception as error:
            return _failure(after, error, running)


def _failure(after: nn.Module, error: Exception, running: list[str]) -> str:
    """What failed: the block that was running, or else the network."""
    what = _named(after, running[-1]) if running else "the injected network"
    return f"{what} fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def _named(after: nn.Module, path: str) -> str:
    """The block with this path, in words."""
    return next(f"block `{step.block}` in `{path}`" for step in steps_of(after) if step.path == path)


@contextlib.contextmanager
def _watched(blocks: dict[str, nn.Module]) -> Iterator[list[str]]:
    """The paths of the blocks that have been called and have not returned."""
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


def _answer(results: list[str], modes: tuple[str, ...]) -> tuple[str, bool | None]:
    ran = [result for result in results if not result.startswith("not run")]
    passed = all(not result for result in ran) if ran else None
    words = [f"{mode}: {result or 'bit-equal'}" for mode, result in zip(modes, results, strict=True)]
    return ("bit-equal in eval and in train" if not any(results) else "; ".join(words)), passed


def _starts_as_identity(after: nn.Module, blocks: dict[str, nn.Module], fresh: bool) -> bool:
    """Whether the blocks are meant to be identities: they start so, and nobody has trained them."""
    steps = {step.path: step for step in steps_of(after)}
    if any(steps[path].init != "identity" for path in blocks):
        return False
    try:
        return fresh or all(_is_identity(block, steps[path]) for path, block in blocks.items())
    except Exception:
        return True  # a block that fails is no trained one: let the checks say so


def _no_identity(after: nn.Module, blocks: dict[str, nn.Module]) -> str | None:
    """The first block that is no identity, in words; None if all are, or fail."""
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
            return bool(torch.equal(block.eval()(x), x))
    finally:
        block.train(mode)


def _difference(expected: Any, seen: Any) -> str:
    """Empty if two outputs are the same bit for bit; else what differs."""
    (leaves, structure), (others, other_structure) = tree_flatten(expected), tree_flatten(seen)
    if structure != other_structure:
        return "the output has another structure"
    worst = 0.0
    for one, other in zip(leaves, others, strict=True):
        if not isinstance(one, Tensor):
            if one != other:
                return f"{one} became {other}"
        elif one.shape != other.shape or one.dtype != other.dtype:
            return f"{tuple(one.shape)} {one.dtype} became {tuple(other.shape)} {other.dtype}"
        elif not _same_bits(one, other):
            worst = max(worst, float((one.double() - other.double()).abs().nan_to_num(nan=float("inf")).max()))
    return f"differs by up to {worst:.3g}" if worst else ""


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


@contextlib.contextmanager
def _without(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[None]:
    """The model with an identity in every block's place."""
    places = []
    for path in blocks:
        parent, _, name = path.rpartition(".")
        places.append((model.get_submodule(parent), name))
    try:
        for owner, name in places:
            owner._modules[name] = nn.Identity()
        yield
    finally:
        for (owner, name), block in zip(places, blocks.values(), strict=True):
            owner._modules[name] = block


def _kept_state(before: nn.Module, after: nn.Module, blocks: dict[str, nn.Module]) -> Check:
    old, new = before.state_dict(), after.state_dict()
    kept = [key for key, value in old.items() if key in new and _same_value(value, new[key])]
    added = [key for key in new if key not in old]
    ours = {id(tensor) for block in blocks.values() for tensor in block.state_dict(keep_vars=True).values()}
    kept_vars = after.state_dict(keep_vars=True)
    foreign = [key for key in added if id(kept_vars[key]) not in ours]
    lost = [key for key in old if key not in kept]
    text = f"{len(kept)}/{len(old)} entries of the state dict kept, bit-equal; {len(added)} new"
    if lost:
        text += f"; changed or lost: {', '.join(lost[:3])}"
    if foreign:
        text += f"; new and not a block's: {', '.join(foreign[:3])}"
    return Check("weights kept", not lost and not foreign, text)


def _same_value(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and (one.data_ptr() == other.data_ptr() != 0 or _same_bits(one, other))


def _kept_settings(before: nn.Module, after: nn.Module) -> Check:
    modules = dict(after.named_modules())
    changed = []
    for path, module in before.named_modules():
        twin = modules.get(path)
        if twin is None or not isinstance(twin, original_class(module)):
            changed.append(f"{path or '(the network)'}: class")
            continue
        changed += [
            f"{path}: {name}"
            for name in ("training", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            if _setting(module, name) != _setting(twin, name)
        ]
    parameters = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        twin_parameter = parameters.get(name)
        if twin_parameter is None or (parameter.requires_grad, parameter.dtype, parameter.device) != (
            twin_parameter.requires_grad,
            twin_parameter.dtype,
            twin_parameter.device,
        ):
            changed.append(f"{name}: requires_grad, dtype or device")
    count = len(list(before.modules()))
    text = f"classes, modes, hooks, requires_grad, dtype and device of {counted(count, 'module')} as before"
    return Check("settings kept", not changed, "; ".join(changed[:3]) if changed else text)


def _setting(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return len(value) if name != "training" else value


def _awakened(model: nn.Module, new: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Random numbers for the old weights that are all zero (a residual branch's last scale, as many start it).

    What they multiply would get no gradient, which says nothing about the new blocks.
    """
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, parameter in model.named_parameters()
        if name not in new and parameter.is_floating_point() and not parameter.any()
    }


def _gradients(after: nn.Module, blocks: dict[str, nn.Module], inputs: Any) -> Check:
    """One backward pass of a random projection of the outputs, towards the new parameters only."""
    named = {
        f"{path}.{name}": p for path, block in blocks.items() for name, p in block.named_parameters() if p.requires_grad
    }
    awake = _awakened(after, named)
    called: set[str] = set()
    hooks = [block.register_forward_hook(lambda *_, path=path: called.add(path)) for path, block in blocks.items()]
    try:
        with torch.enable_grad():
            try:  # in training, if the network itself can be
                result = _run(after, inputs, training=True, seed=2, parameters=awake)
            except Exception:
                try:
                    with _watched(blocks) as running:
                        result = _run(after, inputs, training=False, seed=2, parameters=awake)
                except Exception as error:
                    return Check("blocks trainable", False, _failure(after, error, running))
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
            generator = torch.Generator().manual_seed(3)
            loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
            grads: Any = ()
            if named and outputs:
                grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)  # type: ignore[arg-type]
    finally:
        for hook in hooks:
            hook.remove()
    silent = sorted(set(blocks) - called)
    missing = [name for name, grad in zip(named, grads, strict=False) if grad is None]
    if not outputs and named:
        missing = list(named)
    dead = [
        path
        for path in blocks
        if any(name.startswith(path + ".") for name in named)
        and not any(
            grad is not None and bool(grad.any())
            for name, grad in zip(named, grads, strict=False)
            if name.startswith(path + ".")
        )
    ]
    if silent:
        return Check("blocks trainable", False, f"not called: {', '.join(silent[:3])}")
    if missing or dead:
        first = (missing or dead)[0]
        owner = next(path for path in blocks if f"{first}.".startswith(f"{path}."))
        told = f"no gradient reaches {', '.join((missing or dead)[:3])}: {_named(after, owner)}"
        return Check("blocks trainable", False, told)
    told = f"gradients reach all {counted(len(named), 'new parameter')} of {counted(len(blocks), 'block')}"
    return Check("blocks trainable", True, told)
