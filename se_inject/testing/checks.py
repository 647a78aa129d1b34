"""Check a block against each part of the contract; a check returns, or raises ``Broken``."""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from se_inject.blocks import Factory, has_gate, has_identity_start
from se_inject.exporting import BATCHES, export, scripted
from se_inject.random_numbers import is_alone, seeded
from se_inject.verification import TOLERANCES

SIZES = {1: (12,), 2: (9, 8), 3: (5, 6, 4)}
"""The spatial size of the values, by rank; sides differ so that a swap of two is seen."""
LARGE = 100.0
"""Values of this size are rare in a network, and their squares don't fit into float16."""


class Broken(Exception):
    """The contract is broken; the message says how."""


@dataclass(frozen=True)
class Subject:
    """How to make blocks of one kind, and values for them."""

    factory: Factory
    channels: int
    rank: int
    size: tuple[int, ...]
    options: dict[str, Any]

    @property
    def filled_in(self) -> dict[str, Any]:
        """The arguments that the package fills in: of ``rank`` and ``size``, those that the factory has."""
        known = inspect.signature(self.factory).parameters
        return {key: value for key, value in (("rank", self.rank), ("size", self.size)) if key in known}

    def fresh(self, seed: int = 0) -> nn.Module:
        """Make a block as it starts."""
        with seeded(seed):
            block: nn.Module = self.factory(self.channels, **self.filled_in, **self.options)
        return block

    def stirred(self, seed: int = 0) -> nn.Module:
        """Make a block with random weights, so that no weight or statistic is zero or one: those would hide mistakes."""
        block = self.fresh(seed)
        with torch.no_grad(), seeded(seed + 1):
            for parameter in block.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.2 * torch.randn_like(parameter))
            for module in block.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                    module.running_mean.normal_(0, 0.1)
                    assert module.running_var is not None
                    module.running_var.uniform_(0.5, 1.5)
        return block.eval()

    def value(self, batch: int = 2, *, seed: int = 0, size: Sequence[int] | None = None) -> Tensor:
        """Make a value for the block, of normal numbers."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, self.channels, *(size or self.size), generator=generator)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Broken(otherwise)


def builds(subject: Subject) -> None:
    """Check that a block is built at all: before the others, which would all say the same."""
    if subject.rank != 2:
        _expect("rank" in subject.filled_in, f"it has no parameter `rank`, so it can't be asked for {subject.rank}")
    block = subject.fresh()
    _expect(isinstance(block, nn.Module), f"the factory returned a {type(block).__name__}, no nn.Module")


def _same_kind(result: Any, value: Tensor, when: str) -> None:
    _expect(isinstance(result, Tensor), f"{when}, it returns a {type(result).__name__}")
    kinds = [f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (value, result)]
    _expect(kinds[0] == kinds[1], f"{when}, {kinds[0]} became {kinds[1]}")


def _shape(subject: Subject) -> None:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for dtype in (torch.float32, torch.float64):
            block = subject.stirred().to(device, dtype)
            for batch, training in ((1, False), (2, False), (5, False), (2, True)):
                value = subject.value(batch).to(device, dtype)
                given = value.clone()
                result = block.train(training)(value)
                mode = "train" if training else "eval"
                _same_kind(result, value, f"at batch {batch} in {mode} mode")
                _expect(torch.equal(value, given), "it changes its input in place")


def _sizes(subject: Subject) -> None:
    if "size" in subject.filled_in:
        return
    block = subject.stirred()
    for size in ([side + 3 for side in subject.size], [1] * subject.rank):
        value = subject.value(size=size)
        result = block(value)
        _same_kind(result, value, f"for a value of another size than {subject.size}")
        _expect(bool(result.isfinite().all()), f"a value of spatial size {tuple(size)} gives infinite numbers or NaN")


def _independent(subject: Subject) -> None:
    block, value = subject.stirred(), subject.value(5)
    whole = block(value)
    for row in range(5):
        _close(block(value[row : row + 1]), whole[row : row + 1], "alone and in a batch, in eval mode, an example")


def _close(result: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCES[torch.float32]) -> None:
    error = (result.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    _expect(bool(error <= tolerance), f"{what} differs by {error:.1e}, relative; allowed {tolerance:.0e}")


def _channels_last(subject: Subject) -> None:
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    if subject.rank not in formats:
        return
    layout = formats[subject.rank]
    value = subject.value()
    block = subject.stirred()
    wanted = block(value)
    if subject.rank == 2:  # torch refuses parameters of 4 dimensions in channels_last_3d
        block = block.to(memory_format=layout)  # type: ignore[call-overload]
    result = block(value.contiguous(memory_format=layout))
    _expect(result.is_contiguous(memory_format=layout), f"strides in channels_last became {result.stride()}")
    _close(result, wanted, "the result in channels_last")
    _expect(block(value).is_contiguous(), "a contiguous value did not stay contiguous")


def _half(subject: Subject) -> None:
    wanted = subject.stirred()(subject.value())
    for dtype in (torch.bfloat16, torch.float16):
        block = subject.stirred().to(dtype)
        value = subject.value().to(dtype).requires_grad_()
        result = block(value)
        _same_kind(result, value, f"in {dtype}")
        _close(result, wanted, f"the result in {dtype}", 2 * TOLERANCES[dtype])
        result.sum().backward()
        large = block(LARGE * value)
        _expect(bool(large.isfinite().all()), f"values near {LARGE:g} in {dtype} give infinite numbers or NaN")


def _gradients(subject: Subject) -> None:
    reached: set[str] = set()
    names: set[str] = set()
    for seed in range(4):  # a ReLU may be dead for one draw
        for training in (True, False):
            block = subject.stirred(seed).train(training)
            value = subject.value(4, seed=seed).requires_grad_()
            (block(value) * subject.value(4, seed=seed + 1)).sum().backward()
            _expect(value.grad is not None and bool(value.grad.any()), "no gradient reaches the input")
            trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
            names |= trained.keys()
            reached |= {name for name, p in trained.items() if p.grad is not None and bool(p.grad.any())}
    _expect(names == reached, f"no gradient reaches {', '.join(sorted(names - reached))}")


def _identity(subject: Subject) -> None:
    if not has_identity_start(subject.fresh()):
        return
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for scale in (1.0, LARGE, 1e-3):
            for training in (False, True):
                block = _at_identity(subject).to(dtype).train(training)
                value = (scale * subject.value(4)).to(dtype)
                mode = "train" if training else "eval"
                _expect(
                    torch.equal(block(value), value), f"x ↦ x is not exact in {dtype}, {mode} mode, |x| ≈ {scale:g}"
                )
    block = _at_identity(subject).train()
    (block(subject.value(4)) * subject.value(4, seed=1)).sum().backward()
    moved = any(p.grad is not None and bool(p.grad.any()) for p in block.parameters())
    _expect(moved, "at its identity start no parameter gets a gradient, so it will never leave it")


def _gate(subject: Subject) -> None:
    if not has_gate(subject.fresh()):
        return
    for dtype in (torch.float32, torch.bfloat16):
        for batch, training in ((1, False), (3, False), (3, True)):
            value = subject.value(batch).to(dtype)
            block, twin = (subject.stirred().to(dtype).train(training) for _ in range(2))
            gate = block.gate(value)  # type: ignore[operator]
            _expect(isinstance(gate, Tensor), f"`gate` returns a {type(gate).__name__}")
            _expect(gate.dtype == dtype, f"`gate` of a value in {dtype} is in {gate.dtype}")
            _expect(_fits(gate, value), f"`gate` of a value of {tuple(value.shape)} is of {tuple(gate.shape)}")
            _close(twin(value), value * gate, "the block and value * gate(value)", TOLERANCES[dtype])


def _fits(gate: Tensor, value: Tensor) -> bool:
    try:
        return gate.expand(value.shape).shape == value.shape
    except RuntimeError:
        return False


def _at_identity(subject: Subject) -> nn.Module:
    block = subject.fresh()
    block.identity_init()  # type: ignore[operator]
    return block


def _count(subject: Subject) -> None:
    formula = getattr(subject.factory, "count", None)
    if not callable(formula):
        return
    claimed = formula(subject.channels, **subject.filled_in, **subject.options)
    built = sum(parameter.numel() for parameter in subject.fresh().parameters())
    _expect(claimed == built, f"`count` says {claimed:,} parameters, there are {built:,}")


def _repeatable(subject: Subject) -> None:
    block, value = subject.stirred(), subject.value()
    before = _facts(block), _generator(), torch.get_default_dtype(), torch.is_grad_enabled()
    results = [block(value) for _ in range(2)]
    after = _facts(block), _generator(), torch.get_default_dtype(), torch.is_grad_enabled()
    _expect(torch.equal(*results), "two calls in eval mode with one value give two results")
    changed = sorted(
        key for key in before[0].keys() | after[0].keys() if not _same(before[0].get(key), after[0].get(key))
    )
    _expect(not changed, f"a call in eval mode changes {', '.join(changed)}")
    _expect(torch.equal(before[1], after[1]), "a call in eval mode draws random numbers")
    _expect(before[2:] == after[2:], "a call changes torch's default dtype or whether gradients are recorded")
    keys = list(block.state_dict())
    block.train()(value)
    _expect(list(block.state_dict()) == keys, "a call in train mode changes the keys of the state dict")


def _generator() -> Tensor:
    """Return the state of torch's generator; nothing if other threads may be drawing from it."""
    return torch.get_rng_state() if is_alone() else torch.empty(0)


def _facts(block: nn.Module) -> dict[str, Any]:
    """Record every attribute of every module in it, as a copy where it can change by itself."""
    facts: dict[str, Any] = {}
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                plain = isinstance(value, (int, float, str, bytes, list, tuple, dict, set, type(None)))
                facts[f"{path}.{name}".lstrip(".")] = (
                    copy.copy(value) if plain or isinstance(value, Tensor) else id(value)
                )
    facts.update({name: tensor.detach().clone() for name, tensor in block.state_dict().items()})
    return facts


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _copies(subject: Subject) -> None:
    block, value = subject.stirred(), subject.value()
    wanted = block(value)
    _expect(torch.equal(copy.deepcopy(block)(value), wanted), "a deep copy computes something else")
    _expect(torch.equal(pickle.loads(pickle.dumps(block))(value), wanted), "unpickled it computes something else")
    other = subject.stirred(1)
    other.load_state_dict(block.state_dict())
    _expect(torch.equal(other(value), wanted), "with the same state dict another block computes something else")


def _meta(subject: Subject) -> None:
    with torch.device("meta"):
        block = subject.fresh()
        value = torch.empty(2, subject.channels, *subject.size)
        _same_kind(block.eval()(value), value, "on the meta device")
        if has_identity_start(block):
            block.identity_init()  # type: ignore[operator]
            _same_kind(block(value), value, "on the meta device, at its identity start")


def _script(subject: Subject) -> None:
    block = subject.stirred()
    compiled = scripted(block)
    for batch in BATCHES:
        _close(compiled(subject.value(batch)), block(subject.value(batch)), f"scripted at batch {batch}, the result")


def _pt2(subject: Subject) -> None:
    _exported(subject, ".pt2")


def _onnx(subject: Subject) -> None:
    _exported(subject, ".onnx")


def _exported(subject: Subject, suffix: str) -> None:
    """Export a convolution with the block behind it; `export` runs the file at every batch and compares."""
    with seeded(0):
        entry = getattr(nn, f"Conv{subject.rank}d")(3, subject.channels, 1)
        value = torch.randn(2, 3, *subject.size)
    network = nn.Sequential(entry, subject.stirred()).eval()
    with tempfile.TemporaryDirectory() as folder:
        written = export(network, Path(folder) / f"block{suffix}", (value,))
    ran = tuple(check.batch for check in written.checks)
    _expect(ran == BATCHES, "; ".join((f"it was compared at batch {ran}", *written.notes)))


class _Check(NamedTuple):
    function: Callable[[Subject], None]
    hint: str
    compiles: bool = False
    """It calls a compiler of torch's, which may fail while a thread's own random numbers are drawn."""


CHECKS = {
    "shape": _Check(_shape, "return a new tensor of the input's shape, dtype and device; work out of place"),
    "sizes": _Check(_sizes, "take sizes from the input in forward; a parameter `size` says that one is needed"),
    "independent": _Check(_independent, "no operation over the batch dimension; norms use running statistics in eval"),
    "channels_last": _Check(_channels_last, "multiply the input itself by a broadcast gate, which keeps its strides"),
    "half": _Check(_half, "no constant in float32; sums of squares in `x.float()`, then back to the input's dtype"),
    "gradients": _Check(
        _gradients, "a parameter that forward doesn't use; or `.detach()`, `.data`, rounding in forward"
    ),
    "identity": _Check(_identity, "zero the last layer, and a gate of 2·sigmoid or 1 + tanh; or no `identity_init`"),
    "gate": _Check(_gate, "a method `gate(value)` returns what forward multiplies the value by; or name it otherwise"),
    "count": _Check(_count, "`count(channels, **options)` takes what the constructor takes"),
    "repeatable": _Check(_repeatable, "no attribute, cache or buffer is written in eval mode"),
    "copies": _Check(_copies, "the class at the top level of a module, no lambdas; all that counts in the state dict"),
    "meta": _Check(_meta, "no `.item()`, no branch on values, tensors made on the input's device"),
    "script": _Check(
        _script, "typed arguments, plain attributes, no `*unpacking` in forward; see TorchScript's reference", True
    ),
    "pt2": _Check(_pt2, "the batch must stay open: use `x.size(0)`, no `int()` or loop over it", True),
    "onnx": _Check(_onnx, "operators that ONNX has; the batch must stay open", True),
}
"""Every check by its name, in the order in which they run, each with what to do about a failure."""
