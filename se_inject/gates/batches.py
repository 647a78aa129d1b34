"""Turn batches in the forms that data loaders give into arguments of a call, and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from se_inject.errors import DataError, either
from se_inject.guarding import under_guard
from se_inject.tables import counted
from se_inject.tracing import batch_of, describe
from se_inject.user_code import fact

Progress = Callable[[int, int | None], None]
"""Called after every batch with the number of examples so far and of all; None if that is not known."""
_FORMS = "a batch is a tensor, (tensor, labels), a tuple of positional arguments, or a dict of keyword arguments"


class Batch(NamedTuple):
    """One call's arguments, the number of examples, and the label of each if there are labels."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    labels: Tensor | None


def as_batch(value: Any) -> Batch:
    """Take a batch apart.

    Of two values the second is the labels if it is a tensor (or list) of one integer for each example; in a dict they
    are under ``labels`` or ``label``.

    Raises:
        DataError: it holds no tensor, or is of another form.
    """
    labels = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(value, Tensor):
        args = (value,)
    elif isinstance(value, Mapping):
        kwargs = dict(value)
        size = batch_of(kwargs)
        for key in ("labels", "label"):
            if key in kwargs and (labels := _labels(kwargs[key], size)) is not None:
                del kwargs[key]
                break
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        args = tuple(value)
        if len(args) == 2 and (labels := _labels(args[1], batch_of(args[0]))) is not None:
            args = args[:1]
    size = _size(args, kwargs)
    if size is None:
        raise DataError("this is not a batch", seen=f"a {type(value).__name__}", hint=_FORMS)
    return Batch(args, kwargs, size, labels)


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the number of examples; for a detector's list of images its length."""
    first = args[0] if args else None
    if isinstance(first, list) and first and all(isinstance(item, Tensor) for item in first):
        return len(first)
    return batch_of((args, kwargs))


def _labels(value: Any, size: int | None) -> Tensor | None:
    """Return the labels, if this is one whole number for each example."""
    if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
        value = torch.tensor(value)
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return None
    value = value.squeeze(1) if value.dim() == 2 and value.shape[1] == 1 else value
    return value.detach().long().cpu() if value.dim() == 1 and len(value) == size else None


def calls(model: nn.Module, batches: Iterable[Any], progress: Progress | None = None) -> Iterator[tuple[Batch, Any]]:
    """Run a network on every batch, in the mode it is in and without gradients: the batch and the output.

    Args:
        model: the network; inputs are moved to its device and, if they are floating point, to its dtype.
        batches: as ``as_batch`` takes them.
        progress: called after each batch.

    Raises:
        DataError: there is no example, a batch is of no known form, or the network fails on one.
    """
    for batch in moved(model, batches, progress):
        yield batch, outputs_of(model, batch)


def moved(model: nn.Module, batches: Iterable[Any], progress: Progress | None = None) -> Iterator[Batch]:
    """Move every batch to the network's device and dtype; see ``calls``."""
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    done, whole = 0, getattr(batches, "count", None)
    whole = whole if isinstance(whole, int) else None
    for number, value in enumerate(_iterated(batches), 1):
        batch = as_batch(value)

        def place(leaf: Tensor) -> Tensor:
            return leaf.to(tensor.device, tensor.dtype if leaf.is_floating_point() else None)

        args, kwargs = tree_map_only(Tensor, place, (batch.args, batch.kwargs))
        if any(leaf.is_floating_point() and not leaf.isfinite().all() for leaf in _tensors((args, kwargs))):
            raise DataError(f"batch {number} of the data holds NaN or infinite numbers", hint="mend or leave out those")
        yield batch._replace(args=args, kwargs=kwargs)
        done += batch.size
        if progress is not None:
            progress(done, whole)
    if not done:
        raise DataError("the data holds no example", hint=_FORMS)


def _iterated(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, Tensor):
        yield batches  # one batch, not an iterable of its examples
        return
    try:
        source = iter(batches)
    except TypeError as error:
        raise DataError("`batches` can't be iterated over", seen=f"a {type(batches).__name__}", hint=_FORMS) from error
    while True:
        try:
            value = next(source)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError("the data raised an exception", seen=fact(error)) from error
        yield value


@under_guard
def outputs_of(model: nn.Module, batch: Batch) -> Any:
    """Run the network on a batch, without gradients.

    Raises:
        DataError: it fails.
    """
    try:
        with torch.no_grad():
            return model(*batch.args, **batch.kwargs)
    except Exception as error:
        raise DataError(
            f"this {type(model).__name__} fails on the data",
            seen=f"{describe(batch.args, batch.kwargs)}: {fact(error)}",
            hint="give data of the shape that the network takes"
            + either("; `--input 3x224x224` says which to make of images", ""),
        ) from error


def finite_examples(output: Any, size: int) -> Tensor:
    """Find the examples whose output has no NaN or infinite number: a mask (N,)."""
    good = torch.ones(size, dtype=torch.bool)
    for leaf in _tensors(output):
        if leaf.is_floating_point() and leaf.dim() and leaf.shape[0] == size:
            good &= leaf.isfinite().flatten(1).all(1).cpu() if leaf.numel() else True
    return good


def not_finite_note(count: int, whole: int) -> list[str]:
    """Make a note on examples whose output or gates are NaN or infinite."""
    return [f"{counted(count, 'example')} of {whole:,} gave NaN or infinite numbers and is left out"] if count else []


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
