"""Write a network as an ONNX file, and open the file as a function again."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils import _pytree as pytree

from se_inject.errors import ExportError, OptionError, with_causes
from se_inject.exporting.capture import captured
from se_inject.exporting.dimensions import Free
from se_inject.exporting.reference import Reference, Written
from se_inject.verification import Rejected, tensors

LOWEST_OPSET = 11
"""The lowest opset that is written; what reads nothing newer than 10 was last released in 2019."""

_OF_TRACING = 17  # the opset of a traced file, if none is asked for: the newest of torch's older exporter that all read
_PRINTS: Any = getattr(torch._C, "_jit_onnx_log", None)
_OF_BRAIN_FLOAT = 22  # convolutions in bfloat16 exist since then


def check_opset(opset: int | None, dtype: torch.dtype | None = None) -> None:
    """Check that there is such an opset, and that it has the number format; None always passes.

    Raises:
        OptionError: there is not, or it has not.
    """
    if opset is None:
        return
    import onnx

    lowest, why = LOWEST_OPSET, ""
    if dtype == torch.bfloat16:
        lowest, why = _OF_BRAIN_FLOAT, "; convolutions in bfloat16 exist since opset 22"
    highest = onnx.defs.onnx_opset_version()
    if not isinstance(opset, int) or not lowest <= opset <= highest:
        raise OptionError(
            f"no file of opset {opset} can be written",
            seen=f"{lowest} to {highest} can{why}",
            hint="leave the opset out for the exporter's own choice",
        )


def depends_on_data(error: BaseException | None) -> bool:
    """Tell whether an exporter gave up because the course of the computation depends on the data."""
    names = ("GuardOnDataDependentSymNode", "DataDependentOutputException")
    return any(type(each).__name__ in names for each in with_causes(error))


def write_onnx(reference: Reference, path: Path, free: Free) -> Written:
    """Write through torch's dynamo exporter to one file; ONNX's checker checks it and ONNX Runtime loads it."""
    # optimize would fold batch norm into convolutions in float32
    brain_float = torch.bfloat16 in reference.dtypes
    asked = reference.opset or (_OF_BRAIN_FLOAT if brain_float else None)
    program, notes = _exported(reference, free, asked, optimize=not brain_float)
    _forget_paths(program)
    _pool_maxima(program)
    _name_outputs(program, [name for name, _ in reference.answers[reference.cases(free)[0]]])
    program.save(path, external_data=False)  # above 1.5 GB the weights go to a file beside it all the same
    opset = _checked_opset(path, full_check=brain_float)
    if reference.opset not in (None, opset):
        raise ExportError(
            f"opset {reference.opset} was asked for, this exporter wrote {opset}",
            hint="leave the opset out for the exporter's own choice",
        )
    return _loaded(reference, path, f"dynamo exporter, opset {opset}", notes)


def write_onnx_by_tracing(reference: Reference, path: Path, free: Free) -> Written:
    """Write through torch's older exporter, which records one call: a branch that depends on data is baked in."""
    args, kwargs = reference.call(free)
    names = reference.input_names()
    leaves, structure = pytree.tree_flatten((args, kwargs))
    numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    inputs = [leaves[number] for number in numbers]
    answers = reference.answers[reference.cases(free)[0]]
    outputs = _unlike([name for name, _ in answers], names)
    examples = [leaf for leaf in pytree.tree_leaves(reference.example) if isinstance(leaf, Tensor)]
    axes = {name: reference.dimensions.names(leaf, free) for name, leaf in zip(names, examples, strict=True)}
    axes |= dict(zip(outputs, _changing(reference, free), strict=True))
    opset = reference.opset or _OF_TRACING
    model = _Flat(reference.model.eval(), leaves, numbers, structure)
    with warnings.catch_warnings(record=True) as caught, _graphs_not_printed():
        warnings.simplefilter("always", TracerWarning)
        torch.onnx.export(
            model, tuple(inputs), os.fspath(path),
            input_names=names, output_names=outputs, dynamic_axes={name: dims for name, dims in axes.items() if dims}, opset_version=opset, dynamo=False,
        )  # fmt: skip
    _checked_opset(path, full_check=False)
    return _loaded(reference, path, f"tracing exporter, opset {opset}", _baked_in(caught))


@contextlib.contextmanager
def _graphs_not_printed() -> Iterator[None]:
    """Keep torch's older exporter from printing the whole graph of a network before it raises an error."""
    if _PRINTS is None:
        yield
        return
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = _PRINTS


class _Flat(nn.Module):
    """A network as a function of its tensors alone, to the tensors of its output.

    Args:
        model: the network.
        leaves: the leaves of one call's arguments.
        numbers: which of them are tensors.
        structure: how the leaves make the arguments.
    """

    def __init__(self, model: nn.Module, leaves: list[Any], numbers: list[int], structure: Any) -> None:
        super().__init__()
        self.model = model
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.numbers, self.structure = numbers, structure

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.constants)
        for number, tensor in zip(self.numbers, inputs, strict=True):
            leaves[number] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return tuple(tensor for _, tensor in tensors(self.model(*args, **kwargs)))


def _changing(reference: Reference, free: Free) -> list[dict[int, str]]:
    """Find the dimensions of each output that vary in size between the calls, and name them."""
    answers = [[tensor.shape for _, tensor in reference.answers[case]] for case in reference.cases(free)]
    if any(len(shapes) != len(answers[0]) for shapes in answers):
        return [{} for _ in answers[0]]
    return [
        {d: "batch" if d == 0 and free.batch else f"output_{number}_{d}" for d in range(len(shapes[0]))
         if len({shape[d] if d < len(shape) else None for shape in shapes}) > 1}
        for number, shapes in enumerate(zip(*answers, strict=True))
    ]  # fmt: skip


def _baked_in(caught: list[warnings.WarningMessage]) -> list[str]:
    """Say where the network's course depends on its tensors' values."""
    places = [
        f"{os.path.basename(warning.filename)}:{warning.lineno}"
        for warning in caught
        if issubclass(warning.category, TracerWarning) and "to a Python" in str(warning.message)
    ]
    places = list(dict.fromkeys(places))
    if not places:
        return []
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return [f"recorded from one call, with the values at {', '.join(places[:3])}{more} as they were in it"]


def _loaded(reference: Reference, path: Path, how: str, notes: list[str]) -> Written:
    notes = [*notes]
    if reference.conversion.memory_format:
        notes.append("ONNX has no memory format: the runtime chooses its own")
    run = None
    try:
        run = _in_onnxruntime(path)
    except Exception as error:
        kernel = re.search(r"NOT_IMPLEMENTED.* implementation for (\w+)", str(error))
        if kernel is None:
            raise
        notes.append(f"not compared: on the CPU, ONNX Runtime has no kernel for `{kernel[1]}` in this type")
    return Written(how, run, tuple(notes))


def _exported(reference: Reference, free: Free, opset: int | None, optimize: bool) -> tuple[Any, list[str]]:
    model = reference.model.eval()
    # exporters know neither dataclasses nor numbers among the outputs; `untouched` takes the hook away again
    model.register_forward_hook(lambda module, args, output: tuple(tensor for _, tensor in tensors(output)))
    args, kwargs = reference.call(free)
    source: Any = model
    notes: list[str] = []
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):  # the exporter writes them as loops
        try:
            source, notes = captured(reference, free)
        except Exception as error:
            if depends_on_data(error):
                raise
    program = torch.onnx.export(
        source,
        args if kwargs else (*args, {}),  # or else a last argument that is a dict is taken for the keywords
        kwargs=kwargs,
        dynamic_shapes=reference.dynamic_shapes(free, str),
        opset_version=opset,
        optimize=optimize,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise Rejected("the exporter returned nothing")
    return program, notes


def _forget_paths(program: Any) -> None:
    """Take out the stack traces, which would tell paths on this machine."""
    from onnx_ir.traversal import RecursiveGraphIterator

    for node in RecursiveGraphIterator(program.model.graph):
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _pool_maxima(program: Any) -> None:
    """Write a maximum over height and width as GlobalMaxPool, which is older: ncnn and ORT's quantiser read no ReduceMax of opset 18."""
    from onnx_ir.traversal import RecursiveGraphIterator

    for node in RecursiveGraphIterator(program.model.graph):
        if node.op_type != "ReduceMax" or node.domain or len(node.inputs) != 2:
            continue
        value, axes = node.inputs
        constant: Any = axes and axes.const_value
        keeps: Any = node.attributes.get("keepdims")
        if (
            constant is None
            or value is None
            or value.shape is None
            or value.dtype is None
            or not value.dtype.is_floating_point()
        ):
            continue
        rank = len(value.shape)
        over = sorted(int(axis) % rank for axis in constant.numpy().flatten())
        if rank == 4 and over == [2, 3] and (keeps is None or keeps.value == 1):
            node.op_type = "GlobalMaxPool"
            node.resize_inputs(1)
            node.attributes.clear()


def _name_outputs(program: Any, names: list[str]) -> None:
    """Give the outputs these names, with a suffix where another value has one already."""
    from onnx_ir.traversal import RecursiveGraphIterator

    graph = program.model.graph
    made = [value for node in RecursiveGraphIterator(graph) for value in node.outputs]
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values(), *made)}
    taken -= {value.name for value in graph.outputs}
    for value, name in zip(graph.outputs, _unlike(names, taken), strict=True):
        value.name = name


def _unlike(names: list[str], taken: Iterable[str]) -> list[str]:
    """Make names unique by a suffix where others, or one before, are the same."""
    others, found = set(taken), []
    for name in names:
        while name in others:
            name += "_out"
        others.add(name)
        found.append(name)
    return found


def _checked_opset(path: Path, full_check: bool) -> int:
    """Run ONNX's own checker on a file, and return its opset."""
    import onnx

    onnx.checker.check_model(os.fspath(path), full_check=full_check)
    imports = onnx.load(path, load_external_data=False).opset_import
    (opset,) = (entry.version for entry in imports if entry.domain in ("", "ai.onnx"))
    return int(opset)


def _in_onnxruntime(path: Path) -> Callable[..., list[Tensor]]:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feeds = {name: leaf.numpy(force=True) for name, leaf in zip(names, leaves, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run
