"""Make the storages of tensors out of a file, each exactly as long as the bytes that the file holds for it."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.serialization import StorageType

from se_inject.loading.zip_archive import DamagedArchive


def check_size(numel: Any, dtype: torch.dtype, size: int) -> None:
    """Check that a storage of so many numbers takes exactly so many bytes.

    Raises:
        DamagedArchive: it takes more or fewer.
    """
    if type(numel) is not int or not 0 <= numel < 2**48 or numel * dtype.itemsize != size:
        raise DamagedArchive(f"a storage that says that it is larger or smaller than its {size:,} bytes")


def storage_id(key: Any, parts: int) -> Any:
    """Return the parts of a persistent id after the word ``storage``: the type of its numbers, its name, and so on.

    Raises:
        UnpicklingError: the id is not one that torch writes.
    """
    if type(key) is not tuple or len(key) != parts + 1 or key[0] != "storage" or type(key[2]) is not str:
        raise pickle.UnpicklingError("a persistent id that torch doesn't write")
    return key[1:]


def dtype_of(kind: Any) -> torch.dtype:
    """Return the type of the numbers in a storage of this class.

    Raises:
        UnpicklingError: the class is not a storage's.
    """
    if kind is torch.UntypedStorage:
        return torch.uint8
    if not isinstance(kind, StorageType):
        raise pickle.UnpicklingError("a storage of no known type")
    return kind.dtype  # type: ignore[no-any-return]


def new_bytes(size: int, device: str = "cpu") -> Any:
    """Return a storage of so many bytes that nobody has written to."""
    return torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]


def typed(storage: Any, dtype: torch.dtype) -> Any:
    """Return a storage of bytes as one of numbers."""
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def storage_of(data: memoryview, dtype: torch.dtype, *, copied: bool) -> Any:
    """Return the storage of these bytes: a copy of them, or themselves."""
    if not data:
        return typed(new_bytes(0), dtype)
    found = torch.frombuffer(data, dtype=torch.uint8)
    return typed((found.clone() if copied else found).untyped_storage(), dtype)
