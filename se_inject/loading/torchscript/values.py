"""Follow the values of a TorchScript graph while it is translated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from se_inject.errors import LoadError, SurgeryError
from se_inject.forwards import encoded, function_called

_LARGEST = 2**63
_LONGEST = 10_000
DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32, torch.bfloat16,
)  # fmt: skip
"""By TorchScript's numbers."""


class Constant:
    """A value that is known without a call."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Scalar(Constant):
    """A tensor of one number without dimensions, which tracing makes of the numbers in a forward."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.item())
        self.tensor = tensor


class Part:
    """A module, at a path within the one whose forward is translated; None for one that its caller passes to it."""

    def __init__(self, script: Any, path: str | None) -> None:
        self.script = script
        self.path = path


class Function:
    """A function of the archive."""

    def __init__(self, name: str) -> None:
        self.name = name


def computed(name: str, values: list[Any]) -> Constant | None:
    """Evaluate a function on constants; None if it fails, which a branch that is never taken may.

    Raises:
        LoadError: TorchScript's numbers have 64 bits; Python's would grow and grow.
    """
    largest = max((abs(value) for value in values if isinstance(value, int)), default=0)
    grows = name == "operator:pow" or (name == "operator:mul" and any(isinstance(v, list | str) for v in values))
    if largest >= _LARGEST or (grows and largest > 64):
        raise LoadError("it computes with integers beyond 64 bits, or an exponent beyond 64")
    try:
        known = function_called(name)(*values)
    except (TypeError, ValueError, LookupError, ArithmeticError):
        return None
    if isinstance(known, list | str) and len(known) > _LONGEST:
        raise LoadError(f"it computes a list or text of {len(known):,} items; at most {_LONGEST:,} are allowed")
    return Constant(known)


def data(value: Any) -> Any:
    """Convert a value to the plain data of a stored program."""
    if isinstance(value, Constant):
        try:
            return encoded(value.value)
        except SurgeryError as error:
            raise LoadError(error.message) from error
    if isinstance(value, Part | Function) or value is None:
        raise LoadError("it passes a module or a function on as a value")
    return value
