"""Read what ``torch.save`` and ``pickle.dump`` wrote: the pickle, and the tensors beside it.

Three formats: ``zip``, since torch 1.6; ``legacy``, from before; ``plain``, a bare pickle. All are read with one
``Unpickler``.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Sequence
from typing import IO, Any

import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from se_inject.loading.pickles.module_checks import check_modules
from se_inject.loading.pickles.reading import Reading
from se_inject.loading.pickles.storages import check_size, dtype_of, new_bytes, storage_id, storage_of, typed
from se_inject.loading.pickles.unpickler import Unpickler
from se_inject.loading.zip_archive import Archive


def unpickle(
    file: IO[bytes], form: str, trust: Sequence[str], refused: dict[str, str | None], *, mapped: bool = False
) -> Any:
    """Read what ``torch.save`` or ``pickle.dump`` wrote; its tensors go to the CPU.

    Args:
        file: the open file, at its beginning.
        form: ``zip`` (none of TorchScript) or ``legacy``, of ``torch.save``; ``plain``, of ``pickle.dump``.
        trust: packages whose code the file may use.
        refused: takes the names of what became a placeholder, each with the reason if it could not be imported.
        mapped: leave the tensors of a ``zip`` in the file, from which they are read when they are used; they
            are valid as long as nobody writes to the file.

    Raises:
        Exception: of any class, from a damaged file or a trusted package.
    """
    size = file.seek(0, 2)
    file.seek(0)
    reading = Reading.of(size, trust)
    reading.refused = refused
    if form == "zip":
        found = _zip(Archive(file), reading, mapped)
    elif form == "legacy":
        found = _legacy(file, reading, size)
    else:
        found = Unpickler(file, reading, load_bytes=lambda data: _nested(data, reading)).load()
    check_modules(reading)
    return found


def _zip(archive: Archive, reading: Reading, mapped: bool) -> Any:
    archive.check()
    storages: dict[str, Any] = {}
    swapped = "byteorder" in archive and archive.read("byteorder") != sys.byteorder.encode()

    def storage(key: Any) -> Any:
        kind, name, _, numel = storage_id(key, 4)
        if name not in storages:
            dtype = dtype_of(kind)
            check_size(numel, dtype, archive.size(f"data/{name}"))
            data = archive.view(f"data/{name}")
            reading.copies(data)
            is_copy = isinstance(data.obj, bytearray)
            storages[name] = storage_of(data, dtype, copied=not (mapped or is_copy))
            if swapped:
                storages[name]._untyped_storage.byteswap(dtype)
        return storages[name]

    reading.copies(data := archive.read("data.pkl"))
    return Unpickler(io.BytesIO(data), reading, storage).load()


def _legacy(file: IO[bytes], reading: Reading, size: int) -> Any:
    roots: dict[str, Any] = {}
    views: dict[str, Any] = {}
    reserved = 0

    def persistent(key: Any) -> Any:
        nonlocal reserved
        if isinstance(key, tuple) and key[:1] == ("module",):  # a class, with its source
            return key[1]
        kind, name, _, numel, view = storage_id(key, 5)
        dtype = dtype_of(kind)
        if name not in roots:
            if type(numel) is not int or not 0 <= numel * dtype.itemsize <= size - reserved:
                raise pickle.UnpicklingError(f"a storage that is larger than its file of {size:,} bytes")
            reserved += numel * dtype.itemsize
            roots[name] = typed(new_bytes(numel * dtype.itemsize), dtype)
        if view is None:
            return roots[name]
        if type(view) is not tuple or tuple(map(type, view)) != (str, int, int):
            raise pickle.UnpicklingError("a view of a storage that is none")
        name_of_view, start, length = view
        if name_of_view not in views:
            root = roots[name]
            bounds = [number * dtype.itemsize for number in (start, start + length)]
            if not 0 <= bounds[0] <= bounds[1] <= root._untyped_storage.nbytes():
                raise pickle.UnpicklingError("a view that lies outside of its storage")
            views[name_of_view] = typed(root._untyped_storage[bounds[0] : bounds[1]], dtype)
        return views[name_of_view]

    def load(**options: Any) -> Any:
        return Unpickler(file, reading, **options).load()

    if load() != MAGIC_NUMBER or load() != PROTOCOL_VERSION:
        raise pickle.UnpicklingError("it is not in the format that it begins like")
    load()  # the machine that wrote it
    found = load(persistent=persistent)
    names = load()
    if type(names) is not list or any(type(name) is not str for name in names) or sorted(names) != sorted(roots):
        raise pickle.UnpicklingError("it holds other storages than its tensors use")
    for name in names:
        _fill(roots[name], file)
    return found


def _fill(storage: Any, file: IO[bytes]) -> None:
    whole = storage._untyped_storage
    numel = int.from_bytes(file.read(8), "little")
    if numel * storage.dtype.itemsize != whole.nbytes():
        raise pickle.UnpicklingError(f"a storage of {whole.nbytes():,} bytes that holds {numel} elements")
    if numel == 0:
        return
    values: Any = torch.empty(0, dtype=torch.uint8).set_(whole).numpy()
    view = memoryview(values)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the file ends within a storage")
        view = view[count:]


def _nested(data: bytes, reading: Reading) -> Any:
    if data.startswith(b"PK"):
        raise pickle.UnpicklingError("an archive in place of a storage")
    found = _legacy(io.BytesIO(data), reading, len(data))
    if not isinstance(found, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"a {type(found).__name__} in place of a storage")
    return found
