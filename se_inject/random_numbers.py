"""Draw random numbers for one thread from generators of its own, so that nobody else's draws are disturbed.

Torch's default generators are the process's. Seeding them, or putting them back, changes what another thread draws. Here
the operators that draw get a generator, in the thread that asks for it alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OVERLOADS = {
    "default": "generator",
    "low": "low_generator",
    "low_dtype": "low_generator_dtype",
    "Tensor": "Tensor_generator",
}
"""Of an operator that takes no generator, the overload that does."""

_FILLS: dict[Any, str] = {
    torch.ops.aten.rand_like: "uniform_",
    torch.ops.aten.randn_like: "normal_",
    torch.ops.aten.randint_like: "random_",
}
"""How an operator's numbers are drawn into an empty tensor; those of torch 2.9 take no generator."""

_switching = threading.Lock()
_exchanged_here = threading.local()
"""Has `now` in a thread that draws from the default generator in another one's state: outer modes let that pass."""


def is_alone() -> bool:
    """Return whether no other thread of Python's can be drawing random numbers."""
    return threading.active_count() == 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch draw the numbers of this seed in this thread, and leave the generators as they were.

    If other threads are there it draws from generators of its own; else the default ones are seeded and put back, which
    gives the same numbers and takes no time.
    """
    if not is_alone():
        with OwnNumbers(seed):
            yield
        return
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)


class OwnNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, this thread's operators of torch draw from generators that begin at this seed.

    The numbers are those that the default generators would give after ``torch.manual_seed``. Python's and numpy's are not
    touched. An operator that can't be given a generator (fused attention with dropout) draws from the default one, which
    holds this thread's state for that moment.

    Args:
        seed: where the generators begin.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self.drew = False
        """Whether anything was drawn so far."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (
            torch.Tag.nondeterministic_seeded not in func.tags
            or getattr(_exchanged_here, "now", False)
            or any(isinstance(argument, torch.Generator) for argument in (*args, *kwargs.values()))
        ):
            return func(*args, **kwargs)
        device = _device_of(args, kwargs)
        if device.type == "meta":
            return func(*args, **kwargs)
        self.drew = True
        generator = self._generator(device)
        if func is torch.ops.aten.native_dropout.default:
            return _dropout(generator, *args, **kwargs)
        if any(argument.name == "generator" for argument in func._schema.arguments):
            return func(*args, **{**kwargs, "generator": generator})
        if (fill := _FILLS.get(func.overloadpacket)) is not None:
            bounds = [*args[1:], *(kwargs.pop(name) for name in ("low", "high") if name in kwargs)]
            like = torch.empty_like(args[0], **kwargs)
            return getattr(like, fill)(*map(int, bounds), generator=generator)
        other = _OVERLOADS.get(func._overloadname, "")
        if other in func.overloadpacket.overloads():
            return getattr(func.overloadpacket, other)(*args, **{**kwargs, "generator": generator})
        return _exchanged(generator, lambda: func(*args, **kwargs))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _device_of(args: Any, kwargs: Any) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _dropout(generator: torch.Generator, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Compute what ``native_dropout`` returns, for which there is no generator."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = torch.empty_like(x, dtype=torch.float32).bernoulli_(1 - p, generator=generator)
    return x * mask.to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0), mask.bool()


def _exchanged(generator: torch.Generator, draw: Any) -> Any:
    """Draw with the default generator in the state of another one, which takes the new state over."""
    device = generator.device
    default = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    with _switching:
        before = default.get_state()
        default.set_state(generator.get_state())
        _exchanged_here.now = True
        try:
            return draw()
        finally:
            _exchanged_here.now = False
            generator.set_state(default.get_state())
            default.set_state(before)
