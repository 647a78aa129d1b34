"""Infer example inputs where none are given, and make real ones where a check needs numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from se_inject.errors import LoadError, NoSites, OptionError, TraceError, UnsupportedModel, either
from se_inject.forwards import FixedBatchNorm, Program, is_of_training, recorded_inputs
from se_inject.guarding import under_guard
from se_inject.tables import counted
from se_inject.tracing.failures import describe
from se_inject.tracing.foreign import home, leaf_kind, outside_of_leaves, wrapper_kind
from se_inject.tracing.observing import observe
from se_inject.tracing.trace import Trace, float_like
from se_inject.user_code import fact

SIZES = {1: (1024, 16000, 128), 2: (224, 32, 28, 64, 96, 128, 299, 256, 384, 512), 3: (16, 32, 64, 8)}
"""Spatial sizes that are tried, in this order, for networks of one, two and three dimensions."""

LARGEST_INPUTS = 2**28
"""Numbers in all inputs that a file may ask for: a gigabyte of float32."""
_LARGEST_SIDE = 10_000
SMALL_SIDE = 64
"""Sides of the images that numeric checks run on where larger ones would show no more."""


@under_guard
def observe_model(model: nn.Module, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None) -> Trace:
    """Observe one call of a model, on inferred inputs if none are given. Nothing is computed and nothing changed.

    Args:
        model: any network.
        example_inputs: a tensor, or a tuple of the positional arguments; tensors may be on the meta device. None:
            the batch size is 2 and the rest is taken from the model's own metadata or its first convolution; a
            program out of a ``.pt2`` file knows its own.
        example_kwargs: keyword arguments.

    Raises:
        UnsupportedModel: not a module whose forward can be edited.
        NoSites: no inputs given, and no convolution to infer them from.
        TraceError: the model's forward fails on the inputs.
        OptionError: a shape is given where tensors are meant.
    """
    check_supported(model)
    _check_no_shape(example_inputs)
    try:
        trace = _observed(model, example_inputs, example_kwargs)
    except TraceError as error:
        leaves = ((path, module, leaf_kind(type(module))) for path, module in model.named_modules())
        for path, module, kind in leaves:
            if kind is not None and kind[0] == "quantised":  # such modules take quantised values alone
                raise _unsupported(path, module, kind) from error
        raise
    return replace(trace, notes=(*trace.notes, *_program_notes(model)))


def _check_no_shape(example_inputs: Any) -> None:
    """Refuse numbers alone, which are a shape.

    Raises:
        OptionError: they are.
    """
    given = example_inputs if isinstance(example_inputs, tuple | list) else ()
    if len(given) > 1 and all(type(number) is int for number in given):
        shape = ", ".join(map(str, given if len(given) != 3 else (2, *given)))
        raise OptionError(
            "example_inputs is a shape, and a tensor of that shape is meant",
            seen=f"{tuple(given)}",
            hint=f"torch.rand({shape}), with the batch first",
        )


def _program_notes(model: nn.Module) -> Iterator[str]:
    """Write notes on a network that is a program out of a file."""
    unusual = [module for module in model.modules() if isinstance(module, FixedBatchNorm | Program)]
    fixed = sum(isinstance(module, FixedBatchNorm) for module in unusual)
    if fixed:
        yield (
            f"the file is a program of eval mode: batch normalisation ({counted(fixed, 'module')}) keeps its statistics "
            "in training, and what only training does is not in it"
        )
    programs = [module for module in unusual if isinstance(module, Program)]
    if any(map(is_of_training, programs)):
        yield (
            "the file is a program of training mode: dropout and normalisation by the batch are written down in it, and "
            "act in eval too; export the network in eval mode"
        )
    if programs and next(model.parameters(), None) is None:
        yield (
            "the file is a frozen program: its weights are constants, which can't be trained; take the one from before "
            "it was frozen"
        )


def _observed(model: nn.Module, example_inputs: Any, example_kwargs: dict[str, Any] | None) -> Trace:
    if example_inputs is not None or example_kwargs:
        args = (
            example_inputs if isinstance(example_inputs, tuple) else () if example_inputs is None else (example_inputs,)
        )
        return observe(model, args, example_kwargs)
    recorded = recorded_inputs(model)
    if recorded is not None:
        trace = observe(model, inputs_from(recorded))
        return replace(trace, notes=(f"input as the program was made for: {describe(trace.inputs)}",))
    failures: list[TraceError] = []
    shapes = inferred_shapes(model)
    dtype = float_like(model).dtype
    for shape in shapes:
        inputs = (torch.empty(shape, device="meta", dtype=dtype),)
        try:
            trace = observe(model, inputs)
        except TraceError as error:
            failures.append(error)
            continue
        return replace(trace, notes=(f"input inferred: {describe(inputs)}",))
    raise TraceError(
        "no input for this network could be guessed",
        seen=f"tried {', '.join('×'.join(map(str, shape)) for shape in shapes)}; the first gave {failures[0].seen}",
        hint=f"give one: `{either('--input 3x224x224', 'example_inputs=torch.rand(2, 3, 224, 224)')}`",
    ) from failures[0]


def inferred_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """List input shapes that the network may take, the likeliest first.

    Raises:
        NoSites: there is neither metadata nor a convolution.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = _stated(config, "input_size")
    first = next((module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    if size is not None and len(size) > 1:
        others = [] if first is None or len(size) != first.weight.dim() - 1 else [(2, first.in_channels, *size[1:])]
        return list(dict.fromkeys([(2, *size), *others]))  # timm keeps the metadata when it is made for other channels
    if first is None:
        raise NoSites(
            "the network has no convolution layer to infer its input from",
            seen=f"a {type(model).__name__} of {', '.join(sorted({type(m).__name__ for m in model.modules()})[:8])}",
            hint="channel attention goes behind convolutions; if there are some outside of `nn.Conv*d`, give an input: "
            f"`{either('--input 3x224x224', 'example_inputs=')}`",
        )
    rank = first.weight.dim() - 2
    if rank == 3:
        return [(2, first.in_channels, depth, side, side) for depth in SIZES[3] for side in (112, 224, 64, depth)]
    shapes = [(2, first.in_channels, *[size] * rank) for size in SIZES[rank]]
    own = _own_size(model) if rank == 2 else None
    return shapes if own is None else list(dict.fromkeys([(2, first.in_channels, *own), *shapes]))


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """Find the height and width that a network records: in itself, in its configuration, or in its trainer's arguments."""
    for holder in (model, getattr(model, "config", None), getattr(model, "args", None)):
        for name in ("image_size", "img_size", "imgsz"):
            sides = _stated(holder, name)
            if sides is not None and len(sides) in (1, 2) and min(sides) >= 8:
                return sides[0], sides[-1]
    return None


def _stated(holder: Any, name: str) -> tuple[int, ...] | None:
    """Read the sizes that a network or its configuration says it takes; None if these are none that an image has."""
    size = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
    sizes = size if isinstance(size, list | tuple) else (size,)
    fits = 1 <= len(sizes) <= 4 and all(type(each) is int and 1 <= each <= _LARGEST_SIDE for each in sizes)
    return tuple(sizes) if fits else None


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse ``3x224x224`` as a shape with its batch.

    Two or three numbers are one example (C×L, C×H×W) and get a batch of 2; four or five include the batch
    (N×C×H×W, N×C×T×H×W).

    Raises:
        OptionError: not a shape.
    """
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts) or not 2 <= len(parts) <= 5:
        raise OptionError(f"`{text}` is not the shape of an input", hint="write it as 3x224x224 (C×H×W)")
    shape = tuple(int(part) for part in parts)
    return shape if len(shape) > 3 else (2, *shape)


def real_inputs(inputs: Any, *, batch: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Fill inputs with numbers, at the given batch size; None: of their own.

    Tensors that have values already keep them unless their size changes.
    """
    generator = torch.Generator().manual_seed(0)
    first = batch_of(inputs)

    def make(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        if batch is not None and shape and shape[0] == first:
            shape[0] = batch
        if list(tensor.shape) == shape and tensor.device.type != "meta":
            return tensor.to(device)
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype, device=device)
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    return tree_map_only(Tensor, make, inputs)


def cropped(inputs: Any, side: int) -> Any:
    """Crop the inputs so that no image or volume is larger than this in any direction."""

    def crop(tensor: Tensor) -> Tensor:
        for dimension in range(2, tensor.dim() if tensor.dim() > 3 else 0):
            tensor = tensor.narrow(dimension, 0, min(side, tensor.size(dimension)))
        return tensor

    return tree_map_only(Tensor, crop, inputs)


def copied(inputs: Any) -> Any:
    """Copy the inputs for another call, so that changes in place don't reach the originals."""
    return tree_map_only(Tensor, torch.clone, inputs)


def batch_of(inputs: Any) -> int | None:
    """Return the batch size of inputs: the first dimension of the first tensor of more than one."""
    return next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 1), None)


def shapes_of(args: Sequence[Any]) -> list[Any] | None:
    """Convert plain positional tensor inputs to JSON data; None if they are anything else."""
    if not all(isinstance(argument, Tensor) for argument in args):
        return None
    return [[list(argument.shape), str(argument.dtype).removeprefix("torch.")] for argument in args]


def inputs_from(shapes: Sequence[Any]) -> tuple[Any, ...]:
    """Make inputs on the meta device.

    Args:
        shapes: of each input what ``shapes_of`` gives; or ``{"list": […]}``, ``{"tuple": […]}`` or
            ``{"dict": [[key, …], …]}`` of such.

    Raises:
        LoadError: they are something else, out of a file, or too large to be tried.
    """
    try:
        inputs = tuple(map(_input_from, shapes))
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise LoadError("the inputs that this file records are none", seen=fact(error)) from error
    if sum(tensor.numel() for tensor in _tensors(inputs)) > LARGEST_INPUTS:
        raise LoadError("the inputs that this file records are too large", seen=describe((inputs, {})))
    return inputs


def _input_from(shape: Any) -> Any:
    if not isinstance(shape, dict):
        sizes, dtype = shape
        return torch.empty(sizes, dtype=getattr(torch, dtype), device="meta")
    ((kind, parts),) = shape.items()
    if kind == "dict":
        return {key: _input_from(part) for key, part in parts}
    return {"list": list, "tuple": tuple}[kind](map(_input_from, parts))


def check_supported(model: Any) -> None:
    """Ask whether this is a module whose forward can be edited.

    It goes by the classes alone; whether there is a place for a block is another question.

    Args:
        model: what a user passed.

    Raises:
        UnsupportedModel: no module, a wrapped one, or one whose convolutions are all compiled, scripted or quantised.
    """
    if not isinstance(model, nn.Module):
        hint = "pass the network that these weights belong to" if isinstance(model, Mapping) else None
        if isinstance(model, torch.export.ExportedProgram):
            hint = "save it with torch.export.save: `se_inject.load` makes modules of the file"
        raise UnsupportedModel(f"the model is not a torch.nn.Module but a {type(model).__name__}", hint=hint)
    if not any(map(_is_special, {type(module) for module in model.modules()})):
        return
    for path, module in model.named_modules():
        if (kind := wrapper_kind(type(module))) is not None:
            raise _unsupported(path, module, kind)
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise UnsupportedModel(
                f"a {type(module).__name__} in `{path}` has no shape yet",
                hint="call the network once on real inputs, then inject",
            )
    outside = outside_of_leaves(model)
    leaves = [(path, module, kind) for path, module in outside if (kind := leaf_kind(type(module))) is not None]
    if leaves and not any(isinstance(module, nn.modules.conv._ConvNd) for _, module in outside):
        raise _unsupported(*leaves[0])


def _is_special(kind: type) -> bool:
    """Return whether modules of a class are wrappers, are not to be looked into, or may have no shapes yet."""
    foreign = wrapper_kind(kind) is not None or leaf_kind(kind) is not None
    return foreign or issubclass(kind, nn.modules.lazy.LazyModuleMixin)


def _unsupported(path: str, module: nn.Module, kind: tuple[str, str]) -> UnsupportedModel:
    which = f"its `{path}`" if path else "it"
    return UnsupportedModel(f"can't edit this model: {which} is {kind[0]}", seen=home(module), hint=kind[1])


def check_has_numbers(model: nn.Module) -> None:
    """Ask whether a network can be run: on the meta device it can be looked at and planned, no more.

    Raises:
        UnsupportedModel: some of its tensors are on the meta device.
    """
    without = next((name for name, tensor in model.state_dict().items() if getattr(tensor, "is_meta", False)), None)
    if without is not None:
        raise UnsupportedModel(
            f"the weights of this {type(model).__name__} have no numbers: they are on the meta device",
            seen=f"`{without}`",
            hint="model.to_empty(device='cpu') makes room for them; then load its weights",
        )


def example_of(
    model: nn.Module, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make real inputs for a model: those given, or random ones of the inferred shape."""
    trace = observe_model(model, example_inputs, example_kwargs)
    like = float_like(model)
    args, kwargs = trace.inputs
    if all(leaf.device.type != "meta" for leaf in _tensors((args, kwargs))):
        return args, kwargs
    return real_inputs(trace.inputs, batch=None, device=like.device, dtype=like.dtype)  # type: ignore[no-any-return]


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
